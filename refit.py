"""Fits a LoRA from nothing, in closed form and layer by layer in the order of computation: it is to
do what teachers do to their concepts, and leave all else as it was.

A change D (outputs, inputs) of a layer's weight minimises

      sum |(W + D) h + b - y|^2 + lambda |D|^2     lambda = strength x mean diagonal of H

over rows h, the layer's inputs in the model as changed so far, H = sum h h^T. On retain prompts,
along the base's own trajectory, y is what the base's layer gives; on a teacher's prompts, along its
own, y is what the teacher's gives (those rows count CONCEPT times). The teacher is the model that
heal.py tuned, or, where several are put together, each of them for its concept. The best R ranks of
D are the layer's LoRA. A closed neuron's h is 0: nothing brings it back.

Memory: H in fp64 of one stage's layers, never all h (FLUX.1's widest, 15,360 inputs: 1.9 GB, as
much again to solve). In CPU memory: for each state (a call of the transformer) and list of blocks
its last output, in two models, and what one stage's layers are to give (FLUX.1 at 512 pixels, bf16:
47 and 9 MB a state and picture; of 380 pictures in 4 steps 85 GB). Time: about 3 passes of base
and mended model over all states, whatever their depth, and 2 rows inputs^2 + inputs^3 / 3
operations a layer, as much again for its ranks.
"""

import contextlib
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from heal import ATTENTION, TEXT, adapted, best_ranks, lora_layers
from memory import blocks_of
from recompute import replaced

CONCEPT = 2.0  # weight of the concept prompts' rows
PICTURES = 80  # of concept prompts, at least
OF_SEVERAL = 40  # of each of several teachers', at most
NOISE = 2**41  # seeds far from those of training and of any evaluation


def stages(transformer, state) -> list:
    """[(blocks before it, layers)] in the order of computation. No layer of a stage reads what
    another one makes: they are the outputs of one attention, or of one block's FFNs, or the text's
    queries, keys and values."""
    blocks = blocks_of(transformer)
    layers = lora_layers(transformer)
    called = []
    with contextlib.ExitStack() as hooks:
        for name in (*blocks, *layers):
            layer = transformer.get_submodule(name)
            log = partial(lambda *_, name: called.append(name), name=name)
            hooks.enter_context(layer.register_forward_hook(log))
        args, kwargs = moved(state, next(transformer.parameters()).device)
        transformer(*args, **kwargs)

    def owner(name):
        attention = ATTENTION.fullmatch(name)
        if TEXT.fullmatch(name):
            return re.sub("add_[qkv]_proj$", "", name)
        return attention[1] if attention else ".".join(name.split(".")[:2])

    found, done = [], []
    for is_block, names in itertools.groupby(called, lambda name: name in blocks):
        if is_block:
            done = [*done, *names]
        else:
            found += [(done, list(stage)) for _, stage in itertools.groupby(names, owner)]
    return found


def moved(tree, device):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


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
        if int(index) <= last:
            return moved(output, device)
        output = forward(*args, **kwargs)
        if name in current["done"]:
            current["memory"][chain] = int(index), moved(output, "cpu")
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
            args, kwargs = moved(state, device)
            transformer(*args, **kwargs)
        return found

    device = next(transformer.parameters()).device
    names = {block: name for name, block in blocks_of(transformer).items()}
    with replaced(list(names), lambda block, forward: partial(run_block, names[block], forward)):
        yield run


def add_products(sums: dict, found: dict, targets: dict, weight: float) -> None:
    """Adds a state's rows to {layer: (sum h h^T, sum h (y - output)^T)}."""
    for name, (h, output) in found.items():
        error = targets[name].to(output.device).float() - output.float()
        h, error = h.float(), error * (output != 0)  # a closed gate's output stays 0
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


def states(transformer, sample, prompts, first_seed, batch) -> list:
    """[(args, kwargs)] with which the transformer is called while it samples: a seed a prompt."""
    found = []

    def keep(transformer, *inputs):
        found.append(moved(inputs, "cpu"))

    with transformer.register_forward_pre_hook(keep, with_kwargs=True):
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            sample(part, range(first_seed + start, first_seed + start + len(part)))
    return found


def pictures_of(pairs, retain) -> int:
    """On how many pictures a fit to one teacher is made, or at most to several."""
    return len(retain) + -(-PICTURES // len(pairs)) * len(pairs)


class Teacher(NamedTuple):
    """An erased model."""

    prompts: list[str]  # with its concept
    masked: Callable  # masked() is a context with its gates
    lora: dict


@torch.no_grad()
def refit(
    transformer, sample, masked, teachers, *, retain, strength, rank, batch=16, seed=0
) -> dict:
    """The LoRA, see above, fitted on a picture of each retain prompt and PICTURES or more of the
    teachers' prompts, of several at most OF_SEVERAL each. sample(prompts, seeds) draws them;
    masked() is a context with the mask's gates. Raises RuntimeError where a weight is not
    finite."""
    first_seed = NOISE + seed * 2**22
    groups = [(states(transformer, sample, retain, first_seed, batch), contextlib.nullcontext, {})]
    first_seed += 2**21  # after all noises that the retain prompts may take
    for i, teacher in enumerate(teachers):
        prompts = teacher.prompts * -(-PICTURES // (len(teacher.prompts) * len(teachers)))
        prompts = prompts if len(teachers) == 1 else prompts[:OF_SEVERAL]
        with adapted(transformer, teacher.lora), teacher.masked():
            own = first_seed + i * PICTURES * 100
            found = states(transformer, sample, prompts, own, batch)
        groups.append((found, teacher.masked, teacher.lora))
    every = [state for found, _, _ in groups for state in found]
    weights = [1.0] * len(groups[0][0])
    weights += [CONCEPT] * (len(every) - len(weights))
    lora = {}
    taught = [[{} for _ in found] for found, _, _ in groups]  # what blocks gave, by state
    student = [{} for _ in every]
    with replaying(transformer) as replay:
        for done, names in stages(transformer, every[0]):
            targets = []
            for (found, gates, change), memories in zip(groups, taught, strict=True):
                with adapted(transformer, change), gates():
                    for state, memory in zip(found, memories, strict=True):
                        rows = replay(state, names, done, memory)
                        targets.append({name: output.cpu() for name, (_, output) in rows.items()})
            sums = {}
            with adapted(transformer, lora), masked():
                for state, memory, target, weight in zip(
                    every, student, targets, weights, strict=True
                ):
                    add_products(sums, replay(state, names, done, memory), target, weight)
            for name in names:
                change = solve(*sums.pop(name), strength)
                if not change.isfinite().all():
                    raise RuntimeError(f"refit of {name}: a weight is not finite")
                lora[name] = best_ranks(change, rank)
    return lora
