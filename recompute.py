"""What a backward computes again instead of keeping it."""

import contextlib
import functools
import itertools

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as recompute

import memory


def recomputed(forward, kept: int = 0):
    """`forward`, computed again in the backward, but for its kept-th call. Its tensors go in one by
    one, whatever lists and keywords they come in, for torch keeps those that it does not see
    (rotary embeddings are a tuple); no dropout, so no random state to restore."""
    calls = itertools.count(1)

    @functools.wraps(forward)
    def run(*args, **kwargs):
        if next(calls) == kept:
            return forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))

        def call(*leaves):
            args, kwargs = tree_unflatten(leaves, structure)
            return forward(*args, **kwargs)

        return recompute(call, *leaves, use_reentrant=False, preserve_rng_state=False)

    return run


@contextlib.contextmanager
def replaced(modules, wrap):
    """Inside the `with`, each module's forward is wrap(module, its forward)."""
    before = [vars(module).get("forward") for module in modules]  # set by compile or offload
    for module in modules:
        module.forward = wrap(module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward:
                module.forward = forward


@contextlib.contextmanager
def checkpointed(pipe, checkpoint: str, call: dict):
    """What the backward of one pipe(**call) inside the `with` computes again. Raises ValueError for
    another mode.

    mode   computed again               kept in memory
    none   nothing                      all sampling steps
    step   each call of the transformer one sampling step
    block  each block                   the inputs of all blocks in all steps, and one block
    both   each call, and its blocks    the inputs of one step's blocks, and one block

    The last call, whose backward comes at once, is the one that is kept first.
    """
    if checkpoint not in ("none", "step", "block", "both"):
        raise ValueError(f"checkpoint is {checkpoint!r}, not none, step, block or both")
    kept = {}  # {module: which of its calls is kept}
    if checkpoint in ("step", "both"):
        kept[pipe.transformer] = memory.load_of(type(pipe), call).calls
    if checkpoint in ("block", "both"):
        kept |= {block: 0 for block in memory.blocks_of(pipe.transformer).values()}
    with replaced(list(kept), lambda module, forward: recomputed(forward, kept[module])):
        yield
