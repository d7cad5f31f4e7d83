"""Erases what the mask left, and mends what it harmed: a LoRA on the layers that read gated
activations and on those of the text, learnt as the mask is, but from the latents after every
sampling step. differs from paper, which only closes neurons.

A LoRA is {layer: (A, B)}, A (R, inputs), B (outputs, R): the layer gives W h + b + B A h. It learns
end to end here; refit.py then fits it layer by layer. Its file has diffusers' names, for the base
under this mask.
"""

import contextlib
import hashlib
import itertools
import json
import re
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from memory import blocks_of
from safely import UserError, first_line, write_atomically
from sites import gate_sites

FORMAT = "minimalist-concept-erasure heal 2"
ATTENTION = re.compile(r"(.*)\.(to_out(\.0)?|to_add_out)")  # what an attention gives to its stream
# Where the text comes in, and its queries, keys, values and modulation: styles enter there.
TEXT = re.compile(
    r"context_embedder|txt_in(\.linear_[12])?|text_proj|caption_projection\.linear_[12]|"
    r".*text_embedder\.linear_[12]|(.*\.)?cap(tion)?_embedder\.1|"
    r".*\.(add_[qkv]_proj|norm1_context\.linear|txt_mod\.1)"
)


def readers(transformer) -> dict:
    """{name: linear layer} of all blocks' attention outputs, FFN outputs and, in single blocks,
    what reads both: the layers that read gated activations, or what comes of them."""
    names = {site.consumer for site in gate_sites(transformer, ("ffn", "mlp")).values()}
    blocks = tuple(f"{block}." for block in blocks_of(transformer))
    found = {}
    for name, layer in transformer.named_modules():
        is_reader = name in names or ATTENTION.fullmatch(name)
        if is_reader and name.startswith(blocks) and isinstance(layer, torch.nn.Linear):
            found[name] = layer
    return found


def lora_layers(transformer) -> dict:
    """{name: linear layer} that gets a LoRA: the readers, and those of the text."""
    found = readers(transformer)
    for name, layer in transformer.named_modules():
        if TEXT.fullmatch(name) and isinstance(layer, torch.nn.Linear):
            found[name] = layer
    return found


# ------------------------------------------------------------------------------------ as one vector
def shapes_of(transformer, rank: int) -> dict:
    """{layer: (shape of A, shape of B)}."""
    shapes = {}
    for name, layer in lora_layers(transformer).items():
        inputs, outputs = layer.in_features, layer.out_features
        least = min(rank, inputs, outputs)
        shapes[name] = (least, inputs), (outputs, least)
    return shapes


def size_of(transformer, rank: int) -> int:
    """How many numbers P a LoRA of this rank has."""
    shapes = itertools.chain(*shapes_of(transformer, rank).values())
    return sum(rows * columns for rows, columns in shapes)


def start(transformer, rank: int, seed: int) -> torch.Tensor:
    """(P,) a LoRA that changes nothing yet: A random, B zero."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for a, b in shapes_of(transformer, rank).values():
        parts += [torch.randn(a, generator=generator).flatten() / a[1] ** 0.5]
        parts += [torch.zeros(b).flatten()]
    return torch.cat(parts)


def as_lora(flat, shapes: dict) -> dict:
    """(P,) -> {layer: (A, B)}, views of it."""
    sizes = [a[0] * a[1] for a in itertools.chain(*shapes.values())]
    parts = iter(flat.split(sizes))
    return {name: (next(parts).view(a), next(parts).view(b)) for name, (a, b) in shapes.items()}


# ------------------------------------------------------------------------------------- in the model
@contextlib.contextmanager
def adapted(transformer, lora: dict):
    """Adds the LoRA, the weights untouched. The `with` must last until after the backward, and
    begin before that of gates, which multiply what both make."""

    def add_change(layer, inputs, output, a, b):
        h = inputs[0].to(a.dtype)
        change = h @ a.T.to(h.device) @ b.T.to(h.device)
        return output + change.to(output.dtype)

    with contextlib.ExitStack() as hooks:
        for name, (a, b) in lora.items():
            layer = transformer.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(partial(add_change, a=a, b=b)))
        yield


@torch.no_grad()
def merge(transformer, lora: dict) -> None:
    """Adds B A to the weights, in place. Fold the mask after it: closed neurons' weights stay 0."""
    for name, (a, b) in lora.items():
        weight = transformer.get_submodule(name).weight
        weight.copy_(weight.float() + b.to(weight.device).float() @ a.to(weight.device).float())


def joined(*loras: dict) -> dict:
    """Their sum, of the sum of their ranks, on the first one's device."""
    names = dict.fromkeys(name for lora in loras for name in lora)
    sums = {}
    for name in names:
        pairs = [lora[name] for lora in loras if name in lora]
        device = pairs[0][0].device
        a, b = zip(*[(a.to(device), b.to(device)) for a, b in pairs], strict=True)
        sums[name] = torch.cat(a), torch.cat(b, dim=1)
    return sums


def best_ranks(change, rank: int) -> tuple:
    """(A, B) whose product is nearest to the change (outputs, inputs)."""
    u, s, v = torch.linalg.svd(change.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def path_error(path, target) -> torch.Tensor:
    """(B,) mean over the N sampling steps of (N / k)^2 |x_k - y_k|^2, x_k and y_k the latents
    (B, ...) after step k of two paths that began in the same noise: of equal steps, the squared
    error of the mean velocity up to there. The final latents alone say little of early steps."""
    steps = len(path)
    total = 0
    for k, (x, y) in enumerate(zip(path, target, strict=True), 1):
        total = total + (steps / k) ** 2 * (x.float() - y.float()).square().flatten(1).mean(1)
    return total / steps


def tune(pipe, lora, learn, latest, first_step, state, on_step, *, steps, lr, rank, seed=0):
    """Learns what to add to the LoRA ({}: none yet). Returns the sum. learn(key, leaf, lora=...)
    adds a step's gradient to the leaf's and returns its losses; it keeps each case's error in
    `latest` (erase.learner). After each step on_step(losses, state), if any, is called; first_step
    and state go on from there."""
    shapes = shapes_of(pipe.transformer, rank)
    flat = start(pipe.transformer, rank, seed).to(pipe._execution_device).requires_grad_()
    optimizer = torch.optim.AdamW([flat], lr=lr, weight_decay=0.0)
    if state:
        latest.copy_(state["latest"])
        flat.data.copy_(state["lora"])
        moments = {name: state[name].to(flat.device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[flat] = dict(step=state["step"]) | moments
    is_quiet = dist.is_initialized() and dist.get_rank() > 0
    bar = tqdm(range(first_step, steps), "heal", steps, initial=first_step, disable=is_quiet)
    for step in bar:
        began = time.time()
        optimizer.zero_grad()
        losses = learn(f"{seed} heal {step}", flat, lora=joined(lora, as_lora(flat, shapes)))
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        bar.set_postfix_str("erase {erase_loss:.4f}, preserve {preserve_loss:.4f}".format(**losses))
        if on_step:
            metrics = dict(step=step) | losses | dict(sec_per_step=round(time.time() - began, 3))
            on_step(metrics, dict(latest=latest, lora=flat.detach(), **optimizer.state[flat]))
    return joined(lora, as_lora(flat.detach(), shapes))


# ------------------------------------------------------------------------------------------ on disk
def identity(base: dict, mask: dict) -> dict:
    digest = hashlib.sha256()
    for site, gate in sorted(mask.items()):
        digest.update(site.encode() + gate.to("cpu", torch.uint8).numpy().tobytes())
    return dict(format=FORMAT, base=base, mask=digest.hexdigest()[:32])


def save(path: Path, lora: dict, base: dict, mask: dict) -> None:
    """With diffusers' names, for base weights of these fingerprints under this mask. What it is for
    is one entry of metadata, since safetensors writes several in any order."""
    tensors = {}
    for name, (a, b) in lora.items():
        tensors[f"transformer.{name}.lora_A.weight"] = a.to("cpu", torch.float32).contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = b.to("cpu", torch.float32).contiguous()
    metadata = dict(heal=json.dumps(identity(base, mask), sort_keys=True))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: Path, transformer, base: dict, mask: dict) -> dict:
    """The LoRA. Raises UserError unless the file is whole, made for these base weights and this
    mask, and of the layers and shapes of this transformer."""
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            about = dict(json.loads((f.metadata() or {}).get("heal", "{}")))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from None
    for key, value in identity(base, mask).items():
        if about.get(key) != value:
            raise UserError(f"{path}: made for {key} {about.get(key)}, not {value}")
    lora = {}
    for name, layer in lora_layers(transformer).items():
        a, b = (tensors.get(f"transformer.{name}.lora_{x}.weight") for x in "AB")
        found = [list(part.shape) for part in (a, b) if part is not None]
        rank = found[0][:1] if found else []
        if found == [[*rank, layer.in_features], [layer.out_features, *rank]]:
            lora[name] = tensors.pop(f"transformer.{name}.lora_A.weight"), b
            del tensors[f"transformer.{name}.lora_B.weight"]
    if tensors or not lora:
        raise UserError(f"{path}: its tensors are not those of this model's layers")
    for name, pair in lora.items():
        if not all(part.dtype == torch.float32 and part.isfinite().all() for part in pair):
            raise UserError(f"{path}: {name} holds other than finite fp32 numbers")
    return lora
