"""What a backward computes again instead of keeping it."""

import contextlib
import functools

from torch.utils.checkpoint import checkpoint as recompute

from lowmem import blocks_of


def recomputed(forward):
    """`forward`, computed again in the backward. Keyword arguments go in by position, for torch
    keeps tensors that it gets by keyword; no dropout, so no random state to restore."""

    @functools.wraps(forward)
    def run(*args, **kwargs):
        count = len(args)
        names = tuple(kwargs)

        def call(*values):
            return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

        values = (*args, *kwargs.values())
        return recompute(call, *values, use_reentrant=False, preserve_rng_state=False)

    return run


@contextlib.contextmanager
def checkpointed(transformer, checkpoint: str):
    """What a backward inside the `with` computes again.

    none   nothing; memory grows with the sampling steps
    step   each call of the transformer; the memory of one sampling step
    block  each block; the inputs of all blocks, and one block
    both   both; the memory of one block
    """
    modules = [transformer] if checkpoint in ("step", "both") else []
    if checkpoint in ("block", "both"):
        modules += blocks_of(transformer)
    before = [vars(module).get("forward") for module in modules]  # a compiled block's own
    for module in modules:
        module.forward = recomputed(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward:
                module.forward = forward
