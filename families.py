"""Tiny random pipelines of the real diffusers and transformers classes: a builder for each family
gives (pipe, call), what pipe(...) takes. Made in a moment, without files, except tiny/flux's."""

import functools

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import models as kit

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
TEXT |= dict(vocab_size=300, num_hidden_layers=3)
ROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6)
QWEN = TEXT | dict(head_dim=8, rope_parameters=ROPE)
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
DIT = dict(patch_size=1, in_channels=16, attention_head_dim=16, num_attention_heads=2, num_layers=2)
FLUX = DIT | dict(num_single_layers=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8])
CALL = dict(height=16, width=16, num_inference_steps=4)


@torch.no_grad()
def pipeline(kind, transformer, vae, *encoders, **others):
    """The pipeline, frozen, every weight of it random: no gate or shift is 0 at the start."""
    parts = dict(transformer=transformer, vae=vae, scheduler=flow(use_dynamic_shifting=True))
    for i, encoder in enumerate(encoders, 1):
        suffix = f"_{i}" if i > 1 else ""
        parts[f"text_encoder{suffix}"] = encoder
        longest = 77 if "CLIP" in type(encoder).__name__ else 512
        parts[f"tokenizer{suffix}"] = tokenizer(longest)
    pipe = kind(**parts | others)
    generator = torch.Generator().manual_seed(0)
    for part in (transformer, vae, *encoders):
        part.eval().requires_grad_(False)
        for name, p in part.named_parameters():
            p.normal_(0, 0.1, generator=generator)
            if p.dim() > 1:  # a sum of as many products as it has inputs
                p.mul_(10 / p[0].numel() ** 0.5)
            elif name.endswith("weight"):  # a norm's
                p.add_(1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def tokenizer(longest: int):
    """A token a byte."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {token: i for i, token in enumerate(vocabulary)}
    model = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(special)
    how = dict(pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHAT)
    how |= dict(model_max_length=longest)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **how)


def autoencoder(kind, **others):
    sizes = dict(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1, sample_size=32)
    sizes |= dict(down_block_types=["DownEncoderBlock2D"] * 2)
    sizes |= dict(up_block_types=["UpDecoderBlock2D"] * 2)
    sizes |= dict(use_quant_conv=False, use_post_quant_conv=False)
    return kind(**sizes, **others)


def vae():
    return autoencoder(diffusers.AutoencoderKL, latent_channels=4, shift_factor=0.06)


def flux2_vae():
    return autoencoder(diffusers.AutoencoderKLFlux2, latent_channels=2)


def qwen_vae():
    sizes = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1)
    sizes |= dict(temperal_downsample=[False, True])
    statistics = dict(latents_mean=[0.1] * 4, latents_std=[1.2] * 4)
    return diffusers.AutoencoderKLQwenImage(**sizes, **statistics)


def clip(kind=transformers.CLIPTextModelWithProjection):
    sizes = TEXT | dict(hidden_size=32, projection_dim=32, max_position_embeddings=77)
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return kind(transformers.CLIPTextConfig(**sizes, **tokens))


def t5(config=transformers.T5Config, model=transformers.T5EncoderModel, width: int = 32):
    sizes = dict(d_model=width, d_ff=16, d_kv=8, num_heads=2, num_layers=2, vocab_size=300)
    return model(config(**sizes))


def qwen3(kind=transformers.Qwen3Model, layers: int = 3):
    sizes = TEXT | dict(head_dim=8, num_hidden_layers=layers)
    return kind(transformers.Qwen3Config(**sizes))


def gemma():
    return transformers.Gemma2Model(transformers.Gemma2Config(head_dim=8, **TEXT))


# ------------------------------------------------------------------------------------ the families
def schnell():
    return kit.load_pipeline(kit.TINY, "cpu"), dict(kit.CALLS["tiny/flux"])


def flux_dev():
    dev = FLUX | dict(guidance_embeds=True, pooled_projection_dim=32)
    transformer = diffusers.FluxTransformer2DModel(**dev)
    encoders = (clip(transformers.CLIPTextModel), t5())
    pipe = pipeline(diffusers.FluxPipeline, transformer, vae(), *encoders)
    return pipe, CALL | dict(guidance_scale=3.5, max_sequence_length=32)


def flux2_klein(guidance_scale=1.0, is_distilled=True):
    klein = FLUX | dict(in_channels=8, axes_dims_rope=[4, 4, 4, 4], timestep_guidance_channels=32)
    klein |= dict(guidance_embeds=False, joint_attention_dim=48)  # of layers 9, 18 and 27
    transformer = diffusers.Flux2Transformer2DModel(**klein)
    encoder = qwen3(transformers.Qwen3ForCausalLM, layers=28)
    kind = diffusers.Flux2KleinPipeline
    pipe = pipeline(kind, transformer, flux2_vae(), encoder, is_distilled=is_distilled)
    return pipe, CALL | dict(guidance_scale=guidance_scale, max_sequence_length=96)


def sd3():
    sizes = DIT | dict(patch_size=2, in_channels=4, out_channels=4, sample_size=32)
    sizes |= dict(joint_attention_dim=32, pooled_projection_dim=64, caption_projection_dim=32)
    sizes |= dict(qk_norm="rms_norm", dual_attention_layers=(0,))
    transformer = diffusers.SD3Transformer2DModel(**sizes)
    encoders = (clip(), clip(), t5())
    scheduler = flow(shift=3.0)
    kind = diffusers.StableDiffusion3Pipeline
    pipe = pipeline(kind, transformer, vae(), *encoders, scheduler=scheduler)
    return pipe, CALL | dict(guidance_scale=4.0, max_sequence_length=32)


def z_image(guidance_scale=0.0):
    sizes = dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    axes = dict(cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    transformer = diffusers.ZImageTransformer2DModel(**sizes, **axes)
    scheduler = flow(shift=3.0)
    pipe = pipeline(diffusers.ZImagePipeline, transformer, vae(), qwen3(), scheduler=scheduler)
    return pipe, CALL | dict(guidance_scale=guidance_scale, max_sequence_length=96)


def qwen_image():
    sizes = DIT | dict(patch_size=2, out_channels=4, joint_attention_dim=16)
    transformer = diffusers.QwenImageTransformer2DModel(**sizes, axes_dims_rope=(8, 4, 4))
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN, vision_config=VISION)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    kind = diffusers.QwenImagePipeline
    pipe = pipeline(kind, transformer, qwen_vae(), encoder, scheduler=scheduler)
    return pipe, CALL | dict(true_cfg_scale=4.0, negative_prompt=" ")


def chroma():
    sizes = dict(approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16)
    transformer = diffusers.ChromaTransformer2DModel(**FLUX, **sizes)
    pipe = pipeline(diffusers.ChromaPipeline, transformer, vae(), t5())
    return pipe, CALL | dict(guidance_scale=3.0, max_sequence_length=32)


def lumina2():
    sizes = dict(patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1)
    sizes |= dict(num_attention_heads=3, num_kv_heads=1, multiple_of=16, cap_feat_dim=16)
    axes = dict(axes_dim_rope=[4, 2, 2], axes_lens=[256, 128, 128])
    transformer = diffusers.Lumina2Transformer2DModel(**sizes, **axes)
    pipe = pipeline(diffusers.Lumina2Pipeline, transformer, vae(), gemma())
    size = dict(height=64, width=64)  # it reads the schedule's shift off the latents' channels
    return pipe, CALL | size | dict(guidance_scale=4.0, max_sequence_length=64, system_prompt="x")


def aura_flow():
    sizes = dict(sample_size=16, num_attention_heads=4, attention_head_dim=8, pos_embed_max_size=64)
    sizes |= dict(num_mmdit_layers=2, num_single_dit_layers=1)
    sizes |= dict(joint_attention_dim=16, caption_projection_dim=32)
    transformer = diffusers.AuraFlowTransformer2DModel(**sizes)
    encoder = t5(transformers.UMT5Config, transformers.UMT5EncoderModel, 16)
    scheduler = flow(shift=1.73)
    pipe = pipeline(diffusers.AuraFlowPipeline, transformer, vae(), encoder, scheduler=scheduler)
    return pipe, CALL | dict(guidance_scale=3.5, max_sequence_length=64)


def sana():
    sizes = DIT | dict(in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=16)
    sizes |= dict(num_cross_attention_heads=2, cross_attention_head_dim=16)
    transformer = diffusers.SanaTransformer2DModel(**sizes)
    layers = dict(block_types=["ResBlock"] * 2, block_out_channels=(8, 8), layers_per_block=(1, 1))
    coders = {f"{side}_{name}": v for side in ("encoder", "decoder") for name, v in layers.items()}
    dc = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, **coders)
    sampler = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler = diffusers.DPMSolverMultistepScheduler(**sampler)
    pipe = pipeline(diffusers.SanaPipeline, transformer, dc, gemma(), scheduler=scheduler)
    call = dict(use_resolution_binning=False, complex_human_instruction=None, height=32, width=32)
    return pipe, CALL | call | dict(guidance_scale=4.5, max_sequence_length=64)


def krea2():
    sizes = DIT | dict(num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=16)
    del sizes["patch_size"]
    sizes |= dict(text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2)
    sizes |= dict(text_num_key_value_heads=2, text_intermediate_size=24)
    sizes |= dict(num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8))
    transformer = diffusers.Krea2Transformer2DModel(**sizes)
    vision = VISION | dict(deepstack_visual_indexes=[0])
    config = transformers.Qwen3VLConfig(text_config=QWEN, vision_config=vision)
    encoder = transformers.Qwen3VLModel(config)
    layers = dict(text_encoder_select_layers=(1, 2, 3))
    pipe = pipeline(diffusers.Krea2Pipeline, transformer, qwen_vae(), encoder, **layers)
    return pipe, CALL | dict(guidance_scale=3.0, max_sequence_length=200)


def ernie():
    sizes = dict(hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48)
    sizes |= dict(in_channels=8, out_channels=8, text_in_dim=16, rope_axes_dim=(4, 4, 8))
    transformer = diffusers.ErnieImageTransformer2DModel(**sizes)
    scheduler = flow(shift=3.0)
    kind = diffusers.ErnieImagePipeline
    pipe = pipeline(kind, transformer, flux2_vae(), qwen3(), scheduler=scheduler)
    return pipe, CALL | dict(height=64, width=64, guidance_scale=3.0)


# The six families that everything is tested on, FluxPipeline twice; then what costs little more.
SIX = (schnell, flux_dev, flux2_klein, sd3, z_image, qwen_image, chroma)
FAMILIES = {builder.__name__: builder for builder in SIX}
OTHERS = {builder.__name__: builder for builder in (lumina2, aura_flow, sana, krea2, ernie)}
OTHERS["flux2_klein_base"] = functools.partial(flux2_klein, 4.0, False)
OTHERS["z_image_guided"] = functools.partial(z_image, 4.0)
