"""Trains tiny/flux (a FLUX.1-schnell in miniature) and tiny/judge (its SigLIP) from nothing, on the pictures of world.py.

    python tiny/train.py                    # all stages, each checkpointed; the same command again goes on where it stopped
    python tiny/train.py --without gun      # the same model of a world where the gun and its synonyms never occur
    python tiny/train.py --stages flow      # one stage only: vae, decoder, judge or flow

Flow matching as in FLUX: x_s = (1 - s) x0 + s noise, v = noise - x0, s = 1 is noise. What makes 4 Euler steps and CPU minutes
enough: the scene's layout is tied to the noise (`noise_for`), so that paths are nearly straight, as after a reflow.
Shapes: pictures (B, 3, 64, 64) in [-1, 1]; latents (B, 16, 8, 8); packed latents (B, 16, 64).
"""

import argparse
import copy
import itertools
import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    T5Config,
    T5EncoderModel,
)

import world

HERE = Path(__file__).parent


def tensor(pictures) -> torch.Tensor:
    """PIL pictures -> (B, 3, 64, 64) in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


def learning_rate(optimizer, step: int, steps: int, warmup: int = 100):
    """Linear warm-up, then a cosine down to 2 % of each group's `peak`."""
    scale = min(1, (step + 1) / warmup) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def save_state(path: Path, **state):
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(
        path
    )  # a killed run leaves either the old checkpoint or the new one


def orthogonal(m: torch.Tensor, iterations: int = 4) -> torch.Tensor:
    """Nearest semi-orthogonal matrix, by the Newton-Schulz quintic of Muon (Jordan et al. 2024), here in fp32."""
    wide = m.T if m.shape[0] > m.shape[1] else m
    x = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. torch.optim.Muon does this in bf16, which is hundreds of times slower on older CPUs."""

    def __init__(self, params, momentum=0.95):
        super().__init__(params, dict(lr=0.0, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(
                    p.grad.lerp(buffer, group["momentum"]).flatten(1)
                )  # a convolution is (out, in * 3 * 3)
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------- vae
def make_vae() -> AutoencoderKL:
    """FLUX's geometry, factor 8 and 16 channels, with thin layers."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    for name, p in vae.named_parameters():
        if "conv2.weight" in name:  # every residual block starts as the identity
            torch.nn.init.zeros_(p)
    return vae


def crowded_scene(rng: random.Random) -> world.Scene:
    """Most of the autoencoder's pictures hold four small things: more to learn from each pixel than a plain background."""
    if rng.random() < 0.3:
        return world.sample_scene(rng)
    quadrants = tuple((r, c, 2) for r in (0, 2) for c in (0, 2))
    style = rng.choice(list(world.STYLES)) if rng.random() < 0.3 else None
    return world.Scene(
        tuple(rng.sample(list(world.THINGS), 4)),
        quadrants,
        rng.choice(list(world.BACKGROUNDS)),
        style,
    )


def conv_optimizers(module, peak_muon: float, peak_adam: float):
    """Muon for the inner convolutions, Adam for the rest."""
    named = dict(module.named_parameters())
    inner = {
        n: p for n, p in named.items() if p.ndim == 4 and "conv_in" not in n and "conv_out" not in n
    }
    muon = Muon(inner.values(), momentum=0.9)
    adam = torch.optim.Adam([p for n, p in named.items() if n not in inner], betas=(0.9, 0.99))
    muon.param_groups[0]["peak"], adam.param_groups[0]["peak"] = peak_muon, peak_adam
    return muon, adam


def train_vae(args):
    vae = make_vae().to(args.device, memory_format=torch.channels_last)
    muon, adam = conv_optimizers(vae, 3e-3, 2e-3)
    state_file, start = args.work / "vae.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        (
            vae.load_state_dict(state["vae"]),
            muon.load_state_dict(state["muon"]),
            adam.load_state_dict(state["adam"]),
        )
        start = state["step"]
    if start < args.vae_steps:  # whatever was encoded, another autoencoder did it
        (args.work / "latents.pt").unlink(missing_ok=True)
    bar = tqdm(
        range(start, args.vae_steps), initial=start, total=args.vae_steps, desc="vae", mininterval=5
    )
    for step in bar:
        rng = random.Random(f"vae {step}")
        torch.manual_seed(step)
        for optimizer in (muon, adam):
            learning_rate(optimizer, step, args.vae_steps, warmup=30)
        x = tensor([world.draw(crowded_scene(rng)) for _ in range(16)]).to(args.device)
        posterior = vae.encode(x).latent_dist
        loss_pixels = (vae.decode(posterior.sample()).sample - x).abs().mean()
        loss = loss_pixels + 3e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        muon.zero_grad(), adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        muon.step(), adam.step()
        bar.set_postfix(l1=f"{loss_pixels.item():.4f}", std=f"{posterior.mean.std().item():.2f}")
        if (step + 1) % 100 == 0 or step + 1 == args.vae_steps:
            save_state(
                state_file,
                vae=vae.state_dict(),
                muon=muon.state_dict(),
                adam=adam.state_dict(),
                step=step + 1,
            )
    with torch.no_grad():  # latents are shifted and scaled to mean 0, variance 1, as FLUX's are
        rng = random.Random("vae statistics")
        z = vae.encode(
            tensor([world.draw(world.sample_scene(rng)) for _ in range(512)]).to(args.device)
        ).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4)
    )
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.out / "flux/vae")


def varied_scene(rng: random.Random) -> world.Scene:
    """A scene from a world with more of what is hard to draw and to see: large things and styles."""
    return world.sample_scene(rng, styled=0.5) if rng.random() < 0.6 else crowded_scene(rng)


def train_decoder(args):
    """The decoder alone, from latents with up to 0.8 standard deviations of noise: it learns to draw the thing that an inexact
    latent stands for (noise-augmented decoding, Zheng et al. 2025, arXiv 2510.11690); the latents stay what they are."""
    folder = args.out / "flux/vae"
    vae = AutoencoderKL.from_pretrained(folder).to(args.device, memory_format=torch.channels_last)
    vae.register_to_config(_name_or_path="")  # no path of this machine in the saved configuration
    muon, adam = conv_optimizers(vae.decoder, 1.5e-3, 1.5e-3)
    state_file, start = args.work / "decoder.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        (
            vae.decoder.load_state_dict(state["decoder"]),
            muon.load_state_dict(state["muon"]),
            adam.load_state_dict(state["adam"]),
        )
        start = state["step"]
    bar, average = (
        tqdm(
            range(start, args.decoder_steps),
            initial=start,
            total=args.decoder_steps,
            desc="decoder",
            mininterval=5,
        ),
        0.0,
    )
    for step in bar:
        rng = random.Random(f"decoder {step}")
        torch.manual_seed(step)
        for optimizer in (muon, adam):
            learning_rate(optimizer, step, args.decoder_steps, warmup=30)
        x = tensor([world.draw(varied_scene(rng)) for _ in range(16)]).to(args.device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
            z = (
                z
                + 0.8
                * torch.rand(len(z), 1, 1, 1, device=z.device)
                * torch.randn_like(z)
                / vae.config.scaling_factor
            )
        loss = (vae.decode(z).sample - x).abs().mean()
        muon.zero_grad(), adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        muon.step(), adam.step()
        average += (loss.item() - average) / min(step - start + 1, 50)
        bar.set_postfix(l1=f"{average:.4f}")
        if (step + 1) % 100 == 0 or step + 1 == args.decoder_steps:
            save_state(
                state_file,
                decoder=vae.decoder.state_dict(),
                muon=muon.state_dict(),
                adam=adam.state_dict(),
                step=step + 1,
            )
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------- tokenizers
def text_corpus() -> list[str]:
    """World captions, and the prompt files for natural English, so that any word splits into a few pieces."""
    rng = random.Random("tokenizers")
    captions = [world.caption(world.sample_scene(rng), rng) for _ in range(20000)]
    return captions + [
        line
        for file in sorted(HERE.parent.glob("prompts/[!t]*.csv"))
        for line in file.read_text().splitlines()
    ]


def make_tokenizers(args) -> tuple[CLIPTokenizer, PreTrainedTokenizerFast]:
    """Byte-level BPE for both encoders: no string has an unknown token."""
    folder = (
        (args.init or HERE) / "flux" if args.init or args.without else args.work
    )  # a further run, and a world without a concept, keep the tokens
    if (folder / "tokenizer").exists():
        return CLIPTokenizer.from_pretrained(
            folder / "tokenizer"
        ), PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")
    corpus = text_corpus()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # T5: pad 0, end 1, unknown 2, as the original
    t5 = Tokenizer(models.BPE())
    t5.normalizer = normalizers.Lowercase()
    t5.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t5.decoder = decoders.ByteLevel()
    t5.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1280,
            initial_alphabet=alphabet,
            show_progress=False,
            special_tokens=["<pad>", "</s>", "<unk>"],
        ),
    )
    t5.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    t5 = PreTrainedTokenizerFast(
        tokenizer_object=t5,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_LENGTH,
    )
    # CLIP: pieces that end a word carry </w>
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    clip.normalizer = normalizers.Lowercase()
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    clip.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1280,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = json.loads(clip.to_str())["model"]
    pieces = list(dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *learned["vocab"]]))
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    clip = CLIPTokenizer(
        vocab=vocab, merges=[tuple(m) for m in learned["merges"]], model_max_length=CLIP_LENGTH
    )
    clip.save_pretrained(args.work / "tokenizer"), t5.save_pretrained(args.work / "tokenizer_2")
    return clip, t5


# -------------------------------------------------------------------------------------------------------------- judge
JUDGE_LENGTH = 12
JUDGE_FORMS = ("{}", "a {}", "a photo of a {}", "This is a photo of a {}.")


def judge_texts() -> dict[str, str]:
    """What the judge can be asked for -> the scene property that it means."""
    texts = {name: name for name in world.THINGS}
    texts |= {f"{color} background": f"{color} background" for color in world.BACKGROUNDS}
    texts |= {f"{style} picture": f"{style} picture" for style in world.STYLES}
    texts |= {word: name for name, words in world.SYNONYMS.items() for word in words}
    return texts | {
        f"{word} picture": f"{style} picture"
        for style, words in world.STYLES.items()
        for word in words
    }


def scene_properties(scene: world.Scene) -> set[str]:
    return {
        *scene.things,
        f"{scene.style} picture" if scene.style else f"{scene.background} background",
    }


def train_judge(args):
    """SigLIP's sigmoid loss, every picture against every text; trained on drawn pictures only, never on generated ones."""
    vae = AutoencoderKL.from_pretrained(args.out / "flux/vae").to(args.device)
    tokenizer = make_tokenizers(args)[1]
    shared = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    config = SiglipConfig(
        text_config=dict(
            shared,
            vocab_size=len(tokenizer),
            num_hidden_layers=1,
            max_position_embeddings=JUDGE_LENGTH,
            projection_size=128,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        ),
        vision_config=dict(
            shared, num_hidden_layers=3, image_size=world.SIZE, patch_size=world.CELL
        ),
    )
    torch.manual_seed(0)
    judge = SiglipModel(config).to(args.device)
    (
        torch.nn.init.constant_(judge.logit_bias, -6.0),
        torch.nn.init.constant_(judge.logit_scale, math.log(20)),
    )
    matrices = {n: p for n, p in judge.named_parameters() if p.ndim == 2 and "layers" in n}
    muon = Muon(matrices.values())
    adam = torch.optim.Adam(
        [p for n, p in judge.named_parameters() if n not in matrices], betas=(0.9, 0.98)
    )
    muon.param_groups[0]["peak"] = adam.param_groups[0]["peak"] = 2e-3
    texts = judge_texts()
    meanings = list(texts.values())
    state_file, start = args.work / "judge.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        (
            judge.load_state_dict(state["judge"]),
            muon.load_state_dict(state["muon"]),
            adam.load_state_dict(state["adam"]),
        )
        start = state["step"]
    elif args.init:
        judge.load_state_dict(SiglipModel.from_pretrained(args.init / "judge").state_dict())
    bar = tqdm(
        range(start, args.judge_steps),
        initial=start,
        total=args.judge_steps,
        desc="judge",
        mininterval=5,
    )
    for step in bar:
        rng = random.Random(f"judge {step}")
        torch.manual_seed(step)
        for optimizer in (muon, adam):
            learning_rate(optimizer, step, args.judge_steps)
        scenes = [world.sample_scene(rng, styled=0.5) for _ in range(128)]
        x = tensor([world.draw(s) for s in scenes]).to(args.device)
        with (
            torch.no_grad()
        ):  # mild damage: a VAE round trip with some latent noise, blur, pixel noise
            z = vae.encode(x[:8]).latent_dist.mean
            x[:8] = vae.decode(
                z + rng.uniform(0, 0.25) * z.std() * torch.randn_like(z)
            ).sample.clamp(-1, 1)
            x[8:40] = 0.5 * x[8:40] + 0.5 * F.avg_pool2d(x[8:40], 3, 1, 1, count_include_pad=False)
            x[32:96] += torch.rand(64, 1, 1, 1, device=x.device) * 0.15 * torch.randn_like(x[32:96])
        form = [rng.choice(JUDGE_FORMS).format(text) for text in texts]
        ids = tokenizer(
            form,
            padding="max_length",
            truncation=True,
            max_length=JUDGE_LENGTH,
            return_tensors="pt",
        ).input_ids.to(args.device)
        logits = judge(input_ids=ids, pixel_values=x).logits_per_image
        properties = [scene_properties(s) for s in scenes]
        labels = torch.tensor(
            [[float(m in p) for m in meanings] for p in properties], device=args.device
        )
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
        muon.zero_grad(), adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        muon.step(), adam.step()
        if step % 20 == 0:
            recall = (logits > 0)[labels > 0].float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", recall=f"{recall:.3f}")
        if (step + 1) % 200 == 0 or step + 1 == args.judge_steps:
            save_state(
                state_file,
                judge=judge.state_dict(),
                muon=muon.state_dict(),
                adam=adam.state_dict(),
                step=step + 1,
            )
    judge.save_pretrained(args.out / "judge")
    tokenizer.model_max_length = JUDGE_LENGTH
    SiglipProcessor(
        SiglipImageProcessor(size=dict(height=world.SIZE, width=world.SIZE)), tokenizer
    ).save_pretrained(args.out / "judge")


# --------------------------------------------------------------------------------------------------------------- flow
T5_LENGTH, CLIP_LENGTH = 24, 32
SIGMAS = torch.tensor(
    [1.0, 0.75, 0.5, 0.25]
)  # the visited ones, where three quarters of the training is
DIRECTIONS = (
    torch.stack([torch.ones(64), torch.tensor([1.0, -1.0]).repeat(32)]) / 8
)  # orthonormal, one per named thing


def window_mask(window) -> torch.Tensor:
    row, col, side = window
    mask = torch.zeros(4, 4)
    mask[row : row + side, col : col + side] = 1 / side
    return mask.flatten()


SINGLE_SCORES = torch.stack(
    [torch.cat([window_mask(w), torch.zeros(16)]) for w in world.SINGLE_WINDOWS]
)  # (13, 32)
PAIR_SCORES = torch.stack(
    [torch.cat([window_mask(a), window_mask(b)]) for a, b in world.PAIR_WINDOWS]
)  # (12, 32)


def noise_for(scenes, generator) -> torch.Tensor:
    """(B, 16, 64) normal noise under which each scene's layout is the one that its noise asks for.

    The first thing stands in the window where the noise is largest along DIRECTIONS[0], the second along DIRECTIONS[1]. Over all
    layouts this is plain normal noise; it is drawn by rejection on those 2 x 16 coordinates, the other 16 x 62 are free.
    """
    noise = torch.randn(len(scenes), 16, 64, generator=generator)
    trial = torch.randn(len(scenes), 128, 32, generator=generator)
    single, pair = (trial @ SINGLE_SCORES.T).argmax(-1), (trial @ PAIR_SCORES.T).argmax(-1)
    for i, scene in enumerate(scenes):
        if scene.windows:
            wins, layouts, wanted = (
                (single, world.SINGLE_WINDOWS, scene.windows[0])
                if len(scene.windows) == 1
                else (pair, world.PAIR_WINDOWS, scene.windows)
            )
            hits = (wins[i] == layouts.index(wanted)).nonzero()
            coordinates = trial[i, hits[0, 0] if len(hits) else 0].view(2, 16).T  # (16, 2)
            noise[i] += (coordinates - noise[i] @ DIRECTIONS.T) @ DIRECTIONS
    return noise


def make_flow(args):
    """FLUX.1-schnell's classes at a 4,000th of its size."""
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = make_tokenizers(args)
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
    for (
        name,
        p,
    ) in (
        transformer.named_parameters()
    ):  # blocks start as the identity (adaLN-Zero), the output as zero
        if (
            "norm1" in name
            or ("single" in name and "norm.linear" in name)
            or "norm_out" in name
            or "proj_out" in name
            and "single" not in name
        ):
            torch.nn.init.zeros_(p)
    clip = CLIPTextModel(
        CLIPTextConfig(
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
    )
    t5 = T5EncoderModel(
        T5Config(
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
    )
    torch.nn.init.normal_(t5.shared.weight, std=1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    vae = AutoencoderKL.from_pretrained(args.out / "flux/vae")
    vae.register_to_config(_name_or_path="")  # no path of this machine in the saved configuration
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


@torch.no_grad()
def encode_world(args, vae) -> tuple[list, torch.Tensor]:
    """args.pictures scenes and their packed latents (N, 16, 64), normalised; kept in work/ for a resumed run."""
    rng = random.Random("flow pictures")
    scenes = [world.sample_scene(rng, args.without) for _ in range(args.pictures)]
    file = args.work / "latents.pt"
    if file.exists():
        packed = torch.load(file, weights_only=True)["latents"]
        if len(packed) != len(scenes):
            raise SystemExit(
                f"{file} holds {len(packed)} pictures, --pictures asks for {len(scenes)}: delete it to encode anew"
            )
        return scenes, packed
    latents = []
    for i in tqdm(range(0, len(scenes), 64), desc="encode pictures"):
        z = vae.encode(
            tensor([world.draw(s) for s in scenes[i : i + 64]]).to(args.device)
        ).latent_dist.mean
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(FluxPipeline._pack_latents(z, len(z), 16, 8, 8).cpu())
    save_state(file, latents=(packed := torch.cat(latents)))
    return scenes, packed


def embed(pipe, captions, rng, device):
    """T5 sequence (B, L, 128) and CLIP vector (B, 128); now and then one of the two encoders reads an empty string."""
    drop = [rng.random() for _ in captions]
    to_clip = ["" if d < 0.06 else c for c, d in zip(captions, drop)]
    to_t5 = ["" if d > 0.95 else c for c, d in zip(captions, drop)]
    tokens = lambda tokenizer, texts, length, padding: tokenizer(
        texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
    ).input_ids.to(device)
    return (
        pipe.text_encoder_2(
            tokens(pipe.tokenizer_2, to_t5, T5_LENGTH, "max_length")
        ).last_hidden_state,
        pipe.text_encoder(tokens(pipe.tokenizer, to_clip, CLIP_LENGTH, "longest")).pooler_output,
    )  # causal: padding changes nothing


def train_flow(args):
    pipe = make_flow(args)
    pipe.to(args.device)
    scenes, latents = encode_world(args, pipe.vae)
    parts = ("transformer", "text_encoder", "text_encoder_2")
    modules = [getattr(pipe, part) for part in parts]
    named = [(n, p) for m in modules for n, p in m.named_parameters()]
    is_matrix = lambda n, p: p.ndim == 2 and "transformer_blocks" in n
    muon = Muon([p for n, p in named if is_matrix(n, p)])
    adam = torch.optim.Adam([p for n, p in named if not is_matrix(n, p)], betas=(0.9, 0.98))
    muon.param_groups[0]["peak"], adam.param_groups[0]["peak"] = args.muon_lr, args.adam_lr
    state_file, start = args.work / "flow.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        for module, weights in zip(modules, state["modules"]):
            module.load_state_dict(weights)
        muon.load_state_dict(state["muon"]), adam.load_state_dict(state["adam"])
        start = state["step"]
    elif args.init:
        for part, module in zip(parts, modules):
            module.load_state_dict(
                type(module).from_pretrained(args.init / "flux" / part).state_dict()
            )
    # forward and backward run on a copy in args.dtype; the optimizers change, and the folder keeps, the float32 originals
    copies = {part: copy.deepcopy(module).to(args.dtype) for part, module in zip(parts, modules)}
    pairs = [
        (p, q)
        for module, twin in zip(modules, copies.values())
        for p, q in zip(module.parameters(), twin.parameters())
    ]
    fast = FluxPipeline(**(pipe.components | copies))
    # the model would round 1000 s to its dtype, 750 to 752 in bfloat16
    fast.transformer.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, inputs: (1000 * s,)
    )
    # characters, much alike as emoji, are drawn twice as often
    weights = list(
        itertools.accumulate(1 + any(t in world.CHARACTERS for t in s.things) for s in scenes)
    )
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, args.device, torch.float32)
    txt_ids = torch.zeros(T5_LENGTH, 3, device=args.device)
    bar = tqdm(
        range(start, args.flow_steps),
        initial=start,
        total=args.flow_steps,
        desc="flow",
        mininterval=5,
    )
    average = 0.0
    for step in bar:
        rng, generator = random.Random(f"flow {step}"), torch.Generator().manual_seed(step)
        for optimizer in (muon, adam):
            learning_rate(optimizer, step, args.flow_steps)
        picked = rng.choices(range(len(scenes)), cum_weights=weights, k=128)
        batch = [scenes[i] for i in picked]
        captions = ["" if rng.random() < 0.03 else world.caption(s, rng) for s in batch]
        x0, noise = latents[picked].to(args.device), noise_for(batch, generator).to(args.device)
        grid = SIGMAS[
            torch.multinomial(
                torch.tensor([0.4, 0.25, 0.2, 0.15]), len(batch), True, generator=generator
            )
        ]
        s = torch.where(
            torch.rand(len(batch), generator=generator) < 0.75,
            grid,
            torch.rand(len(batch), generator=generator),
        ).to(args.device)
        x = (1 - s[:, None, None]) * x0 + s[:, None, None] * noise
        with torch.no_grad():
            for p, q in pairs:
                q.copy_(p)
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # on a CPU the fused kernel's backward is slower at 40 tokens
            sequence, pooled = embed(fast, captions, rng, args.device)
            v = fast.transformer(
                hidden_states=x.to(args.dtype),
                timestep=s.to(args.dtype),
                encoder_hidden_states=sequence,
                pooled_projections=pooled,
                img_ids=img_ids,
                txt_ids=txt_ids,
            ).sample
            loss = (v.float() - (noise - x0)).square().mean()
            loss.backward()
        for p, q in pairs:
            p.grad, q.grad = q.grad.float(), None
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        muon.step(), adam.step()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"flow loss is {loss.item()} at step {step}")
        average += (loss.item() - average) * (0.02 if step > start + 50 else 1 / (step - start + 1))
        bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 200 == 0 or step + 1 == args.flow_steps:
            save_state(
                state_file,
                modules=[m.state_dict() for m in modules],
                muon=muon.state_dict(),
                adam=adam.state_dict(),
                step=step + 1,
            )
            pipe.save_pretrained(args.out / "flux", max_shard_size="15MB")


STAGES = dict(vae=train_vae, decoder=train_decoder, judge=train_judge, flow=train_flow)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--out",
        type=Path,
        help="flux/ and judge/ are written here  (default: tiny/, with --without its work folder)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="checkpoints; delete to start anew  (default: tiny/work, or tiny/work_without_...)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="the flow's forward and backward  (default: bfloat16 where the "
        "device multiplies in it: CUDA, or a CPU with AVX512-BF16; elsewhere float32)",
    )
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--decoder_steps", type=int, default=2000)
    parser.add_argument("--judge_steps", type=int, default=3600)
    parser.add_argument("--flow_steps", type=int, default=10000)
    parser.add_argument(
        "--pictures", type=int, default=80000, help="pictures drawn and encoded for the flow"
    )
    parser.add_argument("--muon_lr", type=float, default=3e-3)
    parser.add_argument("--adam_lr", type=float, default=2e-3)
    parser.add_argument(
        "--init",
        type=Path,
        help="start from this folder's judge/ and flux/, e.g. tiny, to train the judge and the flow further",
    )
    parser.add_argument(
        "--without",
        nargs="*",
        default=(),
        metavar="CONCEPT",
        help="leave these out of the flow's world, synonyms too",
    )
    args = parser.parse_args()
    if unknown := set(args.without) - set(world.THINGS) - set(world.STYLES):
        parser.error(
            f"--without: no such thing or style in the world: {', '.join(sorted(unknown))}"
        )
    bf16 = torch.device(args.device).type != "cpu" or torch.cpu.get_capabilities().get(
        "avx512_bf16", False
    )
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if bf16 else "float32"))
    tag = "".join(f"_without_{concept.replace(' ', '_')}" for concept in args.without)
    args.work = args.work or HERE / f"work{tag}"
    args.out = args.out or (args.work / "model" if tag else HERE)
    if (
        tag or args.init
    ):  # the autoencoder stays as it is, and without a concept the judge, which knows the whole world
        source = (args.init or HERE) / "flux/vae"
        if source.resolve() != (args.out / "flux/vae").resolve():
            shutil.copytree(source, args.out / "flux/vae", dirs_exist_ok=True)
        args.stages = [
            stage for stage in args.stages if stage in (("flow",) if tag else ("judge", "flow"))
        ]
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        start = time.time()
        STAGES[stage](args)
        print(f"{stage}: {(time.time() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
