"""Minimalist Concept Erasure in one file: erase a concept from a rectified-flow transformer by switching few neurons off.

Implements "Minimalist Concept Erasure in Generative Models" (MCE), ICML 2025, arXiv 2507.13386. With M the gates, F the final
latents of the whole sampler, x_T the noise and theta' the base weights, it minimises

    L(M) = E || F_{M*theta'}(x_T, c) - F_{theta'}(x_T, c_neutral) ||^2          erase_loss,    c a concept prompt
         + beta E || F_{M*theta'}(x_T, c) - F_{theta'}(x_T, c) ||^2             preserve_loss, c a retain prompt

end to end through all sampling steps, then thresholds the gates and folds them into the weights: a plain state dict.
Beyond the paper, marked "differs from paper": binary gates in training, a limit on how many close, the harm of closing each alone, hard cases first.

Time: sigma s = 1 is noise, s = 0 the picture; x_s = (1 - s) x_0 + s noise; velocity v = noise - x_0; x += (s_next - s) v.
Shapes: B pictures, T packed latent tokens, C channels (64), L text tokens, D text width; gates (units,) per site.

    python erase.py --concept gun --steps 400
    python erase.py --concept "a cat" --neutral "a dog" --model black-forest-labs/FLUX.1-schnell
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")            # no word about the absent torchvision, which nothing here needs
import diffusers
import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TINY, SCHNELL = str(HERE / "tiny/flux"), "black-forest-labs/FLUX.1-schnell"

# --------------------------------------------------------------------------------------------------------- defaults
# One column a preset; --preset paper is table 6 of the paper on any model, tiny is what measured best on tiny/flux (README).
DEFAULTS = dict(
    #                       paper            tiny
    gate=                  ("hard_concrete", "straight_through",  "relaxation of the gates"),
    lr_ffn=                (0.5,             0.25,                "learning rate of ffn, mlp and attn gates"),
    lr_norm=               (0.5,             0.25,                "learning rate of norm gates"),
    weight_decay=          (0.01,            0.0,                 "AdamW's, on the logits"),
    adam_eps=              (1e-8,            1e-4,                "Adam's eps: gates with gradients far below it stay where they are"),
    beta=                  (0.01,            3.0,                 "weight of preserve_loss"),
    batch=                 (4,               4,                   "concept prompts a step"),
    retain_batch=          (4,               8,                   "retain prompts a step"),
    lr_decay=              (0,               1,                   "1: the learning rates fall linearly to 0"),
    hard=                  (0.0,             0.75,                "share of a step's prompts drawn in proportion to their latest error"),
    max_closed=            (1.0,             0.05,                "share of the gates that may close"),
    harm=                  (0.0,             1.0,                 "weight, at the start, of what closing a gate alone would do to retain prompts"),
    height=                (512,             64,                  "pixels"),
    width=                 (512,             64,                  "pixels"),
    max_sequence_length=   (256,             24,                  "T5 tokens"),
)
PRESETS = ("paper", "tiny")
MODULES = ("ffn", "norm", "kv", "attn", "mlp")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class UserError(Exception):
    """Bad input: exit_code() prints it as one line and returns 2."""


def exit_code(script: str, run) -> int:
    """run(); bad input is one line and 2, a failure one line and 1."""
    try:
        run()
    except (UserError, json.JSONDecodeError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, SafetensorError) as error:
        print(f"{script}: failed: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def local_name(name: str) -> str:
    """The inverse of portable_name: a path inside this kit, made absolute; anything else as it is."""
    return str(HERE / name) if (HERE / name).exists() else name


def portable_name(name: str) -> str:
    """A hub id as it is, a path inside this kit relative to it, any other path absolute."""
    path = Path(name).resolve()
    return name if not path.exists() else str(path.relative_to(HERE) if path.is_relative_to(HERE) else path)


# ------------------------------------------------------------------------------------------------------------ gates
# Every relaxation is exactly 1 at its start value, so training starts from the base picture.
START = dict(sigmoid=4.0, hard_concrete=3.0, straight_through=3.0)


def relax(gate_logits: torch.Tensor, gate: str, uniform: torch.Tensor | None = None, threshold: float = 0.0) -> torch.Tensor:
    """Gates in [0, 1] from logits, (units,) fp32. threshold: closing_threshold().

    sigmoid           sigma(l) / sigma(l_start), clamped at 1
    hard_concrete     Louizos et al. 2018, eq. 10-12: a stretched, clamped sigmoid with logistic noise; noise-free if `uniform` is None
    straight_through  1[l > threshold] forwards, the gradient of sigma(l) backwards: no gap between training and deployment
    """
    if gate == "sigmoid":
        return (gate_logits.sigmoid() / torch.tensor(START[gate]).sigmoid()).clamp(max=1)
    if gate == "hard_concrete":
        temperature, low, high = 2 / 3, -0.1, 1.1
        noise = 0 if uniform is None else uniform.log() - (-uniform).log1p()
        return (((noise + gate_logits) / temperature).sigmoid() * (high - low) + low).clamp(0, 1)
    soft = gate_logits.sigmoid()
    return (gate_logits > threshold).float() + (soft - soft.detach())    # the bracket is exactly 0


def closing_threshold(gate_logits: dict[str, torch.Tensor], max_closed: float) -> float:
    """Gates are closed where their logit is at or below it: 0, or lower where more than the share max_closed of all would close.
    differs from paper: those who want to close compete for few places, so that what does little stays open."""
    logits = torch.cat([logit.detach() for logit in gate_logits.values()])
    k = int(max_closed * len(logits))
    return min(0.0, logits.kthvalue(k).values.item()) if k else -math.inf


def binary(gate_logits: dict[str, torch.Tensor], threshold: float) -> dict[str, torch.Tensor]:
    """The final mask, {0, 1} per unit: open where the logit is above the threshold."""
    return {site: (logit.detach() > threshold).float() for site, logit in gate_logits.items()}


def closed_share(gates: dict[str, torch.Tensor]) -> float:
    return sum((g.detach() <= 0.5).sum().item() for g in gates.values()) / sum(g.numel() for g in gates.values())


def gate_noise(sites: dict[str, int], seed: int, step: int) -> dict[str, torch.Tensor]:
    """Uniforms for hard_concrete: a function of (seed, optimiser step) alone, so rollout and recompute see the same gates."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return {site: torch.rand(units, generator=generator).clamp(1e-6, 1 - 1e-6) for site, units in sites.items()}


# ------------------------------------------------------------------------------------------------------------ hooks
def gate_sites(transformer: FluxTransformer2DModel, modules=("ffn", "norm")) -> dict[str, int]:
    """Gated sites, {dotted module name: number of units}, read off the layers' sizes; no dummy pass.

    ffn   hidden neurons after GELU of both FFNs of a double block     norm  outputs of norm1_context.linear (shift, scale, gate)
    attn  heads of every block                                         mlp   MLP neurons of a single block
    kv    channels of the text's keys and values in a double block (differs from paper: where a style's words reach the picture, before any FFN)
    """
    heads, sites = transformer.config.num_attention_heads, []
    for i, block in enumerate(transformer.transformer_blocks):
        name = f"transformer_blocks.{i}"
        sites += [("ffn", f"{name}.ff.net.0", block.ff.net[0].proj.out_features),
                  ("ffn", f"{name}.ff_context.net.0", block.ff_context.net[0].proj.out_features),
                  ("norm", f"{name}.norm1_context.linear", block.norm1_context.linear.out_features), ("attn", f"{name}.attn", heads)]
        sites += [("kv", f"{name}.attn.{linear}", transformer.inner_dim) for linear in ("add_k_proj", "add_v_proj")]
    for i, block in enumerate(transformer.single_transformer_blocks):
        name = f"single_transformer_blocks.{i}"
        sites += [("attn", f"{name}.attn", heads), ("mlp", f"{name}.act_mlp", block.proj_mlp.out_features)]
    return {site: units for module, site, units in sites if module in modules}


@contextlib.contextmanager
def gated(transformer: FluxTransformer2DModel, gates: dict[str, torch.Tensor]):
    """Multiply each site's output by its gates, (units,) or (B, units), inside the `with`; the hooks go with it, whatever happens. Raises
    KeyError or ValueError for gates that do not fit the model."""
    sizes = gate_sites(transformer, MODULES)

    def scale(output, g):                                          # (B, maybe tokens, units)
        return output * g.to(output.device, output.dtype).view(*g.shape[:-1], *[1] * (output.dim() - g.dim()), -1)

    def scale_heads(inputs, g):                                    # (B, tokens, heads * d, maybe more): whole heads
        width, per_head = transformer.inner_dim, transformer.inner_dim // g.shape[-1]
        x, g = inputs[0], g.repeat_interleave(per_head, -1)
        return (torch.cat([scale(x[..., :width], g), x[..., width:]], -1),)

    with contextlib.ExitStack() as hooks:
        for site, g in gates.items():
            if sizes[site] != g.shape[-1]:
                raise ValueError(f"{site} has {sizes[site]} units, the gates {g.shape[-1]}")
            if not site.endswith(".attn"):
                hooks.enter_context(transformer.get_submodule(site).register_forward_hook(lambda m, i, out, g=g: scale(out, g)))
                continue
            block = site.removesuffix(".attn")                     # heads are gated where they enter the output projections
            for consumer in ("proj_out",) if block.startswith("single") else ("attn.to_out.0", "attn.to_add_out"):
                module = transformer.get_submodule(f"{block}.{consumer}")
                hooks.enter_context(module.register_forward_pre_hook(lambda m, inputs, g=g: scale_heads(inputs, g)))
        yield


def compile_blocks(transformer: FluxTransformer2DModel, **options) -> None:
    """torch.compile block by block, in place. By torch's default nothing checks whether hooks came or went before a graph is used again, so that a block
    compiled for a base picture would leave its gates out for ever: switched on here (test_compiled_blocks_see_their_gates)."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = 64                      # 8 is too few: with gates or not, gradients or not, for every batch size
    transformer.compile_repeated_blocks(**options)


# ------------------------------------------------------------------------------------------------------------- flow
@torch.no_grad()
def encode(pipe: FluxPipeline, prompts: list[str], max_sequence_length: int, batch: int = 32) -> list[tuple]:
    """[(T5 sequence (L, D), CLIP vector (P,))] per prompt, on the CPU; identical prompts are encoded once."""
    unique, out = list(dict.fromkeys(prompts)), {}
    for i in range(0, len(unique), batch):
        part, device = unique[i:i + batch], pipe.text_encoder.device
        sequence, pooled, _ = pipe.encode_prompt(part, part, device=device, max_sequence_length=max_sequence_length)
        out |= dict(zip(part, zip(sequence.cpu(), pooled.cpu())))
    return [out[p] for p in prompts]


def init_latents(pipe: FluxPipeline, seeds: list[int], height: int, width: int) -> torch.Tensor:
    """Noise (B, T, C) packed, from one CPU generator per picture: a seed means the same picture on every device, in any batch."""
    generators, transformer = [torch.Generator().manual_seed(s) for s in seeds], pipe.transformer
    return pipe.prepare_latents(len(seeds), transformer.config.in_channels // 4, height, width, transformer.dtype, "cpu", generators)[0]


def schedule(pipe: FluxPipeline, num_inference_steps: int, tokens: int) -> list[float]:
    """The sampler's sigmas, 1 ... 0, from the model's own scheduler (schnell: equal steps; dev: shifted by the picture's size)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    config = pipe.scheduler.config
    mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).numpy()
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return pipe.scheduler.sigmas.tolist()


@functools.lru_cache
def image_ids(grid, device, dtype) -> torch.Tensor:
    """FLUX's positions of the packed tokens (T, 3); kept, since making them waits for the GPU."""
    return FluxPipeline._prepare_latent_image_ids(1, *grid, device, dtype)


def velocity(transformer, x, s, text, grid, guidance_scale: float = 3.5) -> torch.Tensor:
    """v(x, s) (B, T, C). text: (sequence (B, L, D), pooled (B, P)); grid: (height, width) in packed tokens."""
    sequence, pooled = text
    guidance = torch.full((len(x),), guidance_scale, device=x.device) if transformer.config.guidance_embeds else None
    return transformer(hidden_states=x, timestep=torch.full((len(x),), s * 1000, device=x.device, dtype=x.dtype) / 1000, guidance=guidance,
                       encoder_hidden_states=sequence, pooled_projections=pooled, img_ids=image_ids(grid, x.device, x.dtype),
                       txt_ids=torch.zeros(sequence.shape[1], 3, device=x.device, dtype=x.dtype), return_dict=False)[0]


def euler(transformer, x, s, s_next, text, grid) -> torch.Tensor:
    """One sampling step, with the scheduler's own rounding: the sum in fp32, the result in the model's dtype."""
    step = torch.tensor(s_next, dtype=torch.float32) - torch.tensor(s, dtype=torch.float32)        # on the CPU, as the scheduler's
    return (x.float() + step * velocity(transformer, x, s, text, grid)).to(x.dtype)


@torch.no_grad()
def rollout(transformer, noise, text, sigmas, grid) -> list[torch.Tensor]:
    """The trajectory: [0] noise ... [-1] final latents, each (B, T, C)."""
    trajectory = [noise]
    for s, s_next in zip(sigmas, sigmas[1:]):
        trajectory.append(euler(transformer, trajectory[-1], s, s_next, text, grid))
    return trajectory


@torch.no_grad()
def decode(pipe: FluxPipeline, latents: torch.Tensor, height: int, width: int) -> list:
    """Final latents (B, T, C) -> B PIL pictures. The VAE is on their device for that long."""
    home = pipe.vae.device
    pipe.vae.to(latents.device)
    z = FluxPipeline._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pictures = pipe.image_processor.postprocess(pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0], output_type="pil")
    pipe.vae.to(home)
    return pictures


def stack(texts: list[tuple], device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.stack(part).to(device) for part in zip(*texts))


# ----------------------------------------------------------------------------------------------------------- losses
def squared_errors(final, target) -> torch.Tensor:
    """(B,) the paper's squared norms, as means over a picture's latents (B, T, C)."""
    return (final.float() - target.float()).square().flatten(1).mean(1)


def objective(errors, is_concept, args):
    """erase_loss, preserve_loss and L of (a part of) one step's batch. errors: (B,) squared_errors; is_concept: (B,) bool."""
    erase_loss = (errors * is_concept).sum() / args.batch          # no errors[is_concept]: that waits for the GPU
    preserve_loss = (errors * ~is_concept).sum() / args.retain_batch
    return erase_loss, preserve_loss, erase_loss + args.beta * preserve_loss


# --------------------------------------------------------------------------------------------------------- backward
def rollout_backward(transformer, noise, text, sigmas, grid, loss_of_final, checkpoint: str = "step"):
    """loss_of_final(rollout(...)[-1]), adding its gradient to everything the gates hang on.

    none    plain autograd: 2 passes a sampling step; memory grows with the number of steps
    step    3 passes at the memory of one step: a rollout without gradients keeps the latents between steps; then, last step first, each
            step is recomputed and one backward gives the gates' gradient and the latents' together
    block   plain autograd that keeps only the blocks' inputs, and recomputes one block at a time: 3 passes too; less memory than `step` for few steps
    both    step by step, and block by block within: 4 passes at the memory of one block, whatever the number of steps
    test_stepwise_backward_equals_autograd proves them equal.
    """
    if checkpoint in ("block", "both"):                            # FLUX has no dropout, so no random state to restore
        transformer.enable_gradient_checkpointing(functools.partial(recompute, use_reentrant=False, preserve_rng_state=False))
    if checkpoint in ("none", "block"):
        final = noise
        for s, s_next in zip(sigmas, sigmas[1:]):
            final = euler(transformer, final, s, s_next, text, grid)
        loss = loss_of_final(final)
        loss.backward()
    else:
        *states, final = rollout(transformer, noise, text, sigmas, grid)
        loss = loss_of_final(final.requires_grad_())
        gradient, = torch.autograd.grad(loss, final)
        for x, s, s_next in reversed(list(zip(states, sigmas, sigmas[1:]))):
            x = x.detach().requires_grad_(x is not noise)          # nothing upstream of the noise needs a gradient
            euler(transformer, x, s, s_next, text, grid).backward(gradient)
            gradient = x.grad
    transformer.disable_gradient_checkpointing()
    return loss.detach(), final.detach()


# ------------------------------------------------------------------------------------------------- fold, save, load
def zeroed(transformer: FluxTransformer2DModel, mask: dict[str, torch.Tensor]):
    """Yields (parameter name, dim, indices): what the closed units are in the weights, on both sides, so that nothing is left to regrow from.

    ffn   row and bias of net.0.proj, column of net.2        norm, kv  row and bias of the linear layer itself
    attn  rows of the value projections, columns of the output projections
    mlp   row and bias of proj_mlp, column of proj_out
    """
    for site, g in mask.items():
        off, block, single = (g == 0).nonzero().flatten(), site.rpartition(".")[0], site.startswith("single")
        rows, columns, shift = [site], [], 0
        if site.endswith("net.0"):
            rows, columns = [f"{site}.proj"], [f"{site[:-1]}2"]
        elif site.endswith("act_mlp"):
            rows, columns, shift = [f"{block}.proj_mlp"], [f"{block}.proj_out"], transformer.inner_dim
        elif site.endswith("attn"):
            off = (g == 0).repeat_interleave(transformer.inner_dim // g.numel()).nonzero().flatten()
            rows = [f"{site}.to_v"] if single else [f"{site}.to_v", f"{site}.add_v_proj"]
            columns = [f"{block}.proj_out"] if single else [f"{site}.to_out.0", f"{site}.to_add_out"]
        for name in rows:
            yield from ((f"{name}.weight", 0, off), (f"{name}.bias", 0, off))
        for name in columns:
            yield f"{name}.weight", 1, off + shift


@torch.no_grad()
def fold(transformer: FluxTransformer2DModel, mask: dict[str, torch.Tensor]) -> None:
    """Switch the closed units off in the weights, in place. Equal to the gated model with binary gates, bit for bit in fp32
    (test_fold_equals_hooks): GELU(0) = 0."""
    for name, dim, off in zeroed(transformer, mask):
        p = transformer.get_parameter(name)
        p.index_fill_(dim, off.to(p.device), 0)


def save_folded(model: str, transformer: FluxTransformer2DModel, mask: dict, folder: Path) -> None:
    """The base's stored transformer with the mask folded in: its files copied, the closed slices zeroed in the copies through a memory map. No
    weight is held in memory, and the stored dtype stays. `transformer` only tells the sizes."""
    stored = Path(model if Path(model).is_dir() else snapshot_download(model, allow_patterns="transformer/*")) / "transformer"

    def write(copy):
        for old in (copy, folder):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(stored, copy, copy_function=shutil.copyfile,
                        ignore=lambda _, names: [n for n in names if not n.endswith((".json", ".safetensors"))])
        missing = {name for name, _, _ in zeroed(transformer, mask)}
        for shard in copy.glob("*.safetensors"):                   # 8 bytes: the header's length; a JSON header; the tensors
            with open(shard, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
            data = torch.from_file(str(shard), shared=True, size=shard.stat().st_size, dtype=torch.uint8)[8 + size:]
            for name, dim, off in zeroed(transformer, mask):
                if name in header:
                    data[slice(*header[name]["data_offsets"])].view(*header[name]["shape"], -1).index_fill_(dim, off.cpu(), 0)
            missing -= header.keys()
        if missing:
            raise UserError(f"--model: {stored} has no {min(missing)}")
    write_atomically(folder, write)


@torch.no_grad()
def fingerprint(transformer: FluxTransformer2DModel) -> str:
    """Hash of the base weights: names, shapes and up to 1,024 evenly spaced values of every tensor, rounded to bf16; an odd stride, so that
    they come from all columns."""
    digest = hashlib.sha256()
    for name, p in sorted(transformer.state_dict().items()):
        values = p.flatten()[:: max(1, p.numel() // 1024) | 1][:1024].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(p.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def write_atomically(path: Path, write) -> None:
    """A killed run leaves either the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def save_mask(path: Path, mask: dict, base_fingerprint: str, **metadata) -> None:
    metadata |= dict(format="minimalist-concept-erasure mask 1", base_fingerprint=base_fingerprint,
                     closed=f"{sum((g == 0).sum().item() for g in mask.values())} of {sum(g.numel() for g in mask.values())}")
    tensors = {site: g.to("cpu", torch.uint8) for site, g in mask.items()}
    write_atomically(path, lambda p: save_file(tensors, p, {k: str(v) for k, v in metadata.items()}))


def load_mask(path: Path, transformer: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    """{site: {0, 1} fp32 (units,)}. Raises UserError if the file is damaged or belongs to other base weights."""
    try:
        with safe_open(path, "pt") as f:
            metadata, mask = f.metadata() or {}, {site: f.get_tensor(site).float() for site in f.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    found = fingerprint(transformer)
    if metadata.get("base_fingerprint") != found:
        raise UserError(f"{path}: made for base weights {metadata.get('base_fingerprint')} ({metadata.get('model')}), these are {found}")
    return mask


def default_dtype(device) -> torch.dtype:
    """bf16, but fp32 on a CPU, under whatever index: a process group names it cpu:0."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_pipeline(model: str, device=None, dtype=None) -> FluxPipeline:
    """A stock FluxPipeline from a hub id or folder. Raises UserError if that is not a FLUX model; only safetensors is read."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or default_dtype(device)
    try:
        pipe = FluxPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise UserError(f"--model: cannot load {model}: {first_line(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    return pipe.to(device)


def load_erased(path, device=None, dtype=None) -> FluxPipeline:
    """A ready pipeline of an erased model: the base with the mask folded in, the same bits as its transformer/. Raises UserError."""
    path = Path(path)
    for name in ("config.json", "mask.safetensors"):                # the mask is written last
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name}, so no finished erased model")
    model = json.loads((path / "config.json").read_text())["model"]
    pipe = load_pipeline(local_name(model), device, dtype)
    fold(pipe.transformer, load_mask(path / "mask.safetensors", pipe.transformer))
    return pipe


# ----------------------------------------------------------------------------------------------------------- memory
LIBRARIES = dict(fp8="torchao", nf4="bitsandbytes")


def step_counts(args) -> list[int]:
    """Numbers of sampling steps, of which each optimiser step takes one. differs from paper: --robust adds others that users may ask for."""
    n = args.num_inference_steps
    return sorted({1, 2, n, 2 * n}) if args.robust else [n]


def free_memory(device) -> int:
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else psutil.virtual_memory().available


def memory_needed(transformer, args, checkpoint: str, quantize: str, offload: bool) -> int:
    """Bytes of the device that training takes: weights, what autograd keeps of args.micro_batch pictures, one block's backward, and 1 GiB to spare.

    What a block keeps is counted in (tokens x width): inputs of normalisations, GELU and attention (12 in a double, 11 in a single block), and what
    gates multiply, as their gradients need it. test_memory_estimate holds it to what autograd really allocates. `transformer` may be on "meta".
    """
    doubles, singles, m, size = transformer.transformer_blocks, transformer.single_transformer_blocks, args.modules, default_dtype(args.device).itemsize
    tokens = args.height * args.width // 256 + args.max_sequence_length
    double = (12 + 4 * ("ffn" in m) + ("attn" in m)) * tokens + (4 * ("norm" in m) + 2 * ("kv" in m)) * args.max_sequence_length
    single = (11 + 4 * ("mlp" in m) + 5 * ("attn" in m)) * tokens
    one_step, inputs = len(doubles) * double + len(singles) * single, (len(doubles) + len(singles)) * tokens
    steps = max(step_counts(args))
    kept = dict(none=one_step * steps, step=one_step, block=inputs * steps + single, both=inputs + single)[checkpoint]
    numel = [sum(p.numel() for p in block.parameters()) for block in [*doubles, *singles]]
    rest = transformer.num_parameters() - sum(numel)
    weights = (rest + (max(numel) if offload else sum(numel))) * dict(none=size, fp8=1, nf4=0.52)[quantize]
    if quantize == "fp8":                                          # autograd keeps the weights that a block computed with
        weights += size * dict(none=steps * sum(numel), step=sum(numel)).get(checkpoint, max(numel))
    return round(weights + (kept + 15 * tokens) * transformer.inner_dim * size * args.micro_batch + 2**30)


def plan_memory(transformer, args) -> str:
    """Settles --checkpoint auto on the fastest way that fits; returns why. Raises UserError, with what would fit, if nothing does."""
    free, gib = free_memory(args.device), lambda n: f"{n / 2**30:.1f} GiB"
    modes = (("block", "both") if args.offload else ("none", "step", "block", "both")) if args.checkpoint == "auto" else (args.checkpoint,)
    for mode in modes:
        needed = memory_needed(transformer, args, mode, args.quantize, args.offload)
        if needed <= free:
            args.checkpoint = mode
            return f"checkpoint {mode}: needs about {gib(needed)} of {args.device}, {gib(free)} are free"
    least, fitting = argparse.Namespace(**vars(args) | dict(micro_batch=1)), []
    for quantize, offload in (("none", False), ("fp8", False), ("nf4", False), ("none", True)):
        if (size := memory_needed(transformer, least, "both", quantize, offload)) <= free:
            fitting.append(f"--checkpoint both --micro_batch 1{f' --quantize {quantize}' * (quantize != 'none')}{' --offload' * offload} ({gib(size)})")
    raise UserError(f"--checkpoint: {modes[-1]} needs about {gib(needed)} of {args.device}, {gib(free)} are free; "
                    + ("these would fit: " + "; ".join(fitting) if fitting else "nothing fits; try a smaller --height and --width"))


def quantized(transformer: FluxTransformer2DModel, kind: str, device) -> FluxTransformer2DModel:
    """The frozen linear layers' weights in 8 bits (torchao) or 4 (bitsandbytes), in place, layer by layer on the device; they compute in the dtype they
    had. The libraries' own calls, as diffusers' quantization configs make them, which for nf4 refuse a CPU and so could not be tested."""
    if kind == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
        quantize_(transformer, Float8WeightOnlyConfig(), device=device)
    elif kind == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit
        for name, linear in [(n, m) for n, m in transformer.named_modules() if type(m) is torch.nn.Linear]:
            new = Linear4bit(linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
            new.weight, new.bias = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new), linear.bias
            transformer.set_submodule(name, new.to(device))
    return transformer


def offload(transformer: FluxTransformer2DModel, device) -> None:
    """Keep the blocks' weights in CPU memory: each block computes with copies on the device that go when it is done. With block checkpointing
    (only then) autograd keeps no copy either: the recompute makes new ones, which live until the block's backward is through.

    Not diffusers' group offloading: that swaps param.data under autograd. Linear layers then keep the device's copy alive until the backward, and the
    RMS norms of q and k find their weight back on the CPU in it.
    """
    def on_device(block, forward, *args, **kwargs):
        weights = [(module, name, p) for module in block.modules() for name, p in module._parameters.items() if p is not None]
        try:
            for module, name, p in weights:
                module._parameters[name] = p.to(device, non_blocking=True)
            return forward(*args, **kwargs)
        finally:
            for module, name, p in weights:
                module._parameters[name] = p

    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        for p in block.parameters():                               # page-locked memory copies faster, and without waiting
            if torch.device(device).type == "cuda" and type(p.data) is torch.Tensor:
                p.data = p.data.pin_memory()
        block.forward = functools.partial(on_device, block, block.forward)
    for name, child in transformer.named_children():
        if not name.endswith("transformer_blocks"):
            child.to(device)


# ---------------------------------------------------------------------------------------------------------- prompts
COLUMNS = ("case_number", "prompt", "neutral_prompt", "evaluation_seed", "split")


def read_prompts(path: Path, flag: str, columns=COLUMNS) -> list[dict]:
    """Rows of a prompt CSV. Raises UserError naming the column or the line that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            if missing := [c for c in columns if c not in (reader.fieldnames or ())]:
                raise UserError(f"{flag}: {path} has no column {missing[0]!r}")
            rows = []
            for row in reader:
                where, extra = f"{flag}: {path}, line {reader.line_num}", row.pop(None, [])
                if extra or None in row.values():
                    fields = sum(v is not None for v in row.values()) + len(extra)
                    raise UserError(f"{where}: {fields} fields, the header has {len(reader.fieldnames)}")
                for wrong, message in (
                        (row["split"] not in ("train", "test"), f"split is {row['split']!r}, not train or test"),
                        (not row["prompt"].strip(), "prompt is empty"),
                        ("neutral_prompt" in columns and row["prompt"] == row["neutral_prompt"], "prompt and neutral_prompt are the same"),
                        (not re.fullmatch(r"\d{1,18}", row["evaluation_seed"]), f"evaluation_seed is {row['evaluation_seed']!r}, not a whole number")):
                    if wrong:
                        raise UserError(f"{where}: {message}")
                rows.append(row | dict(evaluation_seed=int(row["evaluation_seed"])))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag}: cannot read {path}: {error}") from None
    if not rows:
        raise UserError(f"{flag}: {path} holds no prompts")
    return rows


def noun_phrase(words: str) -> str:
    """"apple" -> "an apple"; names, plurals and phrases with their own article stay as they are."""
    first, last = words.split()[0], words.split()[-1]
    if words == "nothing" or words[0].isupper() or first in ("a", "an", "the", "some") or re.search(r"[^su]s$", last):
        return words
    silent_or_you = re.match(r"(hour|heir|honest)|(uni[^nm]|use|eu|one)", first)
    vowel = bool(silent_or_you.group(1)) if silent_or_you else first[0].lower() in "aeiou"
    return f"{'an' if vowel else 'a'} {words}"


def mentions(concept: str, text: str) -> bool:
    """Whether the concept's words, without their article, occur in the text as whole words (plural or not)."""
    words = re.sub(r"^(an?|the|some)\s+", "", " ".join(concept.replace("_", " ").split()), flags=re.I)
    return bool(re.search(rf"\b{re.escape(words)}(e?s)?\b", text, re.I))


def template_pairs(concept: str, neutral: str, templates: list[dict]) -> list[dict]:
    """Prompt pairs for any concept: {x} becomes the concept in one prompt and `neutral` in the other ("" = the empty prompt)."""
    fill = lambda prompt, words: prompt.replace("{x}", noun_phrase(words)) if words else ""
    return [row | dict(prompt=fill(row["prompt"], concept), neutral_prompt=fill(row["prompt"], neutral))
            for row in templates if not mentions(concept, row["prompt"])]


def concept_pairs(concept: str, args) -> list[dict]:
    """Rows of prompts/<concept>.csv (or --prompts), or pairs made from templates.csv."""
    file = args.prompts or args.prompt_dir / f"{concept.lower().replace(' ', '_')}.csv"
    if args.prompts or (file.is_file() and args.neutral is None):
        rows = read_prompts(file, "--prompts" if args.prompts else "--concept")
        if args.prompts and concept != "nudity" and not any(mentions(concept, row["prompt"]) for row in rows):      # which no one calls by its name
            raise UserError(f"--concept: {concept!r} occurs in no prompt of {file}")
        return [row for row in rows if mentions(concept, row["prompt"])] if args.prompts and len(args.concept) > 1 else rows
    neutral = ("nothing" if args.is_tiny else "") if args.neutral is None else args.neutral
    templates = read_prompts(args.prompt_dir / "templates.csv", "--concept", ("prompt", "evaluation_seed", "split"))
    return template_pairs(concept.replace("_", " "), neutral, templates)


# --------------------------------------------------------------------------------------------------------- training
# the first starting noise of training, and of the figures in the model card: far from any evaluation seed
TRAIN_NOISE, HELD_OUT_NOISE = 2**40, 2**40 + 2**21


class Cases:
    """Concept pairs and retain prompts with their encodings, made once and kept on the CPU; so are base outputs with --noise_seeds."""

    def __init__(self, pipe, pairs, retain, args):
        self.pipe, self.args, self.finals = pipe, args, {}
        prompts, neutrals = ([p[column] for p in pairs] + [r["prompt"] for r in retain] for column in ("prompt", "neutral_prompt"))
        text = encode(pipe, prompts + neutrals, args.max_sequence_length)
        self.text, self.base_text = text[:len(prompts)], text[len(prompts):]
        self.num_pairs, self.num_retain = len(pairs), len(retain)
        self.grid = (args.height // 16, args.width // 16)
        self.sigmas = {n: schedule(pipe, n, self.grid[0] * self.grid[1]) for n in step_counts(args)}

    def sample(self, rng, batch: int, retain_batch: int, latest=None, hard: float = 0.0) -> list[tuple[int, int]]:
        """[(case, noise seed)]: `batch` concept cases, then `retain_batch` retain cases; of each, the share `hard` in proportion to
        the `latest` (cases,) errors, those never seen (infinite) like the worst, and the rest evenly."""
        chosen = []
        for cases, size in ((range(self.num_pairs), batch), (range(self.num_pairs, self.num_pairs + self.num_retain), retain_batch)):
            count = round(hard * size)
            if count:
                weights = latest[cases.start:cases.stop]
                weights = weights.clamp(max=max([1e-6, *weights[weights.isfinite()].tolist()])) + 1e-6
                chosen += rng.choices(cases, weights.tolist(), k=count)
            chosen += rng.choices(cases, k=size - count)
        return [(case, TRAIN_NOISE + rng.randrange(self.args.noise_seeds or 2**20)) for case in chosen]

    def inputs(self, cases):
        """noise (B, T, C) and text of [(case, noise seed)]."""
        noise, device = init_latents(self.pipe, [seed for _, seed in cases], self.args.height, self.args.width), self.pipe.transformer.device
        return noise.to(device), stack([self.text[case] for case, _ in cases], device)

    def targets(self, cases, noise, num_inference_steps: int) -> torch.Tensor:
        """Base outputs (B, T, C) under the neutral prompt or the same prompt; with --noise_seeds, where they are met again, each is computed once."""
        def base_outputs(cases, noise):
            text = stack([self.base_text[case] for case, _ in cases], noise.device)
            return rollout(self.pipe.transformer, noise, text, self.sigmas[num_inference_steps], self.grid)[-1]

        if not self.args.noise_seeds:
            return base_outputs(cases, noise)
        keys = [(*case, num_inference_steps) for case in cases]
        for i, key in enumerate(keys):                             # one at a time: the same bits whatever else is in the batch
            if key not in self.finals:
                self.finals[key] = base_outputs(cases[i:i + 1], noise[i:i + 1])[0].cpu()
        return torch.stack([self.finals[key] for key in keys]).to(noise.device)

    def errors(self, gates, cases, micro_batch: int, backward: bool = False, num_inference_steps: int | None = None) -> torch.Tensor:
        """squared_errors (len(cases),) of the gated model; with backward, the objective's gradients in the gates."""
        transformer, errors, n = self.pipe.transformer, [], num_inference_steps or self.args.num_inference_steps
        for i in range(0, len(cases), micro_batch):
            part = cases[i:i + micro_batch]
            noise, text = self.inputs(part)
            target, is_concept = self.targets(part, noise, n), torch.tensor([case < self.num_pairs for case, _ in part], device=noise.device)
            with gated(transformer, gates):
                if backward:
                    loss_of_final = lambda final: objective(squared_errors(final, target), is_concept, self.args)[2]
                    _, final = rollout_backward(transformer, noise, text, self.sigmas[n], self.grid, loss_of_final, self.args.checkpoint)
                else:
                    final = rollout(transformer, noise, text, self.sigmas[n], self.grid)[-1]
            errors.append(squared_errors(final, target).detach())
        return torch.cat(errors).cpu()                             # read once: nothing waits for the GPU in between


def harms(cases: Cases, sites: dict[str, int], args, pictures: int) -> dict[str, torch.Tensor]:
    """What closing each gate alone does to retain prompts: h_i = E || dF/dg_i ||^2, a mean over latents as in squared_errors; {site: (units,)}.

    differs from paper: preserve_loss has no gradient where all gates are open, so erase_loss alone would choose the first to close. For binary gates
    sum_i h_i (1 - g_i) is the diagonal of its second-order expansion there, and has one. Hutchinson's estimate: h = E (J^T v)^2 for v ~ N(0, 1)."""
    transformer, generator = cases.pipe.transformer, torch.Generator().manual_seed(args.seed)
    harm = {site: torch.zeros(units, device=transformer.device) for site, units in sites.items()}
    chosen = cases.sample(random.Random(f"{args.seed} harm"), 0, pictures)
    for i in tqdm(range(0, pictures, args.micro_batch), desc="harm", disable=not PartialState().is_main_process):
        noise, text = cases.inputs(chosen[i:i + args.micro_batch])
        v = torch.randn(noise.shape, generator=generator).to(noise.device)
        gates = {site: torch.ones(len(noise), units, device=noise.device, requires_grad=True) for site, units in sites.items()}       # each picture's own
        with gated(transformer, gates):
            rollout_backward(transformer, noise, text, cases.sigmas[args.num_inference_steps], cases.grid, lambda final: (final.float() * v).sum(), args.checkpoint)
        for site, g in gates.items():
            harm[site] += g.grad.square().sum(0) / (pictures * noise[0].numel())
    return {site: h.cpu() for site, h in reduce(harm, "mean").items()}         # the same in every process, where a GPU's sums may differ


def train(cases: Cases, sites: dict[str, int], args, out_dir: Path) -> dict[str, torch.Tensor]:
    """The optimisation: args.steps of AdamW on the logits, resumable at any step in the same bits; returns the final mask. Under accelerate
    launch, each process takes its share of a step's cases and the gradients are summed."""
    state = PartialState()
    gate_logits = {site: torch.full((units,), START[args.gate]).requires_grad_() for site, units in sites.items()}
    optimizer = torch.optim.AdamW([dict(params=[logit]) for logit in gate_logits.values()], weight_decay=args.weight_decay, eps=args.adam_eps)
    latest = torch.full((cases.num_pairs + cases.num_retain,), math.inf)          # each case's error when it was last seen
    start = load_state(out_dir, gate_logits, optimizer, latest)
    threshold = closing_threshold(gate_logits, args.max_closed)
    harm = harms(cases, sites, args, min(960, args.steps * args.retain_batch)) if args.harm and start < args.steps else {}
    metrics = open(out_dir / "metrics.jsonl" if state.is_main_process else os.devnull, "a")
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="erase", disable=not state.is_main_process)
    for step in bar:
        began, rng = time.time(), random.Random(f"{args.seed} {step}")
        uniform = gate_noise(sites, args.seed, step) if args.gate == "hard_concrete" else {}
        relaxed = {site: relax(logit, args.gate, uniform.get(site), threshold) for site, logit in gate_logits.items()}
        gates = {site: g.detach().to(cases.pipe.transformer.device).requires_grad_() for site, g in relaxed.items()}
        chosen = cases.sample(rng, args.batch, args.retain_batch, latest=latest, hard=args.hard)
        num_inference_steps = rng.choice(step_counts(args))
        errors, mine = torch.zeros(len(chosen)), slice(state.process_index, None, state.num_processes)
        errors[mine] = cases.errors(gates, chosen[mine], args.micro_batch, True, num_inference_steps)
        errors, gradients = reduce([errors.to(cases.pipe.transformer.device), {site: g.grad for site, g in gates.items()}], "sum")
        errors = errors.cpu()
        erase_loss, preserve_loss, loss = torch.stack(objective(errors, torch.arange(len(chosen)) < args.batch, args)).tolist()
        if not (math.isfinite(loss) and all(g.isfinite().all() for g in gradients.values())):
            raise RuntimeError(f"step {step}: the loss is {loss} (erase {erase_loss}, preserve {preserve_loss}) or a gradient is not finite; "
                               "try a smaller --lr_ffn and --lr_norm")
        for site, group in zip(sites, optimizer.param_groups):
            group["lr"] = (args.lr_norm if "norm1" in site else args.lr_ffn) * (1 - args.lr_decay * step / args.steps)
        foresight = args.beta * args.harm * max(0.0, 1 - step / (0.7 * args.steps))         # of L + foresight sum_i h_i (1 - g_i)
        optimizer.zero_grad()
        torch.autograd.backward(list(relaxed.values()), [gradients[site].cpu() - foresight * harm.get(site, 0) for site in relaxed])
        optimizer.step()
        if num_inference_steps == args.num_inference_steps:            # else they are of another size
            latest[[case for case, _ in chosen]] = errors
        if args.gate == "sigmoid":                                 # above its start the gate is flat, and would stay there for ever
            [logit.data.clamp_(max=START["sigmoid"]) for logit in gate_logits.values()]
        threshold = closing_threshold(gate_logits, args.max_closed)
        row = dict(step=step, erase_loss=erase_loss, preserve_loss=preserve_loss, loss=loss, closed=closed_share(binary(gate_logits, threshold)),
                   sec_per_step=round(time.time() - began, 3))
        metrics.write(json.dumps(row) + "\n"), metrics.flush()
        bar.set_postfix(erase=f"{erase_loss:.4f}", preserve=f"{preserve_loss:.4f}", closed=f"{row['closed']:.1%}", sec=row["sec_per_step"])
        if state.is_main_process and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            save_state(out_dir, gate_logits, optimizer, latest, step + 1)
    metrics.close()
    return binary(gate_logits, threshold)


def save_state(out_dir: Path, gate_logits: dict, optimizer, latest: torch.Tensor, step: int) -> None:
    """Logits, AdamW's moments and the latest errors; random numbers are functions of (seed, step), so that is all a run needs to go on."""
    tensors = dict(latest=latest)
    for site, logit in gate_logits.items():
        tensors |= {f"{site}|logit": logit.detach()} | {f"{site}|{k}": optimizer.state[logit][k] for k in ("exp_avg", "exp_avg_sq")}
    write_atomically(out_dir / "state.safetensors", lambda p: save_file(tensors, p, dict(step=str(step))))


def load_state(out_dir: Path, gate_logits: dict, optimizer, latest: torch.Tensor) -> int:
    """Returns the step to go on from, 0 without a state; drops the metrics of steps that will be run again. Raises UserError."""
    path, step, kept = out_dir / "state.safetensors", 0, []
    if path.exists():
        try:
            with safe_open(path, "pt") as f:
                step = int(f.metadata()["step"])
                latest.copy_(f.get_tensor("latest"))
                for site, logit in gate_logits.items():
                    logit.data.copy_(f.get_tensor(f"{site}|logit"))
                    optimizer.state[logit] = dict(step=torch.tensor(float(step))) | {k: f.get_tensor(f"{site}|{k}") for k in ("exp_avg", "exp_avg_sq")}
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"--resume: {path} is damaged ({first_line(error)})") from None
        kept = (out_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[:step]
    if PartialState().is_main_process:
        write_atomically(out_dir / "metrics.jsonl", lambda p: p.write_text("".join(kept)))
    return step


# ---------------------------------------------------------------------------------------------------------- results
def draw(pipe, prompts: list, seeds: list[int], args, batch: int = 16) -> list:
    """One PIL picture per (prompt or its encoding, seed), through the same encode, rollout and decode as training."""
    text = encode(pipe, prompts, args.max_sequence_length) if isinstance(prompts[0], str) else prompts
    device, grid, pictures = pipe.transformer.device, (args.height // 16, args.width // 16), []
    sigmas = schedule(pipe, args.num_inference_steps, grid[0] * grid[1])
    for i in range(0, len(prompts), batch):
        noise = init_latents(pipe, seeds[i:i + batch], args.height, args.width).to(device)
        final = rollout(pipe.transformer, noise, stack(text[i:i + batch], device), sigmas, grid)[-1]
        pictures += decode(pipe, final, args.height, args.width)
    return pictures


def save_preview(path: Path, rows: list[tuple[str, list]], side: int = 128) -> None:
    """A sheet of labelled rows of pictures; small pictures are enlarged without smoothing, so that pixels stay what they are."""
    from PIL import Image, ImageDraw
    label, gap = 150, 4
    sheet = Image.new("RGB", (label + (side + gap) * max(len(p) for _, p in rows), (side + gap) * len(rows)), "white")
    for r, (title, pictures) in enumerate(rows):
        ImageDraw.Draw(sheet).text((6, r * (side + gap) + side // 2 - 12), title, fill="black", font_size=15)
        for c, picture in enumerate(pictures):
            resample = Image.NEAREST if picture.width <= side else Image.LANCZOS
            sheet.paste(picture.resize((side, side), resample), (label + c * (side + gap), r * (side + gap)))
    sheet.save(path)


def save_curves(path: Path, metrics: list[dict]) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key in ("erase_loss", "preserve_loss"):
        left.semilogy([m["step"] for m in metrics], [m[key] for m in metrics], label=key, linewidth=1)
    left.legend()
    left.set(xlabel="step", ylabel="mean squared error of final latents", ylim=(1e-4, None))
    right.plot([m["step"] for m in metrics], [100 * m["closed"] for m in metrics])
    right.set(xlabel="step", ylabel="gates closed, %", ylim=0)
    figure.savefig(path, dpi=110)


MODEL_CARD = """---
base_model: {model}
library_name: diffusers
tags: [concept-erasure, flux, text-to-image]
---
# {model} without: {concepts}

{summary}

Made by Minimalist Concept Erasure (ICML 2025, arXiv 2507.13386): {steps} steps on {pairs} prompt pairs and {retain} retain prompts, gates `{gate}` on
{modules}, beta {beta}, seed {seed}. The errors are mean squared errors of the final latents over {held_out} test prompts (of a
file without any, training prompts) and noises that training never had, gates folded. Whether the concept is still *seen* is for a judge to say, not for this loss.

```python
from erase import load_erased                      # a stock FluxPipeline; or FluxTransformer2DModel.from_pretrained(".../transformer")
pipe = load_erased("{out_dir}")
pipe("a photo", height={height}, width={width}, num_inference_steps={num_inference_steps}, guidance_scale={guidance_scale}, max_sequence_length={max_sequence_length}).images[0]
```
`mask.safetensors` is the mask alone and fits only base weights with fingerprint `{fingerprint}`; `config.json` is the exact run; `preview.png` shows
same-seed pairs on test prompts, which were never trained on; `metrics.jsonl` and `curves.png` are the losses; `state.safetensors` the optimiser's state.
"""


# ------------------------------------------------------------------------------------------------------ command line
def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--concept", nargs="+", required=True, help="what to erase, one or several: a file of prompts/ by name, or any words")
    add("--neutral", help='what template prompts have instead of the concept; "" is the empty prompt (tiny: nothing, else "")')
    add("--model", help=f"hub id or diffusers folder ({SCHNELL} with a CUDA GPU, else tiny/flux)")
    add("--preset", choices=PRESETS, help="column of defaults (tiny/flux: tiny, else paper)")
    add("--steps", type=int, default=400, help="optimiser steps (%(default)s)")
    for name, (paper, tiny, text) in DEFAULTS.items():
        add(f"--{name}", type=type(paper), choices=dict(gate=START, lr_decay=(0, 1)).get(name), help=f"{text} (paper: {paper}, tiny: {tiny})")
    add("--modules", nargs="+", choices=MODULES, default=["ffn", "norm"], help="what is gated (ffn norm)")
    add("--num_inference_steps", type=int, default=4, help="Euler steps of the sampler (%(default)s)")
    add("--prompts", type=Path, help="CSV of prompt pairs (prompts/<concept>.csv, or made from prompts/templates.csv)")
    add("--retain", type=Path, help="CSV of retain prompts (prompts/retain.csv)")
    add("--num_prompts", type=int, default=20, help="training pairs per concept (%(default)s)")
    add("--robust", action="store_true", help="train on other numbers of sampling steps too")
    add("--noise_seeds", type=int, default=0, help="starting noises per prompt, whose base outputs are kept; 0: a new one every time (%(default)s)")
    add("--micro_batch", type=int, help="pictures at a time, same result within rounding (tiny: all, else 1)")
    add("--checkpoint", choices=("auto", "none", "step", "block", "both"), help="what the backward recomputes; auto: as little as memory allows (tiny: none, else auto)")
    add("--quantize", choices=("none", *LIBRARIES), default="none", help="frozen weights in training; what is saved is folded into the original ones (%(default)s)")
    add("--offload", action="store_true", help="keep the blocks' frozen weights in CPU memory, for the smallest cards; goes with a larger --micro_batch")
    add("--compile", action="store_true", help="torch.compile each block; whether that pays on a GPU is not measured")
    add("--seed", type=int, default=0)
    add("--out_dir", type=Path, help="(erased/<concept>)")
    add("--save", choices=("full", "mask"), default="full", help="mask: no transformer folder, which is 24 GB for FLUX (%(default)s)")
    add("--save_every", type=int, default=10, help="steps between resumable states (%(default)s)")
    add("--resume", action="store_true", help="go on with the interrupted run of the same command")
    add("--device", help="(cuda if there is one, else cpu)")
    add("--dry_run", action="store_true", help="print the configuration, the number of gates and of prompts, and stop")
    args = p.parse_args(argv)

    cuda = torch.cuda.is_available()
    args.why = "--model" if args.model else "a CUDA GPU is here" if cuda else "no CUDA GPU here; FLUX.1-schnell needs one"
    args.model, args.device = args.model or (SCHNELL if cuda else TINY), args.device or ("cuda" if cuda else "cpu")
    args.is_tiny = Path(args.model).resolve() == Path(TINY).resolve()
    kind = "tiny" if args.is_tiny else "paper"
    args.preset = args.preset or kind
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:                            # the picture's size goes with the model, the rest with the preset
            column = kind if name in ("height", "width", "max_sequence_length") else args.preset
            setattr(args, name, values[PRESETS.index(column)])
    if args.micro_batch is None:
        args.micro_batch = args.batch + args.retain_batch if args.is_tiny else 1
    args.checkpoint = args.checkpoint or ("none" if args.is_tiny and not args.offload else "auto")
    args.prompt_dir = HERE / "prompts/tiny" if args.is_tiny else HERE / "prompts"
    args.out_dir = args.out_dir or Path("erased") / "_".join(re.sub(r"\W+", "_", c.lower()) for c in args.concept)
    return args


def check_device(device: str) -> None:
    """Raises UserError if torch cannot use it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {device}: {first_line(error)}") from None


def check_args(args) -> None:
    """What the command line alone can get wrong. Raises UserError."""
    counts = ("steps", "batch", "retain_batch", "num_prompts", "num_inference_steps", "save_every", "micro_batch")
    weights = ("beta", "harm", "lr_ffn", "lr_norm", "weight_decay", "adam_eps")
    limits = dict.fromkeys(counts, (1, math.inf, "at least 1")) | dict.fromkeys(weights, (0, sys.float_info.max, "a number >= 0"))
    limits |= dict.fromkeys(("hard", "max_closed"), (0, 1, "between 0 and 1")) | dict(seed=(0, 2**31 - 1, "between 0 and 2147483647"))
    limits |= dict(noise_seeds=(0, 2**20, "between 0 and 1048576"), max_sequence_length=(1, 512, "between 1 and 512"))
    for flag, (low, high, words) in (limits | dict.fromkeys(("height", "width"), (16, math.inf, "a multiple of 16 pixels"))).items():
        value = getattr(args, flag)
        if not low <= value <= high or low == 16 and value % 16:
            raise UserError(f"--{flag}: must be {words}, not {value}")
    library, out_dir = LIBRARIES.get(args.quantize), args.out_dir
    for wrong, message in (
            (any(not c.replace("_", " ").strip() for c in args.concept), "--concept: is empty"),
            (args.offload and args.checkpoint in ("none", "step"),
             f"--offload: needs --checkpoint block or both, not {args.checkpoint}, which keeps every block's weights for the backward"),
            # bitsandbytes keeps the weight by itself, past any checkpointing
            (args.offload and args.quantize == "nf4", "--offload: does not go with --quantize nf4"),
            # weights swapped inside a block; torchao's tensors, which torch 2.13 cannot differentiate
            (args.compile and args.offload, "--compile: does not go with --offload"),
            (args.compile and args.quantize == "fp8", "--compile: does not go with --quantize fp8"),
            (library and not find_spec(library), f"--quantize: {args.quantize} needs a library that is not here: pip install {library}"),
            (args.neutral is not None and args.prompts, "--neutral: goes with template prompts, not with --prompts"),
            (args.neutral and args.neutral != args.neutral.strip(), "--neutral: starts or ends with a blank"),
            (args.neutral and any(mentions(c, args.neutral) for c in args.concept), f"--neutral: {args.neutral!r} contains the concept"),
            (out_dir.exists() and not out_dir.is_dir(), f"--out_dir: {out_dir} is a file"),
            (out_dir.is_dir() and any(out_dir.iterdir()) and not args.resume,
             f"--out_dir: {out_dir} is not empty; choose another folder, or --resume its run"),
            (args.resume and not (out_dir / "config.json").is_file(), f"--resume: no run to go on with in {out_dir} (no config.json)")):
        if wrong:
            raise UserError(message)
    check_device(args.device)


def prepare(args) -> tuple:
    """Everything that can be wrong before a weight is loaded. Returns (pairs, tests, retain, retain tests, sites, memory plan, config)."""
    check_args(args)
    rows = [concept_pairs(concept, args) for concept in args.concept]
    pairs = [r for part in rows for r in [r for r in part if r["split"] == "train"][:args.num_prompts]]
    for concept, part in zip(args.concept, rows):
        if not any(r["split"] == "train" for r in part):
            raise UserError(f"--{'prompts' if args.prompts else 'concept'}: no training pairs for {concept!r}")
    tests = [r for part in rows for r in part if r["split"] == "test"] or pairs
    file = args.retain or args.prompt_dir / "retain.csv"
    retain = [r for r in read_prompts(file, "--retain", ("prompt", "evaluation_seed", "split")) if not any(mentions(c, r["prompt"]) for c in args.concept)]
    retain, retain_tests = ([r for r in retain if r["split"] == split] for split in ("train", "test"))
    if not retain:
        raise UserError(f"--retain: {file} has no training prompt without the concept")
    try:
        flux = FluxTransformer2DModel.load_config(args.model, subfolder="transformer")
        if flux.get("_class_name") != "FluxTransformer2DModel":
            raise ValueError(f"its transformer is a {flux.get('_class_name')}")
        with torch.device("meta"):
            meta = FluxTransformer2DModel.from_config(flux)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model: {args.model} is not a diffusers FLUX model: {first_line(error)}") from None
    shards = [file.stat().st_size for file in (Path(args.model) / "transformer").glob("*.safetensors")] or [2 * meta.num_parameters()]
    needed = 2**26 + (sum(shards) if args.save == "full" else 0)
    free = shutil.disk_usage(next(p for p in (args.out_dir.absolute(), *args.out_dir.absolute().parents) if p.exists())).free
    if free < needed:
        raise UserError(f"--out_dir: {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} needed; --save mask needs little")
    before = json.loads((args.out_dir / "config.json").read_text()) if args.resume else {}
    if args.checkpoint == "auto":                                  # what was chosen then, whatever is free now
        args.checkpoint = before.get("checkpoint", "auto")
    plan, model = plan_memory(meta, args), portable_name(args.model)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
              if k not in ("resume", "dry_run", "prompt_dir", "why", "device", "save_every", "out_dir", "is_tiny")}
    config |= dict(model=model, device_type=torch.device(args.device).type, versions={m.__name__: m.__version__ for m in (torch, diffusers, transformers)})
    if args.resume:
        if changed := [k for k in config if before.get(k) != config[k]]:
            raise UserError(f"--resume: --{changed[0]} was {before.get(changed[0])}, now {config[changed[0]]}; repeat the same command")
        if (args.out_dir / "mask.safetensors").exists():
            raise UserError(f"--resume: the run in {args.out_dir} is finished")
    return pairs, tests, retain, retain_tests or retain, gate_sites(meta, args.modules), plan, config


def run(args) -> None:
    state = PartialState(cpu=args.device == "cpu")
    if state.num_processes > 1:
        args.device = str(state.device)
        for flag in ("batch", "retain_batch"):
            if getattr(args, flag) % state.num_processes:
                raise UserError(f"--{flag}: {getattr(args, flag)} prompts cannot be split evenly over {state.num_processes} processes")
    began, (pairs, tests, retain, retain_tests, sites, plan, config) = time.time(), prepare(args)
    total, out_dir = sum(sites.values()), args.out_dir
    state.print(f"model: {config['model']} ({args.why}); preset {args.preset}; {total:,} gates in {len(sites)} layers; "
          f"{len(pairs)} concept pairs, {len(retain)} retain prompts\n{plan}", flush=True)
    if args.dry_run:
        return print(json.dumps(config, indent=1))
    pipe = load_pipeline(args.model, "cpu", default_dtype(args.device))     # mapped from its files, not read
    state.wait_for_everyone()                                      # all have looked whether out_dir is free
    if state.is_main_process:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(out_dir / "config.json", lambda p: p.write_text(json.dumps(config, indent=1) + "\n"))

    # text encoders go to the device first, if they fit, encode all there is to encode, and leave before the transformer comes
    base, encoders = fingerprint(pipe.transformer), torch.nn.ModuleList([pipe.text_encoder, pipe.text_encoder_2])
    if sum(p.nbytes for p in encoders.parameters()) + 2**30 < free_memory(args.device):
        encoders.to(args.device)
    pick = random.Random(f"{args.seed} held out").sample
    cases, held_out = Cases(pipe, pairs, retain, args), Cases(pipe, *(pick(rows, min(32, len(rows))) for rows in (tests, retain_tests)), args)
    shown = [("concept prompts", tests[:6]), ("other prompts", retain_tests[:6])]
    texts = [encode(pipe, [r["prompt"] for r in rows], args.max_sequence_length) for _, rows in shown]
    pipe.text_encoder = pipe.text_encoder_2 = encoders = None
    torch.cuda.empty_cache()
    quantized(pipe.transformer, args.quantize, "cpu" if args.offload else args.device)
    offload(pipe.transformer, args.device) if args.offload else pipe.transformer.to(args.device)
    if args.compile:
        compile_blocks(pipe.transformer)

    mask = train(cases, sites, args, out_dir)
    if not state.is_main_process:
        return

    unseen, errors, sheet = [(case, HELD_OUT_NOISE + case) for case in range(held_out.num_pairs + held_out.num_retain)], [], []
    for name, gates in (("base", {}), ("erased", mask)):           # the gated model is as good as the folded (test_fold_equals_hooks)
        errors.append([part.mean().item() for part in held_out.errors(gates, unseen, args.micro_batch).split((held_out.num_pairs, held_out.num_retain))])
        with gated(pipe.transformer, gates):
            sheet += [(f"{title}\n{name}", draw(pipe, text, [r["evaluation_seed"] for r in rows], args, args.micro_batch))
                      for text, (title, rows) in zip(texts, shown)]
    before, after = errors
    save_preview(out_dir / "preview.png", sorted(sheet, key=lambda row: row[0]))
    save_curves(out_dir / "curves.png", [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()])
    if args.save == "full":
        save_folded(args.model, pipe.transformer, mask, out_dir / "transformer")
    closed = sum((g == 0).sum().item() for g in mask.values())
    hardware = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    summary = (f"{closed:,} of {total:,} gates closed ({closed / total:.2%}) in {(time.time() - began) / 60:.1f} minutes on {hardware}; "
               + f"with {args.quantize} weights, " * (args.quantize != "none")
               + f"error on {tests[0]['split']} prompts: to the neutral picture {before[0]:.4f} -> {after[0]:.4f}, to the base on retain prompts 0 -> {after[1]:.4f}")
    (out_dir / "README.md").write_text(MODEL_CARD.format(**vars(args) | config | dict(
        modules=" and ".join(args.modules), concepts=", ".join(args.concept), pairs=len(pairs), retain=len(retain), summary=summary,
        held_out=len(unseen), fingerprint=base, guidance_scale=3.5 if pipe.transformer.config.guidance_embeds else 0)))
    save_mask(out_dir / "mask.safetensors", mask, base, model=config["model"], concepts=json.dumps(args.concept), seed=args.seed)   # last: the run is finished
    print(f"{summary}\nwrote {out_dir}/: {' '.join(sorted(p.name for p in out_dir.iterdir()))}\n"
          f"next: look at {out_dir}/preview.png, then python evaluate.py {out_dir}")


def main(argv=None) -> int:
    return exit_code("erase.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
