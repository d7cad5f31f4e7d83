"""The models of README's table by their configurations, as their pages on the hub have them: what
`bench.py --plans` says of them without a weight.

Parts that decide nothing here, such as tokenizers and schedulers, are left out.
"""

import json
from pathlib import Path

import models  # first: it keeps transformers quiet

# isort: split
import diffusers
import transformers

import memory
from sites import gate_sites

# Text encoders: (class, sizes).
CLIP_L = ("CLIPTextModel", dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20)
CLIP_G |= dict(num_hidden_layers=32, projection_dim=1280)
T5_XXL = dict(d_model=4096, d_ff=10240, num_heads=64, num_layers=24)
T5_XXL = ("T5EncoderModel", T5_XXL | dict(feed_forward_proj="gated-gelu"))
QWEN3 = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, vocab_size=151936)
QWEN3 |= dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
QWEN_VL = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064)
QWEN_VL |= dict(num_attention_heads=28, num_key_value_heads=4)
VISION = dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
QWEN_VL = dict(text_config=QWEN_VL, vision_config=VISION)
# Autoencoders.
KL = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16)
KL |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
KL = ("AutoencoderKL", KL | dict(use_quant_conv=False, use_post_quant_conv=False))
# Transformers, where they differ from what diffusers' class has by default.
FLUX = dict(num_layers=19, num_single_layers=38, num_attention_heads=24)
KLEIN = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, guidance_embeds=False)
SD3 = dict(num_layers=38, num_attention_heads=38, joint_attention_dim=4096, in_channels=16)
SD3 |= dict(pooled_projection_dim=2048, caption_projection_dim=2432, pos_embed_max_size=192)
SD3 |= dict(sample_size=128, qk_norm="rms_norm")

# {hub id: (licence, pipeline, transformer's sizes, other parts)}
MODELS = {
    models.SCHNELL: (
        "Apache-2.0", "FluxPipeline", FLUX,
        dict(text_encoder=CLIP_L, text_encoder_2=T5_XXL, vae=KL),
    ),
    "black-forest-labs/FLUX.1-dev": (
        "non-commercial", "FluxPipeline", FLUX | dict(guidance_embeds=True),
        dict(text_encoder=CLIP_L, text_encoder_2=T5_XXL, vae=KL),
    ),
    "black-forest-labs/FLUX.2-klein-4B": (
        "Apache-2.0", "Flux2KleinPipeline", KLEIN | dict(joint_attention_dim=7680),
        dict(text_encoder=("Qwen3ForCausalLM", QWEN3), vae=("AutoencoderKLFlux2", {})),
    ),
    "Tongyi-MAI/Z-Image-Turbo": (
        "Apache-2.0", "ZImagePipeline", {}, dict(text_encoder=("Qwen3Model", QWEN3), vae=KL),
    ),
    "stabilityai/stable-diffusion-3.5-large-turbo": (
        "Stability community", "StableDiffusion3Pipeline", SD3,
        dict(
            text_encoder=("CLIPTextModelWithProjection", CLIP_L[1]),
            text_encoder_2=("CLIPTextModelWithProjection", CLIP_G), text_encoder_3=T5_XXL, vae=KL,
        ),
    ),
    "Qwen/Qwen-Image": (
        "Apache-2.0", "QwenImagePipeline", {},
        dict(
            text_encoder=("Qwen2_5_VLForConditionalGeneration", QWEN_VL),
            vae=("AutoencoderKLQwenImage", {}),
        ),
    ),
}  # fmt: skip
SPEED = 300e12  # operations a second: FLUX.1 at 1024 pixels on an H200, see bench/h200.json


def write_configs(name: str, folder: Path) -> None:
    """The configuration files of a model of MODELS, as diffusers stores them."""
    _, pipeline, sizes, parts = MODELS[name]
    kind = getattr(diffusers, pipeline)
    transformer = kind.__init__.__annotations__["transformer"].__name__
    index = dict(_class_name=pipeline, transformer=["diffusers", transformer])
    configs = dict(transformer=dict(sizes, _class_name=transformer))
    for part, (class_name, sizes) in parts.items():
        library = transformers if "text" in part else diffusers
        index[part] = [library.__name__, class_name]
        configs[part] = dict(sizes, _class_name=class_name)
        if "text" in part:
            configs[part] = getattr(library, class_name).config_class(**sizes).to_dict()
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config, default=str), "utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def plans(folder: Path) -> list[dict]:
    """A row a model: billions of parameters; gates, of the default modules; GiB on the device in
    bf16 and one picture at a time, by --checkpoint; 10^15 operations of an optimiser step of the
    preset paper, 4 + 4 pictures and the base's own, with --checkpoint step; hours of 400 steps."""
    rows = []
    for name, (licence, *_) in MODELS.items():
        place = folder / name.replace("/", "_")
        write_configs(name, place)
        kind = models.pipeline_class(str(place))
        transformer = models.meta_transformer(str(place), kind)
        sites = gate_sites(transformer)
        load = memory.load_of(kind, models.CALLS[name])
        row = dict(model=name, licence=licence)
        row |= dict(billions=round(sum(p.numel() for p in transformer.parameters()) / 1e9, 1))
        row |= dict(gates=sum(site.units for site in sites.values()))
        for form in ("step", "block", "both"):
            how = dict(sites=sites, load=load, pictures=1, itemsize=2, checkpoint=form)
            row[f"{form}_gib"] = round(memory.memory_needed(transformer, **how) / 2**30, 1)
        passes = 4 - 1 / load.calls  # 3 to draw, all calls but one again; 1 for the base's picture
        flops = 8 * passes * load.rows * load.calls * memory.forward_flops(transformer, load)
        row |= dict(pflop_a_step=round(flops / 1e15, 1))
        rows.append(row | dict(hours_400_steps=round(400 * flops / SPEED / 3600, 1)))
    return rows
