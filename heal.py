"""Mends what closing neurons did to the prompts that should stay: after a mask, the open weights of
the layers that read gated activations are fitted again by ridge regression.

Layer by layer in the order of computation, a change (D, d) of weight and bias minimises

      sum |W h + b + D h + d - y|^2 + lambda |D, d|^2      lambda = strength x mean diagonal of G

over rows h, the layer's inputs in the model as mended so far. On retain prompts, along the base's
own trajectory, y is what the base's layer gives; on concept prompts, along the masked model's, y is
what the masked one's gives, so that the concept stays erased (those rows count CONCEPT times).
A closed neuron's h is 0, so its weights get no change.

Memory: G = sum h h^T of a stage's layers in fp64, never all h (FLUX.1's widest, 15,360 inputs:
1.9 GB, as much again to solve); for each state (a call of the transformer) and list of blocks its
last output, in two models, and a layer's (FLUX.1 at 512 pixels, bf16: 47 MB a state and picture).
Time: sampling, then about 3 passes of base and mended model over all states, whatever their depth,
and 2 rows inputs^2 + inputs^3 / 3 operations a layer.
"""

import contextlib
import hashlib
import itertools
import json
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memory import blocks_of
from recompute import replaced
from safely import UserError, first_line, write_atomically
from sites import gate_sites

FORMAT = "minimalist-concept-erasure heal 1"
ATTENTION = re.compile(r"(.*)\.(to_out(\.0)?|to_add_out)")  # what an attention gives to its stream
CONCEPT = 4.0  # weight of the concept prompts' rows
NOISE = 2**42  # seeds far from those of training and of any evaluation


def readers(transformer) -> dict:
    """{name: linear layer} of all blocks' attention outputs, FFN outputs and, in single blocks,
    what reads both."""
    names = {site.consumer for site in gate_sites(transformer, ("ffn", "mlp")).values()}
    blocks = tuple(f"{block}." for block in blocks_of(transformer))
    found = {}
    for name, layer in transformer.named_modules():
        is_reader = name in names or ATTENTION.fullmatch(name)
        if is_reader and name.startswith(blocks) and isinstance(layer, torch.nn.Linear):
            found[name] = layer
    return found


def states(pipe, prompts, first_seed, call, batch) -> list:
    """[(args, kwargs)] of the transformer's calls while it samples: a prompt, a seed."""
    from erase import rollout  # which may import this file

    found = []

    def keep(transformer, args, kwargs):
        found.append((args, kwargs))

    with pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True):
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            seeds = [first_seed + start + i for i in range(len(part))]
            rollout(pipe, part, seeds, **call)
    return found


def stages(transformer, state) -> list:
    """[(blocks before it, layers)] in the order of computation. No layer of a stage reads what
    another one makes: they are the outputs of one attention, or of one block's FFNs."""
    blocks = blocks_of(transformer)
    called = []
    with contextlib.ExitStack() as hooks:
        for name in (*blocks, *readers(transformer)):
            layer = transformer.get_submodule(name)
            log = partial(lambda *_, name: called.append(name), name=name)
            hooks.enter_context(layer.register_forward_hook(log))
        transformer(*state[0], **state[1])

    def owner(name):
        attention = ATTENTION.fullmatch(name)
        return attention[1] if attention else ".".join(name.split(".")[:2])

    found, done = [], []
    for is_block, names in itertools.groupby(called, lambda name: name in blocks):
        if is_block:
            done = [*done, *names]
        else:
            found += [(done, list(layers)) for _, layers in itertools.groupby(names, owner)]
    return found


class Stop(Exception):
    """Raised in a forward when all that is wanted of it is known."""


@contextlib.contextmanager
def replaying(transformer):
    """Gives run(state, layers, done, memory) -> {layer: (what it reads, what it makes)}, a row a
    token. It computes no further than these layers, and no block that the state's memory knows:
    {} at first, it gets the output of blocks in `done`. A list's blocks are a chain, so the memory
    of its last is enough."""
    current = dict(done=(), memory={})

    def run_block(name, forward, *args, **kwargs):
        chain, _, index = name.rpartition(".")
        last, output = current["memory"].get(chain, (-1, None))
        if int(index) > last:
            output = forward(*args, **kwargs)
            if name in current["done"]:
                current["memory"][chain] = int(index), output
        return output

    def run(state, layers, done, memory):
        current.update(done=done, memory=memory)
        found = {}

        def keep(layer, inputs, output, name):
            found[name] = inputs[0].flatten(0, -2), output.flatten(0, -2)
            if len(found) == len(layers):
                raise Stop

        with contextlib.ExitStack() as hooks, contextlib.suppress(Stop):
            for name in layers:
                hook = partial(keep, name=name)
                layer = transformer.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(hook))
            transformer(*state[0], **state[1])
        return found

    names = {block: name for name, block in blocks_of(transformer).items()}
    with replaced(list(names), lambda block, forward: partial(run_block, names[block], forward)):
        yield run


def makes(rows: dict) -> dict:
    """{layer: its outputs}, so that the inputs are freed."""
    return {name: output for name, (_, output) in rows.items()}


def add_products(sums: dict, found: dict, targets: dict, weight: float, layers: dict) -> None:
    """Adds a state's rows to {layer: (sum h h^T, sum h (y - output)^T)}; with a bias, h ends in a
    column of ones."""
    for name, (h, output) in found.items():
        error = targets[name].float() - output.float()
        h = h.float()
        if layers[name].bias is not None:
            h = torch.nn.functional.pad(h, (0, 1), value=1.0)
        products = weight * h.T @ h, weight * h.T @ error
        if name not in sums:
            sums[name] = [torch.zeros_like(p, dtype=torch.double) for p in products]
        for total, product in zip(sums[name], products, strict=True):
            total += product


def solve(gram, right, strength: float):
    """(outputs, inputs), the ridge regression's."""
    ridge = strength * gram.diagonal().mean().clamp(min=1e-30)
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram)).T.float()


@contextlib.contextmanager
def mended(transformer, deltas: dict):
    """As if the deltas were added to the weights, which stay as they are."""

    def add_change(layer, inputs, output, name):
        bias = deltas.get(f"{name}.bias")
        change = torch.nn.functional.linear(inputs[0].float(), deltas[f"{name}.weight"], bias)
        return output + change.to(output)

    with contextlib.ExitStack() as hooks:
        for name in {name.rpartition(".")[0] for name in deltas}:
            hook = partial(add_change, name=name)
            hooks.enter_context(transformer.get_submodule(name).register_forward_hook(hook))
        yield


@torch.no_grad()
def heal(
    pipe, mask, prompts, retain, *, call, strength=0.01, draws=(4, 1), batch=64, seed=0
) -> dict:
    """{name of a weight or bias: what to add to it} for a pipeline whose transformer is the base,
    which stays as it is. prompts: with the concept; draws: noises of each of them and of each
    retain prompt; call: what pipe(...) takes."""
    from erase import gated  # which may import this file

    transformer, layers = pipe.transformer, readers(pipe.transformer)
    first_seed = NOISE + seed * 2**24
    kept = states(pipe, [*retain] * draws[1], first_seed, call, batch)
    with gated(transformer, mask):
        erased = states(pipe, [*prompts] * draws[0], first_seed + 2**23, call, batch)
    every = [*kept, *erased]
    weights = [1.0] * len(kept) + [CONCEPT] * len(erased)
    teacher, student = [{} for _ in every], [{} for _ in every]  # what blocks gave, by state
    deltas = {}
    order = stages(transformer, every[0])
    with replaying(transformer) as replay:
        for done, names in order:

            def found(states, memories):
                for state, memory in zip(states, memories, strict=True):
                    yield replay(state, names, done, memory)

            sums = {}
            targets = [makes(rows) for rows in found(kept, teacher[: len(kept)])]
            with gated(transformer, mask):
                targets += [makes(rows) for rows in found(erased, teacher[len(kept) :])]
                with mended(transformer, deltas):
                    for i, rows in enumerate(found(every, student)):
                        add_products(sums, rows, targets[i], weights[i], layers)
            for name in names:
                change = solve(*sums.pop(name), strength)
                inputs = layers[name].in_features
                deltas[f"{name}.weight"] = change[:, :inputs].contiguous()
                if layers[name].bias is not None:
                    deltas[f"{name}.bias"] = change[:, inputs].contiguous()
    return deltas


@torch.no_grad()
def apply(transformer, deltas: dict) -> None:
    """Adds them to the weights, in place; after the mask was folded in."""
    for name, delta in deltas.items():
        parameter = transformer.get_parameter(name)
        parameter.add_(delta.to(parameter.device))


# ------------------------------------------------------------------------------------------ on disk
def identity(base: str, mask_file: Path) -> dict:
    mask = hashlib.sha256(mask_file.read_bytes()).hexdigest()[:32]
    return dict(format=FORMAT, base=base, mask=mask)


def save(path: Path, deltas: dict, base: str, mask_file: Path) -> None:
    """For base weights of fingerprint `base` and the mask in that file."""
    tensors = {name: delta.to("cpu", torch.float32) for name, delta in deltas.items()}
    metadata = dict(heal=json.dumps(identity(base, mask_file), sort_keys=True))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: Path, transformer, base: str, mask_file: Path) -> dict:
    """Raises UserError unless the file is whole, made for these base weights (of fingerprint
    `base`) and this mask, and of exactly the right tensors."""
    try:
        with safe_open(path, "pt") as f:
            deltas = {name: f.get_tensor(name) for name in f.keys()}
            about = json.loads((f.metadata() or {}).get("heal", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from None
    for key, value in identity(base, mask_file).items():
        if about.get(key) != value:
            raise UserError(f"{path}: made for {key} {about.get(key)}, not {value}")
    shapes = {}
    for name, layer in readers(transformer).items():
        shapes |= {f"{name}.{end}": p.shape for end, p in layer.named_parameters()}
    if {name: delta.shape for name, delta in deltas.items()} != shapes:
        raise UserError(f"{path}: its tensors are not those of this model's layers")
    if not all(d.dtype == torch.float32 and d.isfinite().all() for d in deltas.values()):
        raise UserError(f"{path}: it holds other than finite fp32 numbers")
    return deltas
