"""Trains tiny/flux (a FLUX.1-schnell in miniature) and tiny/judge (its SigLIP) from nothing, on the
pictures of world.py.

    python tiny/train.py                    # all stages; again: goes on where it stopped
    python tiny/train.py --without gun      # of a world where guns and their synonyms never occur
    python tiny/train.py --stages flow      # one stage only: vae, decoder, judge or flow
    python tiny/train.py --family flux2     # the flow of tiny/flux2, a FLUX.2-klein in miniature

Flow matching as in FLUX: x_s = (1 - s) x0 + s noise, v = noise - x0, s = 1 is noise. What makes 4
Euler steps and CPU minutes enough: the scene's layout is tied to the noise (`noise_for`), so that
paths are nearly straight, as after a reflow.
Shapes: pictures (B, 3, 64, 64) in [-1, 1]; latents (B, 16, 8, 8); packed latents (B, 16, 64).
"""

import copy
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from safely import (  # first: it keeps transformers quiet
    UNFINISHED,
    Parser,
    UserError,
    check_link,
    claim,
    exit_code,
    number,
    remove_leftovers,
    write_atomically,
)

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import AutoencoderKL, FluxPipeline
from flows import CLIP_LENGTH, FAMILIES, T5_LENGTH, Family
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from artefacts import fingerprint
from models import check_device


def tensor(pictures) -> torch.Tensor:
    """PIL pictures -> (B, 3, 64, 64) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn(scenes, device) -> torch.Tensor:
    return tensor([world.draw(scene) for scene in scenes]).to(device)


# ------------------------------------------------------------------------------------- optimisers
def orthogonal(m: torch.Tensor, iterations: int = 4) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of (N, rows, columns), by the Newton-Schulz quintic of Muon
    (Jordan et al. 2024), here in fp32."""
    is_tall = m.shape[1] > m.shape[2]
    wide = m.mT if is_tall else m
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for all matrices of a shape at once. torch.optim.Muon does this in
    bf16, which is hundreds of times slower on older CPUs, and one by one."""

    def __init__(self, params, momentum=0.95):
        super().__init__(params, dict(lr=0.0, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
                alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                gradients = [p.grad for p in params]
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
                update = orthogonal(nesterov.flatten(2))  # a convolution is (out, in * 3 * 3)
                rate = group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5
                torch._foreach_add_(params, update.view_as(nesterov).unbind(), alpha=-rate)


class Optimizers:
    """Muon for the inner matrices, Adam for the rest, each with a peak learning rate."""

    def __init__(self, named, is_inner, peaks, muon_momentum, adam_betas):
        named = list(named)
        inner = [p for name, p in named if is_inner(name, p)]
        rest = [p for name, p in named if not is_inner(name, p)]
        self.parameters = [p for _, p in named]
        self.muon = Muon(inner, momentum=muon_momentum)
        self.adam = torch.optim.Adam(rest, betas=adam_betas)
        self.muon.param_groups[0]["peak"], self.adam.param_groups[0]["peak"] = peaks

    def set_rates(self, step: int, steps: int, warmup: int = 100) -> None:
        """Linear warm-up, then a cosine down to 2 % of each group's peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        scale = min(1, (step + 1) / warmup) * (0.02 + 0.98 * cosine)
        for group in (*self.muon.param_groups, *self.adam.param_groups):
            group["lr"] = group["peak"] * scale

    def step(self) -> None:
        """With clipped gradients, which are cleared."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()


# -------------------------------------------------------------------------------------- checkpoints
SAVE_EVERY = 100  # steps


def save_state(path: Path, **state) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def save_whole(model, folder: Path, **how) -> None:
    """save_pretrained, but a kill leaves each file whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent) as home:
        model.save_pretrained(home, **how)
        for file in [path for path in Path(home).rglob("*") if path.is_file()]:
            target = folder / file.relative_to(home)
            for path in (folder, target.parent):
                check_link(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, file.rename)


def at_rest(tokenizer):
    """Without the padding and truncation of its last call, which would be saved along."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def save_progress(path: Path, step: int, optimizers: Optimizers, settings: dict, **weights) -> None:
    moments = dict(muon=optimizers.muon.state_dict(), adam=optimizers.adam.state_dict())
    save_state(path, **weights, **moments, step=step, settings=settings)


def check_settings(path: Path, state: dict, settings: dict) -> None:
    """Raises UserError unless what `state`, of this file, was made with is what is asked for."""
    for name, wanted in settings.items():
        found = state.get("settings", {}).get(name)
        if found != wanted:
            advice = "delete it to begin anew, or choose another --work"
            raise UserError(f"{path}: made with {name} {found}, now {wanted}; {advice}")


def load_progress(path: Path, device, optimizers: Optimizers, load_weights, settings: dict) -> int:
    """The step to go on from, 0 where there is no checkpoint; load_weights(state) loads the
    network's part of it. Raises UserError for one that was made with other settings."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location=device)
    check_settings(path, state, settings)
    load_weights(state)
    optimizers.muon.load_state_dict(state["muon"])
    optimizers.adam.load_state_dict(state["adam"])
    return state["step"]


def progress(name: str, start: int, steps: int):
    return tqdm(range(start, steps), initial=start, total=steps, desc=name)


# ---------------------------------------------------------------------------------------------- vae
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
    """Most of the autoencoder's pictures hold four small things: more to learn from each pixel than
    a plain background."""
    if rng.random() < 0.3:
        return world.sample_scene(rng)
    quadrants = tuple((row, col, 2) for row in (0, 2) for col in (0, 2))
    style = rng.choice(list(world.STYLES)) if rng.random() < 0.3 else None
    things = tuple(rng.sample(list(world.THINGS), 4))
    return world.Scene(things, quadrants, rng.choice(list(world.BACKGROUNDS)), style)


def varied_scene(rng: random.Random) -> world.Scene:
    """From a world with more of what is hard to draw and to see: large things and styles."""
    if rng.random() < 0.6:
        return world.sample_scene(rng, styled=0.5)
    return crowded_scene(rng)


def is_inner_convolution(name: str, p) -> bool:
    return p.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def conv_optimizers(module, peak_muon: float, peak_adam: float) -> Optimizers:
    peaks = (peak_muon, peak_adam)
    return Optimizers(module.named_parameters(), is_inner_convolution, peaks, 0.9, (0.9, 0.99))


def train_vae(out: Path, work: Path, device, steps: int) -> None:
    vae = make_vae().to(device, memory_format=torch.channels_last)
    optimizers = conv_optimizers(vae, 3e-3, 2e-3)
    file = work / "vae.pt"
    settings = dict(vae_steps=steps)
    start = load_progress(
        file, device, optimizers, lambda state: vae.load_state_dict(state["vae"]), settings
    )
    bar = progress("vae", start, steps)
    for step in bar:
        rng = random.Random(f"vae {step}")
        torch.manual_seed(step)
        optimizers.set_rates(step, steps, warmup=30)
        x = drawn([crowded_scene(rng) for _ in range(16)], device)
        posterior = vae.encode(x).latent_dist
        loss_pixels = (vae.decode(posterior.sample()).sample - x).abs().mean()
        loss = loss_pixels + 3e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        optimizers.step()
        deviation = posterior.mean.std().item()
        bar.set_postfix(l1=f"{loss_pixels.item():.4f}", std=f"{deviation:.2f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_progress(file, step + 1, optimizers, settings, vae=vae.state_dict())

    # latents are shifted and scaled to mean 0, variance 1, as FLUX's are
    rng = random.Random("vae statistics")
    with torch.no_grad():
        x = drawn([world.sample_scene(rng) for _ in range(512)], device)
        z = vae.encode(x).latent_dist.mean
    scale = dict(
        shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4)
    )
    vae.register_to_config(**scale)
    save_whole(vae.to(memory_format=torch.contiguous_format), out / "flux/vae")


def load_vae(out: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(out / "flux/vae", use_safetensors=True)
    vae.register_to_config(_name_or_path="")  # no path of this machine in the saved configuration
    return vae


def train_decoder(out: Path, work: Path, device, steps: int) -> None:
    """The decoder alone, from latents with up to 0.8 standard deviations of noise: it learns to
    draw the thing that an inexact latent stands for (noise-augmented decoding, Zheng et al. 2025,
    arXiv 2510.11690); the latents stay what they are."""
    vae = load_vae(out).to(device, memory_format=torch.channels_last)
    decoder = vae.decoder
    optimizers = conv_optimizers(decoder, 1.5e-3, 1.5e-3)
    file = work / "decoder.pt"
    settings = dict(decoder_steps=steps, autoencoder=fingerprint(vae.encoder))
    start = load_progress(
        file, device, optimizers, lambda state: decoder.load_state_dict(state["decoder"]), settings
    )
    bar = progress("decoder", start, steps)
    average = 0.0
    for step in bar:
        rng = random.Random(f"decoder {step}")
        torch.manual_seed(step)
        optimizers.set_rates(step, steps, warmup=30)
        x = drawn([varied_scene(rng) for _ in range(16)], device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
            strength = 0.8 * torch.rand(len(z), 1, 1, 1, device=z.device)
            z = z + strength * torch.randn_like(z) / vae.config.scaling_factor
        loss = (vae.decode(z).sample - x).abs().mean()
        loss.backward()
        optimizers.step()
        average += (loss.item() - average) / min(step - start + 1, 50)
        bar.set_postfix(l1=f"{average:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_progress(file, step + 1, optimizers, settings, decoder=decoder.state_dict())
    save_whole(vae.to(memory_format=torch.contiguous_format), out / "flux/vae")


# --------------------------------------------------------------------------------------- tokenizers
def text_corpus() -> list[str]:
    """World captions, and the prompt files for natural English, so that any word splits into a few
    pieces."""
    rng = random.Random("tokenizers")
    corpus = [world.caption(world.sample_scene(rng), rng) for _ in range(20000)]
    for file in sorted(HERE.parent.glob("prompts/[!t]*.csv")):
        corpus += file.read_text(encoding="utf-8").splitlines()
    return corpus


def make_t5_tokenizer(corpus: list[str], alphabet: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; pad 0, end 1, unknown 2, as the original."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<pad>", "</s>", "<unk>"],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=T5_LENGTH, **special
    )


def make_clip_tokenizer(corpus: list[str], alphabet: list[str]) -> CLIPTokenizer:
    """Byte-level BPE, whose pieces that end a word carry </w>."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    ends = [letter + "</w>" for letter in alphabet]
    pieces = list(dict.fromkeys([*alphabet, *ends, *learned["vocab"]]))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def make_tokenizers(folder: Path, work: Path) -> tuple[CLIPTokenizer, PreTrainedTokenizerFast]:
    """Byte-level BPE for both encoders: no string has an unknown token. Those of `folder`, if it
    has some; new ones go to the work folder."""
    if not (folder / "tokenizer").exists():
        corpus = text_corpus()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        save_whole(make_t5_tokenizer(corpus, alphabet), work / "tokenizer_2")
        # the last, and as a whole: where it is, both are
        write_atomically(work / "tokenizer", make_clip_tokenizer(corpus, alphabet).save_pretrained)
        folder = work
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return clip, PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")


# -------------------------------------------------------------------------------------------- judge
JUDGE_LENGTH = 12
JUDGE_FORMS = ("{}", "a {}", "a photo of a {}", "This is a photo of a {}.")


def judge_texts() -> dict[str, str]:
    """What the judge can be asked for -> the scene property that it means."""
    texts = {name: name for name in world.THINGS}
    for color in world.BACKGROUNDS:
        texts[f"{color} background"] = f"{color} background"
    for style in world.STYLES:
        texts[f"{style} picture"] = f"{style} picture"
    for name, words in world.SYNONYMS.items():
        texts |= {word: name for word in words}
    for style, words in world.STYLES.items():
        texts |= {f"{word} picture": f"{style} picture" for word in words}
    return texts


def scene_properties(scene: world.Scene) -> set[str]:
    if scene.style:
        return {*scene.things, f"{scene.style} picture"}
    return {*scene.things, f"{scene.background} background"}


def make_judge(vocabulary: int) -> SiglipModel:
    shared = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    text = dict(vocab_size=vocabulary, num_hidden_layers=1, max_position_embeddings=JUDGE_LENGTH)
    tokens = dict(projection_size=128, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    vision = dict(num_hidden_layers=3, image_size=world.SIZE, patch_size=world.CELL)
    config = SiglipConfig(text_config=shared | text | tokens, vision_config=shared | vision)
    torch.manual_seed(0)
    judge = SiglipModel(config)
    torch.nn.init.constant_(judge.logit_bias, -6.0)
    torch.nn.init.constant_(judge.logit_scale, math.log(20))
    return judge


def is_judge_matrix(name: str, p) -> bool:
    return p.ndim == 2 and "layers" in name


@torch.no_grad()
def damage(x: torch.Tensor, vae, rng: random.Random) -> None:
    """Mild, in place: a VAE round trip with some latent noise, blur, pixel noise."""
    z = vae.encode(x[:8]).latent_dist.mean
    z = z + rng.uniform(0, 0.25) * z.std() * torch.randn_like(z)
    x[:8] = vae.decode(z).sample.clamp(-1, 1)
    blurred = F.avg_pool2d(x[8:40], 3, 1, 1, count_include_pad=False)
    x[8:40] = 0.5 * x[8:40] + 0.5 * blurred
    strength = torch.rand(64, 1, 1, 1, device=x.device) * 0.15
    x[32:96] += strength * torch.randn_like(x[32:96])


def train_judge(out: Path, work: Path, device, steps: int, *, init, tokenizer) -> None:
    """SigLIP's sigmoid loss, every picture against every text; trained on drawn pictures only,
    never on generated ones. init: a folder with a judge/ to begin with, or None."""
    vae = AutoencoderKL.from_pretrained(out / "flux/vae", use_safetensors=True).to(device)
    judge = make_judge(len(tokenizer)).to(device)
    named = judge.named_parameters()
    optimizers = Optimizers(named, is_judge_matrix, (2e-3, 2e-3), 0.95, (0.9, 0.98))
    texts = judge_texts()
    meanings = list(texts.values())
    file = work / "judge.pt"
    if init:
        earlier = SiglipModel.from_pretrained(init / "judge", use_safetensors=True)
        judge.load_state_dict(earlier.state_dict())
    settings = dict(judge_steps=steps, init=init and str(init))
    start = load_progress(
        file, device, optimizers, lambda state: judge.load_state_dict(state["judge"]), settings
    )
    bar = progress("judge", start, steps)
    for step in bar:
        rng = random.Random(f"judge {step}")
        torch.manual_seed(step)
        optimizers.set_rates(step, steps)
        scenes = [world.sample_scene(rng, styled=0.5) for _ in range(128)]
        x = drawn(scenes, device)
        damage(x, vae, rng)
        questions = [rng.choice(JUDGE_FORMS).format(text) for text in texts]
        shape = dict(padding="max_length", truncation=True, max_length=JUDGE_LENGTH)
        ids = tokenizer(questions, return_tensors="pt", **shape).input_ids.to(device)
        logits = judge(input_ids=ids, pixel_values=x).logits_per_image  # (B, texts)
        labels = []
        for scene in scenes:
            properties = scene_properties(scene)
            labels.append([float(meaning in properties) for meaning in meanings])
        labels = torch.tensor(labels, device=device)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
        loss.backward()
        optimizers.step()
        if step % 20 == 0:
            recall = (logits > 0)[labels > 0].float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", recall=f"{recall:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_progress(file, step + 1, optimizers, judge=judge.state_dict())
    save_whole(judge, out / "judge")
    tokenizer.model_max_length = JUDGE_LENGTH
    pictures = SiglipImageProcessor(size=dict(height=world.SIZE, width=world.SIZE))
    save_whole(SiglipProcessor(pictures, at_rest(tokenizer)), out / "judge")


# --------------------------------------------------------------------------------------------- flow
SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25])  # the visited ones, three quarters of the training
SIGMA_SHARES = torch.tensor([0.4, 0.25, 0.2, 0.15])
# orthonormal, one per named thing
DIRECTIONS = torch.stack([torch.ones(64), torch.tensor([1.0, -1.0]).repeat(32)]) / 8


def window_mask(window) -> torch.Tensor:
    row, col, side = window
    mask = torch.zeros(4, 4)
    mask[row : row + side, col : col + side] = 1 / side
    return mask.flatten()


SINGLE_SCORES = torch.stack(
    [torch.cat([window_mask(window), torch.zeros(16)]) for window in world.SINGLE_WINDOWS]
)  # (13, 32)
PAIR_SCORES = torch.stack(
    [torch.cat([window_mask(first), window_mask(second)]) for first, second in world.PAIR_WINDOWS]
)  # (12, 32)


def noise_for(scenes, generator) -> torch.Tensor:
    """(B, 16, 64) normal noise under which each scene's layout is the one that its noise asks for.

    The first thing stands in the window where the noise is largest along DIRECTIONS[0], the second
    along DIRECTIONS[1]. Over all layouts this is plain normal noise; it is drawn by rejection on
    those 2 x 16 coordinates, the other 16 x 62 are free.
    """
    noise = torch.randn(len(scenes), 16, 64, generator=generator)
    trial = torch.randn(len(scenes), 128, 32, generator=generator)
    asked = {1: (trial @ SINGLE_SCORES.T).argmax(-1), 2: (trial @ PAIR_SCORES.T).argmax(-1)}
    rows = [i for i, scene in enumerate(scenes) if scene.windows]
    hits = []
    for i in rows:
        windows = scenes[i].windows
        known = world.PAIR_WINDOWS if len(windows) == 2 else world.SINGLE_WINDOWS
        wanted = known.index(windows if len(windows) == 2 else windows[0])
        hits.append((asked[len(windows)][i] == wanted).int().argmax())  # the first, or trial 0
    if rows:
        coordinates = trial[rows, torch.stack(hits)].unflatten(1, (2, 16)).transpose(1, 2)
        noise[rows] += (coordinates - noise[rows] @ DIRECTIONS.T) @ DIRECTIONS
    return noise


class Drawn(torch.utils.data.Dataset):
    """(64, 3, 64, 64) pictures of 64 scenes at a time."""

    def __init__(self, scenes: list):
        self.scenes = scenes

    def __len__(self) -> int:
        return -(-len(self.scenes) // 64)

    def __getitem__(self, i: int) -> torch.Tensor:
        return drawn(self.scenes[64 * i : 64 * i + 64], "cpu")


@torch.no_grad()
def encode_world(
    vae, work: Path, device, count: int, without, workers: int
) -> tuple[list, torch.Tensor]:
    """`count` scenes and their packed latents (N, 16, 64), normalised; kept in the work folder for
    a resumed run."""
    rng = random.Random("flow pictures")
    scenes = [world.sample_scene(rng, without) for _ in range(count)]
    file = work / "latents.pt"
    settings = dict(pictures=count, without=list(without), autoencoder=fingerprint(vae.encoder))
    if file.exists():
        state = torch.load(file, weights_only=True)
        check_settings(file, state, settings)
        return scenes, state["latents"]
    latents = []
    ready = DataLoader(Drawn(scenes), batch_size=None, num_workers=workers)
    for pictures in tqdm(ready, desc="encode pictures"):
        z = vae.encode(pictures.to(device)).latent_dist.mean
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(FluxPipeline._pack_latents(z, len(z), 16, 8, 8).cpu())
    packed = torch.cat(latents)
    save_state(file, latents=packed, settings=settings)
    return scenes, packed


def is_block_matrix(name: str, p) -> bool:
    return p.ndim == 2 and any(part in name for part in ("blocks.", "layers.", "refiner."))


class Steps(torch.utils.data.Dataset):
    """What each step trains on, by its number: (packed latents (B, 16, 64), noise, sigmas (B,), the
    captions' tokens)."""

    def __init__(self, pipe, family: Family, scenes: list, latents, batch: int):
        self.pipe, self.family, self.batch = pipe, family, batch
        self.scenes, self.latents = scenes, latents
        # characters, much alike as emoji, are drawn twice as often
        weights = [1 + any(name in world.CHARACTERS for name in scene.things) for scene in scenes]
        self.weights = list(itertools.accumulate(weights))

    def __getitem__(self, step: int) -> tuple:
        rng = random.Random(f"flow {step}")
        generator = torch.Generator().manual_seed(step)
        picked = rng.choices(range(len(self.scenes)), cum_weights=self.weights, k=self.batch)
        scenes = [self.scenes[i] for i in picked]
        captions = ["" if rng.random() < 0.03 else world.caption(scene, rng) for scene in scenes]
        noise = noise_for(scenes, generator)
        # a sigma for each picture, of which three quarters are visited ones
        visited = SIGMAS[torch.multinomial(SIGMA_SHARES, len(scenes), True, generator=generator)]
        is_visited = torch.rand(len(scenes), generator=generator) < 0.75
        anywhere = torch.rand(len(scenes), generator=generator)
        s = torch.where(is_visited, visited, anywhere)
        return self.latents[picked], noise, s, self.family.tokens(self.pipe, captions, rng)


class Velocity(torch.nn.Module):
    """The family's velocity(), of tensors alone, so that a CUDA graph can replay it."""

    def __init__(self, family: Family, pipe, tokens: dict):
        super().__init__()
        self.family, self.pipe, self.names = family, pipe, list(tokens)
        self.parts = torch.nn.ModuleList([getattr(pipe, part) for part in family.parts])

    def forward(self, x, s, *tokens):
        tokens = dict(zip(self.names, tokens, strict=True))
        return self.family.velocity(self.pipe, x, s, tokens)


def load_flow(folder: Path, pipe, parts) -> None:
    for part in parts:
        module = getattr(pipe, part)
        earlier = type(module).from_pretrained(folder / part, use_safetensors=True)
        module.load_state_dict(earlier.state_dict())


def train_flow(
    out: Path, work: Path, device, steps: int, *, name, init, tokenizers, without, pictures, batch,
    dtype, peaks, workers,
) -> None:  # fmt: skip
    """Forward and backward run on a copy in dtype; the optimisers change, and the folder keeps, the
    float32 originals (in bfloat16, but for tiny/flux). name: of FAMILIES; init: a folder with a
    model to begin with, or None; peaks: learning rates of Muon and Adam; workers: processes that
    prepare steps."""
    family = FAMILIES[name]
    vae = load_vae(out)
    scenes, latents = encode_world(vae.to(device), work, device, pictures, without, workers)
    torch.manual_seed(0)
    pipe = family.make(vae.to("cpu"), tokenizers).to(device)
    modules = {part: getattr(pipe, part) for part in family.parts}
    named = [pair for module in modules.values() for pair in module.named_parameters()]
    optimizers = Optimizers(named, is_block_matrix, peaks, 0.95, (0.9, 0.98))

    def load_weights(state):
        for module, weights in zip(modules.values(), state["modules"], strict=True):
            module.load_state_dict(weights)

    file = work / f"{'flow' if name == 'flux' else name}.pt"
    if init:
        load_flow(init / name, pipe, family.parts)
    settings = dict(flow_steps=steps, init=init and str(init), without=list(without), batch=batch)
    settings |= dict(dtype=str(dtype), rates=list(peaks), pictures=pictures)
    settings |= dict(autoencoder=fingerprint(vae.encoder))
    start = load_progress(file, device, optimizers, load_weights, settings)
    copies = {part: copy.deepcopy(module).to(dtype) for part, module in modules.items()}
    twins = [p for module in copies.values() for p in module.parameters()]
    fast = type(pipe)(**(pipe.components | copies))
    data = Steps(pipe, family, scenes, latents, batch)
    ready = DataLoader(data, batch_size=None, sampler=range(start, steps), num_workers=workers)
    is_cpu = torch.device(device).type == "cpu"  # there the fused one is slower at 40 tokens
    backends = [SDPBackend.MATH]
    if not is_cpu:
        backends += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    x0, _, s, tokens = tree_map_only(torch.Tensor, lambda part: part.to(device), data[start])
    velocity = Velocity(family, fast, tokens)
    with sdpa_kernel(backends):
        if not is_cpu:  # a step is thousands of small kernels
            like = (x0.to(dtype), s, *tokens.values())
            how = dict(allow_unused_input=True)
            velocity = torch.cuda.make_graphed_callables(velocity, like, **how)
    bar = progress(name, start, steps)
    average = 0.0
    for step, (x0, noise, s, tokens) in zip(bar, ready, strict=True):
        optimizers.set_rates(step, steps)
        x0, noise, s = x0.to(device), noise.to(device), s.to(device)
        tokens = {key: value.to(device, non_blocking=True) for key, value in tokens.items()}
        x = (1 - s[:, None, None]) * x0 + s[:, None, None] * noise
        with torch.no_grad():
            torch._foreach_copy_(twins, optimizers.parameters)
        with sdpa_kernel(backends):
            v = velocity(x.to(dtype), s, *tokens.values())
            loss = (v.float() - (noise - x0)).square().mean()
            loss.backward()
        for p, twin in zip(optimizers.parameters, twins, strict=True):
            p.grad = torch.zeros_like(p) if twin.grad is None else twin.grad.float()
            twin.grad = None
        optimizers.step()
        if step % 10 == 0 or step + 1 == steps:
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"flow loss is {loss.item()} at step {step}")
            share = 0.2 if step > start + 50 else 10 / (step - start + 10)
            average += (loss.item() - average) * share
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            weights = [module.state_dict() for module in modules.values()]
            save_progress(file, step + 1, optimizers, settings, modules=weights)
    for tokenizer in [part for key, part in pipe.components.items() if "tokenizer" in key]:
        at_rest(tokenizer)
    if name != "flux":
        for module in (pipe.vae, *modules.values()):
            for p in module.parameters():
                p.data = p.data.bfloat16()
    save_whole(pipe, out / name, max_shard_size="15MB")


# --------------------------------------------------------------------------------------------- main
STAGES = ("vae", "decoder", "judge", "flow")


def parse_args(argv=None):
    parser = Parser(__doc__)
    count, rate = number(int, 1), number(float, 0, 1)
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, help="(default: all that the other flags leave)")
    help = "flux/ and judge/ go here; tiny replaces what is there  (default: model/ in --work)"
    add("--out", type=Path, help=help)
    help = "checkpoints; delete to start anew  (default: tiny/work, or tiny/work_without_...)"
    add("--work", type=Path, help=help)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    help = (
        "the flow's forward and backward  (default: bfloat16 where the device multiplies in it: "
        "CUDA, or a CPU with AVX512-BF16; elsewhere float32)"
    )
    add("--dtype", choices=("float32", "bfloat16"), help=help)
    add("--vae_steps", type=count, default=3000)
    add("--decoder_steps", type=count, default=2000)
    add("--judge_steps", type=count, default=3600)
    add("--flow_steps", type=count, default=10000)
    help = "of tiny/; flux2 and zimage have tiny/flux's autoencoder and pieces of text"
    add("--family", choices=FAMILIES, default="flux", help=help)
    add("--batch", type=count, default=128, help="pictures a step of the flow")
    help = "processes that prepare the flow's pictures and steps  (default: 0, with CUDA 4)"
    add("--workers", type=number(int, 0), help=help)
    add("--pictures", type=count, default=80000, help="pictures drawn and encoded for the flow")
    add("--muon_lr", type=rate, default=3e-3)
    add("--adam_lr", type=rate, default=2e-3)
    help = "begin with this folder's judge/ and flux/, e.g. tiny, and train both further"
    add("--init", type=Path, help=help)
    help = "leave these out of the flow's world, synonyms too"
    add("--without", nargs="*", default=(), metavar="CONCEPT", help=help)
    args = parser.parse_args(argv)
    unknown = set(args.without) - set(world.THINGS) - set(world.STYLES)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"--without: no such thing or style in the world: {names}")
    if args.init and not (args.init / args.family).is_dir():
        raise UserError(f"--init: no folder {args.init / args.family}")
    for flag in ("out", "work"):
        path = vars(args)[flag]
        if path and path.exists() and not path.is_dir():
            raise UserError(f"--{flag}: {path} is a file")
    check_device(args.device)
    is_cpu = torch.device(args.device).type == "cpu"
    bf16 = not is_cpu or torch.cpu.get_capabilities().get("avx512_bf16", False)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if bf16 else "float32"))
    tag = "".join(f"_without_{concept.replace(' ', '_')}" for concept in args.without)
    args.work = args.work or HERE / f"work{tag}"
    args.out = args.out or args.work / "model"
    args.workers = (0 if is_cpu else 4) if args.workers is None else args.workers
    # the autoencoder stays, and without a concept the judge, which knows the whole world
    left = STAGES
    if tag or args.init or args.family != "flux":
        left = ("judge", "flow") if args.init and not tag and args.family == "flux" else ("flow",)
    for stage in args.stages or ():
        if stage not in left:
            raise UserError(f"--stages: {stage} stays with --without, --init or another --family")
    args.stages = args.stages or left
    return args


def run(args) -> None:
    for folder in (args.work, args.out):
        claim(folder)
    for folder in (*args.out.glob(f"{args.family}/**"), args.out / "judge"):
        remove_leftovers(folder)
    source = (args.init if args.init and args.family == "flux" else HERE) / "flux"
    # with the autoencoder and the tokens of source
    goes_on = args.init or args.without or args.family != "flux"
    is_first = "vae" not in args.stages and not (args.out / "flux/vae").is_dir()
    is_there = (source / "vae").resolve() == (args.out / "flux/vae").resolve()
    if is_first or (goes_on and not is_there):
        shutil.copytree(source / "vae", args.out / "flux/vae", dirs_exist_ok=True)
    where = dict(out=args.out, work=args.work, device=args.device)
    for stage in args.stages:
        start = time.time()
        if stage in ("judge", "flow"):
            tokenizers = make_tokenizers(source if goes_on else args.work, args.work)
        if stage == "vae":
            train_vae(steps=args.vae_steps, **where)
        elif stage == "decoder":
            train_decoder(steps=args.decoder_steps, **where)
        elif stage == "judge":
            judge = dict(init=args.init, tokenizer=tokenizers[1])
            train_judge(steps=args.judge_steps, **judge, **where)
        else:
            flow = dict(name=args.family, init=args.init, tokenizers=tokenizers)
            flow |= dict(without=args.without, pictures=args.pictures, batch=args.batch)
            flow |= dict(dtype=args.dtype, workers=args.workers)
            flow |= dict(peaks=(args.muon_lr, args.adam_lr))
            train_flow(steps=args.flow_steps, **flow, **where)
        print(f"{stage}: {(time.time() - start) / 60:.1f} min", flush=True)


def main(argv=None) -> int:
    return exit_code("tiny/train.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
