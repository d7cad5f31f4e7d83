"""The flow models of tiny/, one for each family: its stock pipeline of diffusers' own classes,
untrained, how it reads captions, and the velocity it gives.

All of them draw the same world with the same autoencoder's weights. Packed latents (B, 16, 64) are
FLUX's: 4 x 4 tokens, each of 16 channels x 2 x 2.
"""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

T5_LENGTH = 24
CLIP_LENGTH = 32
QWEN_LENGTH = 32


class Family(NamedTuple):
    make: Callable  # (vae, tokenizers of tiny/flux) -> the pipeline
    parts: tuple[str, ...]  # which are trained
    tokens: Callable  # (pipe, captions, rng) -> {name: tensor}, what velocity() reads
    velocity: Callable  # (pipe, x (B, 16, 64), s (B,), tokens) -> (B, 16, 64), noise - picture


def scheduler():
    """Sigmas 1, .75, .5, .25, 0 in four steps."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def zeroed(module, *names: str):
    """Blocks start as the identity (adaLN-Zero), the output as zero: parameters whose name holds
    one of these begin at 0."""
    for name, p in module.named_parameters():
        if any(part in name for part in names):
            torch.nn.init.zeros_(p)
    return module


def exact_time(layer, s):
    """For a `with`: the model would round 1000 s to its dtype, 750 to 752 in bfloat16."""
    return layer.register_forward_pre_hook(lambda module, inputs: (1000 * s,))


# ------------------------------------------------------------------------------------------ FLUX.1
def make_flux(vae, tokenizers: tuple) -> FluxPipeline:
    """FLUX.1-schnell's classes at a 4,000th of its size."""
    clip_tokenizer, t5_tokenizer = tokenizers
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=4,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    zeroed(transformer, "norm1", "norm_out", "norm.linear")
    zeroed(transformer.proj_out, "")
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    clip = CLIPTextModel(clip_config)
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    t5 = T5EncoderModel(t5_config)
    torch.nn.init.normal_(t5.shared.weight, std=1.0)
    return FluxPipeline(
        scheduler=scheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def flux_tokens(pipe, captions, rng) -> dict:
    """For T5 and CLIP; now and then one of the two reads an empty string."""
    drop = [rng.random() for _ in captions]
    to_clip = ["" if d < 0.06 else c for c, d in zip(captions, drop, strict=True)]
    to_t5 = ["" if d > 0.95 else c for c, d in zip(captions, drop, strict=True)]
    shape = dict(truncation=True, return_tensors="pt")
    t5 = pipe.tokenizer_2(to_t5, padding="max_length", max_length=T5_LENGTH, **shape)
    clip = pipe.tokenizer(to_clip, padding="max_length", max_length=CLIP_LENGTH, **shape)
    return dict(t5=t5.input_ids, clip=clip.input_ids)


@functools.cache  # positions, here and below: a CUDA graph may copy nothing from the CPU
def flux_ids(device) -> tuple:
    """Those of text and of picture."""
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, device, torch.float32)
    return torch.zeros(T5_LENGTH, 3, device=device), img_ids


def flux_velocity(pipe, x, s, tokens):
    txt_ids, img_ids = flux_ids(x.device)
    with exact_time(pipe.transformer.time_text_embed.time_proj, s):
        return pipe.transformer(
            hidden_states=x,
            timestep=s.to(x.dtype),
            encoder_hidden_states=pipe.text_encoder_2(tokens["t5"]).last_hidden_state,
            pooled_projections=pipe.text_encoder(tokens["clip"]).pooler_output,
            img_ids=img_ids,
            txt_ids=txt_ids,
        ).sample


# ------------------------------------------------------------------------- Qwen3, of the next two
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = ["<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"]  # a token each


def qwen_tokenizer(t5_tokenizer) -> PreTrainedTokenizerFast:
    """The pieces of T5's, in Qwen's chat form."""
    parts = json.loads(t5_tokenizer.backend_tokenizer.to_str())
    parts["post_processor"] = None  # no end token: the template has its own
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        chat_template=CHAT,
        pad_token="<pad>",
        eos_token=TURNS[1],
        model_max_length=QWEN_LENGTH,
    )
    tokenizer.add_special_tokens(dict(additional_special_tokens=[TURNS[0], TURNS[2]]))
    return tokenizer


def qwen_config(tokenizer, **sizes) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        head_dim=32,
        max_position_embeddings=QWEN_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **sizes,
    )


def chat_tokens(pipe, captions, rng) -> dict:
    said = [dict(role="user", content="{}")]
    form = pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    texts = [form.format(caption) for caption in captions]
    shape = dict(padding="max_length", truncation=True, max_length=QWEN_LENGTH)
    found = pipe.tokenizer(texts, return_tensors="pt", **shape)
    return dict(ids=found.input_ids, mask=found.attention_mask)


def hidden_states(pipe, tokens) -> tuple:
    how = dict(output_hidden_states=True, use_cache=False)
    return pipe.text_encoder(tokens["ids"], attention_mask=tokens["mask"], **how).hidden_states


# ----------------------------------------------------------------------------------- FLUX.2-klein
def flux2_vae(vae: AutoencoderKL) -> AutoencoderKLFlux2:
    """The same weights in FLUX.2's class, whose batch norm holds what shifts and scales latents."""
    names = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
    names += ("down_block_types", "up_block_types", "sample_size", "mid_block_add_attention")
    names += ("use_quant_conv", "use_post_quant_conv")
    twin = AutoencoderKLFlux2(**{name: vae.config[name] for name in names})
    twin.load_state_dict(vae.state_dict(), strict=False)
    twin.bn.running_mean.fill_(vae.config.shift_factor)
    twin.bn.running_var.fill_(vae.config.scaling_factor**-2 - twin.config.batch_norm_eps)
    return twin


def make_flux2(vae, tokenizers: tuple) -> Flux2KleinPipeline:
    """FLUX.2-klein's classes: one modulation for all blocks, SwiGLU, no biases, and the text read
    off layers 9, 18 and 27 of a causal language model."""
    tokenizer = qwen_tokenizer(tokenizers[1])
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=27)
    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * sizes["hidden_size"],
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    zeroed(transformer, "stream_modulation", "norm_out")
    zeroed(transformer.proj_out, "")
    return Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=flux2_vae(vae),
        text_encoder=Qwen3ForCausalLM(qwen_config(tokenizer, **sizes, **heads)),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )


@functools.cache
def flux2_ids(device) -> tuple:
    txt_ids = Flux2KleinPipeline._prepare_text_ids(torch.empty(1, QWEN_LENGTH, 1))
    img_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 64, 4, 4))
    return txt_ids[0].to(device), img_ids[0].to(device)


def flux2_velocity(pipe, x, s, tokens):
    states = hidden_states(pipe, tokens)
    text = torch.cat([states[layer] for layer in (9, 18, 27)], dim=-1)
    txt_ids, img_ids = flux2_ids(x.device)
    with exact_time(pipe.transformer.time_guidance_embed.time_proj, s):
        return pipe.transformer(
            hidden_states=x,
            timestep=s.to(x.dtype),
            encoder_hidden_states=text,
            txt_ids=txt_ids,
            img_ids=img_ids,
        ).sample


# ---------------------------------------------------------------------------------------- Z-Image
def make_zimage(vae, tokenizers: tuple) -> ZImagePipeline:
    """Z-Image-Turbo's classes: a single stream, in which text and picture share every layer."""
    tokenizer = qwen_tokenizer(tokenizers[1])
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3)  # the last is unread
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=128,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=sizes["hidden_size"],
        axes_dims=[8, 12, 12],
        axes_lens=[64, 16, 16],
    )
    zeroed(transformer, "adaLN_modulation", "final_layer.2-1.linear")
    torch.nn.init.normal_(transformer.x_pad_token, std=0.02)
    torch.nn.init.normal_(transformer.cap_pad_token, std=0.02)
    return ZImagePipeline(
        scheduler=scheduler(),
        vae=vae,
        text_encoder=Qwen3Model(qwen_config(tokenizer, **sizes, **heads)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


TOGETHER = 32  # the stock forward pads text and picture to multiples of this


@functools.cache
def places(device, first: int, *size: int) -> torch.Tensor:
    """(TOGETHER, 3) position ids of a grid that begins at `first`; those of padding are 0."""
    grid = torch.cartesian_prod(*[torch.arange(n) for n in size])
    ids = torch.zeros(TOGETHER, 3, dtype=torch.int32)
    ids[: len(grid)] = grid + torch.tensor([first, 0, 0])
    return ids.to(device)


def zimage_velocity(pipe, x, s, tokens):
    """The stock forward goes picture by picture; this is the same for all of them at once."""
    model = pipe.transformer
    text = hidden_states(pipe, tokens)[-2]
    time = model.t_embedder((1 - s) * model.t_scale).type_as(x)
    patches = x.unflatten(2, (16, 4)).transpose(2, 3).flatten(2)  # channels last there
    h = model.all_x_embedder["2-1"](patches)
    h = torch.cat([h, model.x_pad_token.expand(len(x), TOGETHER - 16, -1)], dim=1)

    def turns(*grid):
        return model.rope_embedder(places(x.device, *grid)).expand(len(x), -1, -1)

    of_picture = turns(TOGETHER + 1, 1, 4, 4)
    of_text = turns(1, TOGETHER, 1, 1)
    for layer in model.noise_refiner:
        h = layer(h, None, of_picture, time)
    is_text = tokens["mask"].bool().unsqueeze(-1)
    c = torch.where(is_text, model.cap_embedder(text), model.cap_pad_token)
    for layer in model.context_refiner:
        c = layer(c, None, of_text)
    h = torch.cat([h, c], dim=1)
    for layer in model.layers:
        h = layer(h, None, torch.cat([of_picture, of_text], dim=1), time)
    v = model.all_final_layer["2-1"](h, c=time)[:, :16]
    return -v.unflatten(2, (4, 16)).transpose(2, 3).flatten(2)


FLUX_PARTS = ("transformer", "text_encoder", "text_encoder_2")
FAMILIES = dict(
    flux=Family(make_flux, FLUX_PARTS, flux_tokens, flux_velocity),
    flux2=Family(make_flux2, ("transformer", "text_encoder"), chat_tokens, flux2_velocity),
    zimage=Family(make_zimage, ("transformer", "text_encoder"), chat_tokens, zimage_velocity),
)
