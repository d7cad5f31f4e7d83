"""What a backward computes again instead of keeping it."""

import contextlib
import functools

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as recompute

from lowmem import blocks_of


def recomputed(forward):
    """`forward`, computed again in the backward. Its tensors go in one by one, whatever lists and
    keywords they come in, for torch keeps those that it does not see (rotary embeddings are a
    tuple); no dropout, so no random state to restore."""

    @functools.wraps(forward)
    def run(*args, **kwargs):
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
def checkpointed(transformer, checkpoint: str):
    """What a backward inside the `with` computes again. Raises ValueError for another mode.

    mode   computed again               kept in memory
    none   nothing                      all sampling steps
    step   each call of the transformer one sampling step
    block  each block                   the inputs of all blocks in all steps, and one block
    both   each call, and its blocks    the inputs of one step's blocks, and one block
    """
    if checkpoint not in ("none", "step", "block", "both"):
        raise ValueError(f"checkpoint is {checkpoint!r}, not none, step, block or both")
    modules = [transformer] if checkpoint in ("step", "both") else []
    if checkpoint in ("block", "both"):
        modules += blocks_of(transformer)
    with replaced(modules, lambda module, forward: recomputed(forward)):
        yield
