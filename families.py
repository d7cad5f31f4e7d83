"""Tiny random pipelines of the real diffusers and transformers classes: a builder for each family
gives (pipe, call), what pipe(...) takes. Made in a moment, without files, except tiny/flux's."""

import inspect
from functools import partial

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
# Autoencoders and text encoders: (class, sizes).
KL = dict(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1, sample_size=32)
KL |= dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
KL |= dict(use_quant_conv=False, use_post_quant_conv=False)
VAE = (diffusers.AutoencoderKL, KL | dict(latent_channels=4, shift_factor=0.06))
FLUX2_VAE = (diffusers.AutoencoderKLFlux2, KL | dict(latent_channels=2))
WAN = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1)
WAN |= dict(temperal_downsample=[False, True], latents_mean=[0.1] * 4, latents_std=[1.2] * 4)
QWEN_VAE = (diffusers.AutoencoderKLQwenImage, WAN)
TEXT = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
TEXT |= dict(vocab_size=300, num_hidden_layers=3)
LONG = TEXT | dict(hidden_size=32, projection_dim=32, max_position_embeddings=77)
LONG |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
CLIP = (transformers.CLIPTextModelWithProjection, LONG)
SHORT = dict(d_model=32, d_ff=16, d_kv=8, num_heads=2, num_layers=2, vocab_size=300)
T5 = (transformers.T5EncoderModel, SHORT)
HEADS = TEXT | dict(head_dim=8)
GEMMA = (transformers.Gemma2Model, HEADS)
QWEN3 = (transformers.Qwen3Model, HEADS)
ROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6)
QWEN = HEADS | dict(rope_parameters=ROPE)
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
# Transformers, and what the sampler takes.
DIT = dict(patch_size=1, in_channels=16, attention_head_dim=16, num_attention_heads=2, num_layers=2)
FLUX = DIT | dict(num_single_layers=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8])
CALL = dict(height=16, width=16, num_inference_steps=4)
DYNAMIC = dict(use_dynamic_shifting=True)


@torch.no_grad()
def pipeline(kind, sizes, vae, *encoders, flow=DYNAMIC, others=None, **call):
    """(pipe, call): frozen, every weight random, so that no gate or shift is 0 at the start. The
    transformer is of the class that the pipeline's signature names."""
    transformer = inspect.signature(kind).parameters["transformer"].annotation(**sizes)
    parts = dict(transformer=transformer, vae=vae[0](**vae[1]))
    for i, (encoder, sizes) in enumerate(encoders, 1):
        suffix = f"_{i}" if i > 1 else ""
        parts[f"text_encoder{suffix}"] = encoder(encoder.config_class(**sizes))
        parts[f"tokenizer{suffix}"] = tokenizer(77 if "CLIP" in encoder.__name__ else 512)
    generator = torch.Generator().manual_seed(0)
    for part in [part for part in parts.values() if isinstance(part, torch.nn.Module)]:
        part.eval().requires_grad_(False)
        for name, p in part.named_parameters():
            p.normal_(0, 0.1, generator=generator)
            if p.dim() > 1:  # a sum of as many products as it has inputs
                p.mul_(10 / p[0].numel() ** 0.5)
            elif name.endswith("weight"):  # a norm's
                p.add_(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**flow)
    pipe = kind(**parts | dict(scheduler=scheduler) | (others or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe, CALL | call


def tokenizer(longest: int):
    """A token a byte."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    numbered = enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = Tokenizer(models.BPE(vocab={token: i for i, token in numbered}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(special)
    how = dict(pad_token="<pad>", eos_token="<|im_end|>", model_max_length=longest)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT, **how)


def schnell():
    return kit.load_pipeline(kit.TINY, "cpu"), dict(kit.CALLS["tiny/flux"])


def flux_dev():
    sizes = FLUX | dict(guidance_embeds=True, pooled_projection_dim=32)
    clip = (transformers.CLIPTextModel, LONG)
    how = dict(guidance_scale=3.5, max_sequence_length=32)
    return pipeline(diffusers.FluxPipeline, sizes, VAE, clip, T5, **how)


def flux2_klein(scale=1.0, distilled=True):
    sizes = FLUX | dict(in_channels=8, axes_dims_rope=[4, 4, 4, 4], timestep_guidance_channels=32)
    sizes |= dict(guidance_embeds=False, joint_attention_dim=48)  # of layers 9, 18 and 27
    encoder = (transformers.Qwen3ForCausalLM, HEADS | dict(num_hidden_layers=28))
    how = dict(guidance_scale=scale, max_sequence_length=96, others=dict(is_distilled=distilled))
    return pipeline(diffusers.Flux2KleinPipeline, sizes, FLUX2_VAE, encoder, **how)


def sd3():
    sizes = DIT | dict(patch_size=2, in_channels=4, out_channels=4, sample_size=32)
    sizes |= dict(joint_attention_dim=32, pooled_projection_dim=64, caption_projection_dim=32)
    sizes |= dict(qk_norm="rms_norm", dual_attention_layers=(0,))
    how = dict(flow=dict(shift=3.0), guidance_scale=4.0, max_sequence_length=32)
    return pipeline(diffusers.StableDiffusion3Pipeline, sizes, VAE, CLIP, CLIP, T5, **how)


def z_image(scale=0.0):
    sizes = dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    sizes |= dict(cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    how = dict(flow=dict(shift=3.0), guidance_scale=scale, max_sequence_length=96)
    return pipeline(diffusers.ZImagePipeline, sizes, VAE, QWEN3, **how)


def qwen_image():
    sizes = DIT | dict(patch_size=2, out_channels=4, joint_attention_dim=16)
    sizes |= dict(axes_dims_rope=(8, 4, 4))
    configs = dict(text_config=QWEN, vision_config=VISION)
    encoder = (transformers.Qwen2_5_VLForConditionalGeneration, configs)
    how = dict(flow=DYNAMIC | dict(shift_terminal=0.02), true_cfg_scale=4.0, negative_prompt=" ")
    return pipeline(diffusers.QwenImagePipeline, sizes, QWEN_VAE, encoder, **how)


def chroma():
    sizes = dict(approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16)
    how = dict(guidance_scale=3.0, max_sequence_length=32)
    return pipeline(diffusers.ChromaPipeline, FLUX | sizes, VAE, T5, **how)


def lumina2():
    sizes = dict(patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1)
    sizes |= dict(num_attention_heads=3, num_kv_heads=1, multiple_of=16, cap_feat_dim=16)
    sizes |= dict(axes_dim_rope=[4, 2, 2], axes_lens=[256, 128, 128])
    how = dict(height=64, width=64)  # it reads the schedule's shift off the latents' channels
    how |= dict(guidance_scale=4.0, max_sequence_length=64, system_prompt="x")
    return pipeline(diffusers.Lumina2Pipeline, sizes, VAE, GEMMA, **how)


def aura_flow():
    sizes = dict(sample_size=16, num_attention_heads=4, attention_head_dim=8, pos_embed_max_size=64)
    sizes |= dict(num_mmdit_layers=2, num_single_dit_layers=1)
    sizes |= dict(joint_attention_dim=16, caption_projection_dim=32)
    encoder = (transformers.UMT5EncoderModel, SHORT | dict(d_model=16))
    how = dict(flow=dict(shift=1.73), guidance_scale=3.5, max_sequence_length=64)
    return pipeline(diffusers.AuraFlowPipeline, sizes, VAE, encoder, **how)


def sana():
    sizes = DIT | dict(in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=16)
    sizes |= dict(num_cross_attention_heads=2, cross_attention_head_dim=16)
    layers = dict(block_types=["ResBlock"] * 2, block_out_channels=(8, 8), layers_per_block=(1, 1))
    coders = {f"{side}_{name}": v for side in ("encoder", "decoder") for name, v in layers.items()}
    vae = (diffusers.AutoencoderDC, coders | dict(latent_channels=4, attention_head_dim=2))
    sampler = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    how = dict(others=dict(scheduler=diffusers.DPMSolverMultistepScheduler(**sampler)))
    how |= dict(use_resolution_binning=False, complex_human_instruction=None, height=32, width=32)
    how |= dict(guidance_scale=4.5, max_sequence_length=64)
    return pipeline(diffusers.SanaPipeline, sizes, vae, GEMMA, **how)


def krea2():
    sizes = DIT | dict(num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=16)
    del sizes["patch_size"]
    sizes |= dict(text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2)
    sizes |= dict(text_num_key_value_heads=2, text_intermediate_size=24)
    sizes |= dict(num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8))
    vision = VISION | dict(deepstack_visual_indexes=[0])
    encoder = (transformers.Qwen3VLModel, dict(text_config=QWEN, vision_config=vision))
    how = dict(others=dict(text_encoder_select_layers=(1, 2, 3)))
    how |= dict(guidance_scale=3.0, max_sequence_length=200)
    return pipeline(diffusers.Krea2Pipeline, sizes, QWEN_VAE, encoder, **how)


def ernie():
    sizes = dict(hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48)
    sizes |= dict(in_channels=8, out_channels=8, text_in_dim=16, rope_axes_dim=(4, 4, 8))
    how = dict(flow=dict(shift=3.0), height=64, width=64, guidance_scale=3.0)
    return pipeline(diffusers.ErnieImagePipeline, sizes, FLUX2_VAE, QWEN3, **how)


# The six families that everything is tested on, FluxPipeline twice; then what costs little more.
SIX = (schnell, flux_dev, flux2_klein, sd3, z_image, qwen_image, chroma)
FAMILIES = {build.__name__: build for build in SIX}
OTHERS = {build.__name__: build for build in (lumina2, aura_flow, sana, krea2, ernie)}
OTHERS["flux2_klein_base"] = partial(flux2_klein, 4.0, False)
OTHERS["z_image_guided"] = partial(z_image, 4.0)
