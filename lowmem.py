"""Big transformers of any family on small cards: what fits (memory.py), weights in fewer bits or in
CPU memory, compiled blocks."""

import functools
import itertools
import os
from importlib.util import find_spec

import psutil
import torch

import memory
from models import default_dtype, is_cpu
from safely import UserError, number

FLAGS = ("checkpoint", "micro_batch", "quantize", "offload", "compile")
MICRO_BATCHES = (16, 8, 4, 2, 1)
LIBRARIES = dict(fp8="torchao", nf4="bitsandbytes")  # that --quantize needs


def add_flags(parser) -> None:
    add = parser.add_argument
    help = "pictures at a time, same result within rounding (16, or fewer if only they fit)"
    add("--micro_batch", type=number(int, 1), help=help)
    help = "what the backward computes again; auto: what fits (embedded models: none, else auto)"
    add("--checkpoint", choices=("auto", "none", "step", "block", "both"), help=help)
    help = "frozen weights in training; what is saved has the original ones (%(default)s)"
    add("--quantize", choices=("none", *LIBRARIES), default="none", help=help)
    help = "the blocks' frozen weights stay in CPU memory; goes with a larger --micro_batch"
    add("--offload", action="store_true", help=help)
    help = "torch.compile each block; whether that pays on a GPU is not measured"
    add("--compile", action="store_true", help=help)


def blocks_of(transformer) -> list:
    return list(memory.blocks_of(transformer).values())


def free_memory(device) -> int:
    """Bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


# -------------------------------------------------------------------------------------------- plan
def check_combination(*, checkpoint, quantize, offload, compile) -> None:
    """Raises UserError for flags that do not go together, or a library that is not here."""
    library = LIBRARIES.get(quantize)
    if offload and checkpoint in ("none", "step"):
        why = "which keeps every block's weights for the backward"
        raise UserError(f"--offload: needs --checkpoint block or both, not {checkpoint}, {why}")
    if offload and quantize == "nf4":  # bitsandbytes keeps the weight, past any checkpointing
        raise UserError("--offload: does not go with --quantize nf4")
    if compile and offload:  # weights swapped inside a block
        raise UserError("--compile: does not go with --offload")
    if compile and quantize == "fp8":  # torchao's tensors, which torch 2.13 cannot differentiate
        raise UserError("--compile: does not go with --quantize fp8")
    if library and not find_spec(library):
        found = f"{quantize} needs a library that is not here: pip install {library}"
        raise UserError(f"--quantize: {found}")


def plan(
    transformer, others, pipeline_class, sites, call, device,
    *, checkpoint, micro_batch, quantize="none", offload=False, compile=False, lora=(), lora_size=0,
    refitted=0,
) -> tuple[dict, str]:  # fmt: skip
    """({checkpoint, micro_batch}, a line that says why): of "auto" the fastest that fits, with as
    many pictures as fit where micro_batch is None. The transformer may be on torch's meta device.
    others: {other part: parameters}; call: what pipe(...) takes; after the *: FLAGS, which layers
    learn a LoRA of how many numbers, and on how many pictures refit.py fits it.

    On a CPU everything counts, and --quantize and --offload save nothing. Raises UserError for
    flags that do not go together, and, with what would fit, if nothing does. Processes of torchrun
    on one host share its memory evenly.
    """
    check_combination(checkpoint=checkpoint, quantize=quantize, offload=offload, compile=compile)
    modes = [checkpoint]
    if checkpoint == "auto":
        modes = ["block", "both"] if offload else ["none", "step", "block", "both"]
    counts = [micro_batch] if micro_batch else MICRO_BATCHES
    itemsize = default_dtype(device, transformer).itemsize
    encoders = itemsize * sum(size for part, size in others.items() if "text" in part)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of torchrun on this host
    free, free_of_host = free_memory(device), free_memory("cpu") // sharing
    beside = 0
    if is_cpu(device):
        quantize, offload = "none", False
        free = free_of_host
        beside = itemsize * sum(others.values())
    load = memory.load_of(pipeline_class, call)
    needed = functools.partial(memory.memory_needed, transformer, sites=sites, load=load)
    needed = functools.partial(needed, lora=lora, lora_size=lora_size)

    def needs(mode, count, quantize, offload):
        how = dict(quantize=quantize, offload=offload, itemsize=itemsize)
        return needed(checkpoint=mode, pictures=count, **how) + beside

    of_host = memory.block_bytes(transformer, itemsize, quantize)
    if offload and of_host > free_of_host:
        found = f"{of_host / 2**30:.1f} GiB of CPU memory, {free_of_host / 2**30:.1f} GiB are free"
        raise UserError(f"--offload: needs about {found}")
    for mode, count in itertools.product(modes, counts):
        size = needs(mode, count, quantize, offload)
        found = f"needs about {size / 2**30:.1f} GiB of {device}, {free / 2**30:.1f} GiB are free"
        if size <= free:
            line = f"checkpoint {mode}, micro_batch {count}: {found}"
            if encoders + 2**30 >= free:  # as encode_all sees it
                size = f"{encoders / 2**30:.1f} GiB"
                line += f"; the text encoders, {size}, do not fit there and encode on the CPU"
            of_refit = memory.refit_needs(transformer, load, refitted, itemsize)
            if of_refit > free_of_host:
                found = f"{of_refit / 2**30:.1f} GiB of CPU memory"
                advice = "try fewer --retain prompts, a smaller --height and --width, or --refit 0"
                raise UserError(f"--refit: needs about {found}; {advice}")
            return dict(checkpoint=mode, micro_batch=count), line

    ways = [("none", False)]
    if not is_cpu(device):
        ways += [("fp8", False), ("nf4", False)]
        ways += [("none", True)] * (memory.block_bytes(transformer, itemsize) <= free_of_host)
    fitting = []
    for kind, moved in ways:
        size = needs("both", 1, kind, moved)
        flags = f" --quantize {kind}" * (kind != "none") + " --offload" * moved
        if size <= free:
            fitting.append(f"--checkpoint both --micro_batch 1{flags} ({size / 2**30:.1f} GiB)")
    advice = "nothing fits; try a smaller --height and --width"
    if fitting:
        advice = "these would fit: " + "; ".join(fitting)
    raise UserError(f"--checkpoint: {mode} {found}; {advice}")


# ------------------------------------------------------------------------------- what is done to it
def place(pipe, device, kind="none", offloaded=False, compiled=False) -> None:
    """The transformer and the VAE to the device, as --quantize, --offload and --compile say."""
    quantize(pipe.transformer, kind, "cpu" if offloaded else device)
    if offloaded:
        offload(pipe.transformer, device)
    else:
        pipe.transformer.to(device)
    pipe.vae.to(device)  # where it is the pipeline makes its noise
    if compiled:
        compile_blocks(pipe.transformer)


def quantize(transformer, kind: str, device) -> None:
    """The frozen linear layers' weights in 8 bits (torchao) or 4 (bitsandbytes), layer by layer on
    the device; they compute in the dtype they had. The libraries' own calls, for diffusers' way to
    nf4 refuses a CPU, where it could be tested."""
    if kind == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig, quantize_

        quantize_(transformer, Float8WeightOnlyConfig(), device=device)
    elif kind == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, linear in list(transformer.named_modules()):
            if type(linear) is torch.nn.Linear:
                options = dict(compute_dtype=linear.weight.dtype, quant_type=kind, device="meta")
                new = Linear4bit(linear.in_features, linear.out_features, **options)
                weight = linear.weight.data
                new.weight = Params4bit(weight, requires_grad=False, quant_type=kind, module=new)
                new.bias = linear.bias
                transformer.set_submodule(name, new.to(device))


def pack(parameters: list, pin: bool, chunk: int = 2**30) -> None:
    """Moves the parameters' weights side by side into buffers of `chunk` bytes, page-locked if pin.
    torch gives every page-locked tensor a power of two of bytes: one by one, FLUX.1's 22 GiB of
    blocks would take 34."""
    buffer = torch.empty(0)
    start = 0
    for p in parameters:
        size = p.data.nbytes
        if start + size > buffer.nbytes:
            buffer = torch.empty(max(chunk, size), dtype=torch.uint8, pin_memory=pin)
            start = 0
        place = buffer[start : start + size].view(p.dtype).view(p.shape)
        p.data = place.copy_(p.data)
        start += -(-size // 64) * 64  # every weight starts at a multiple of 64 bytes


def offload(transformer, device) -> None:
    """Keeps the blocks' weights in CPU memory: a block computes with copies on the device that go
    when it is done. With block checkpointing (only then) autograd keeps no copy either: the
    recompute makes new ones, which live until the block's backward is through.

    Not diffusers' group offloading: that swaps param.data under autograd. Linear layers then keep
    the device's copy until the backward, and the norms of q and k find the CPU's in it.
    """

    def on_device(block, forward, *args, **kwargs):
        stores = [module._parameters for module in block.modules()]
        own = [dict(store) for store in stores]
        try:
            for store in stores:
                for name, p in store.items():
                    store[name] = p if p is None else p.to(device, non_blocking=True)
            return forward(*args, **kwargs)
        finally:
            for store, weights in zip(stores, own, strict=True):
                store.update(weights)

    blocks = blocks_of(transformer)
    if not is_cpu(device):  # page-locked memory copies faster, and without waiting
        weights = [p for block in blocks for p in block.parameters()]
        pack([p for p in weights if type(p.data) is torch.Tensor], pin=True)
    for block in blocks:
        block.forward = functools.partial(on_device, block, block.forward)
    for child in transformer.children():
        if not isinstance(child, torch.nn.ModuleList):
            child.to(device)
    for tensor in (*transformer.parameters(recurse=False), *transformer.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)


def compile_blocks(transformer, **options) -> None:
    """torch.compile block by block, inside any recompute. By torch's default nothing checks whether
    hooks came or went before a graph is used again, so that a block compiled for a base picture
    would leave its gates out for ever: switched on here (test_compiled_blocks_see_their_gates)."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = 64  # with gates or not, gradients or not, any batch size
    for block in blocks_of(transformer):
        block.forward = torch.compile(block.forward, **options)
