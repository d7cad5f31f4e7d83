"""How many bytes a rollout and its backward take on the device, from a transformer's layers alone,
so that a plan can be made before any weight is loaded. Of any family: test_lowmem.py holds it to
what autograd really allocates in six of them."""

import inspect
import re
from typing import NamedTuple

import torch
from diffusers.models.normalization import RMSNorm

BYTES = dict(fp8=1, nf4=0.52)  # of a quantized weight
# Layers by their names: of the text's own stream; on one vector a picture, not on its tokens.
TEXT = re.compile(r"context|txt|add_|added")
MODULATION = re.compile(r"norm|mod|adaLN")
# Guidance runs everything once more without the prompt: in these pipelines in the same batch.
ONE_BATCH = ("StableDiffusion3", "ZImage", "AuraFlow", "Sana", "ErnieImage")


class Load(NamedTuple):
    """What a rollout asks of the transformer for each picture."""

    tokens: int
    text_tokens: int
    rows: int  # of a batch
    calls: int


def load_of(pipeline_class, call: dict) -> Load:
    """The load of pipe(**call). At most: some families cut the text to the longest prompt."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    given = {name: parameter.default for name, parameter in parameters.items()} | call
    name = pipeline_class.__name__
    if "true_cfg_scale" in given:  # FLUX.1, Qwen-Image
        guided = given["true_cfg_scale"] > 1 and given["negative_prompt"] is not None
    else:  # FLUX.2 [dev] hands the scale to its transformer
        least = 0 if name.startswith(("ZImage", "Krea2")) else 1
        guided = (given.get("guidance_scale") or 0) > least and name != "Flux2Pipeline"
    rows, calls = 1, given["num_inference_steps"]
    if guided and name.startswith(ONE_BATCH):
        rows = 2
    elif guided:
        calls *= 2
    side = 32 if name.startswith("Sana") else 16  # pixels: the VAE shrinks by 8, patches are 2 x 2
    tokens = given["height"] * given["width"] // side**2
    text_tokens = given.get("max_sequence_length") or 512
    if name.startswith("StableDiffusion3"):
        text_tokens += 77  # CLIP's, before T5's
    return Load(tokens, text_tokens, rows, calls)


def blocks_of(transformer) -> dict:
    """{dotted name: block}: the members of the ModuleLists directly below the transformer."""
    blocks = {}
    for name, child in transformer.named_children():
        if isinstance(child, torch.nn.ModuleList):
            blocks |= {f"{name}.{i}": block for i, block in enumerate(child)}
    return blocks


def tokens_of(name: str, load: Load) -> int:
    """What a block works on: Z-Image's and Lumina's refiners on the picture or the text alone."""
    if name.startswith("noise_refiner"):
        return load.tokens
    return load.text_tokens + load.tokens * (not name.startswith("context_refiner"))


def linear_layers(block, name: str, load: Load) -> dict:
    """{path: (outputs, inputs, tokens)} of the block's layers that work on tokens."""
    layers = {f"{name}.{path}": layer for path, layer in block.named_modules()}
    linear = [p for p, m in layers.items() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    has_text_stream = any(TEXT.search(path.removeprefix(name)) for path in linear)
    found = {}
    for path in linear:
        tokens = load.tokens if has_text_stream else tokens_of(name, load)
        if TEXT.search(path):
            tokens = load.text_tokens
        if not MODULATION.search(path):
            found[path] = (*layers[path].weight.shape[:2], tokens)
    return found


def forward_flops(transformer, load: Load) -> int:
    """Floating-point operations of one forward for one row of a batch: two for each weight and
    token in the blocks' linear layers, four for each pair of tokens and channel in attention."""
    total = 0
    for name, block in blocks_of(transformer).items():
        layers = linear_layers(block, name, load)
        total += sum(2 * outputs * inputs * tokens for outputs, inputs, tokens in layers.values())
        _, inner, _ = next(iter(layers.values()))
        total += 4 * tokens_of(name, load) ** 2 * inner
    return total


def block_needs(block, name: str, gated_layers: set, lora: set, load: Load, itemsize) -> tuple:
    """(what autograd keeps of a block, its inputs, what its backward takes for a while): numbers
    for one row of a batch.

    Frozen layers keep nothing themselves. But what they make goes into normalisations, activations
    and attention, which keep 1.5 numbers for each of their outputs (counted: 1.35 in FLUX.1 to 1.7
    in Z-Image). Gates keep what they multiply, a LoRA what its layer reads, in fp32.
    """
    linear = linear_layers(block, name, load)
    _, inner, of_picture = next(iter(linear.values()))
    everything = tokens_of(name, load)
    kept = 0
    for path, layer in block.named_modules():
        path = f"{name}.{path}"
        tokens = load.text_tokens if TEXT.search(path) else of_picture
        if path in linear:
            outputs, inputs, tokens = linear[path]
            copies = float(path in gated_layers)
            if path in lora:
                copies = copies + 4 / itemsize if itemsize < 4 else 1.0  # fp32 is no copy
            kept += tokens * (1.5 * outputs + inputs * copies)
        elif path in gated_layers or path in lora:
            # the text's AdaLN: what its scales and gates multiply
            kept += tokens * inner * 4
        elif type(layer) is RMSNorm and itemsize < 4:  # diffusers' own squares a copy in fp32
            kept += tokens * inner * 4 / itemsize
    if type(block).__name__.startswith("Chroma"):
        kept += everything**2  # an attention mask of its own
    widest = max(max(outputs, inputs) for outputs, inputs, _ in linear.values())
    return kept, everything * inner, 2.5 * everything * widest


def block_bytes(transformer, itemsize, quantize="none") -> int:
    """Of all blocks' weights: what --offload keeps in CPU memory."""
    sizes = [p.numel() for b in blocks_of(transformer).values() for p in b.parameters()]
    return round(sum(sizes) * BYTES.get(quantize, itemsize))


def refit_needs(transformer, load: Load, pictures: int, itemsize: int) -> int:
    """Bytes of CPU memory that refit.py takes: of each call of the transformer its inputs, what the
    last block of each list gave in two models, and what one stage's layers are to give: 0.8 to 1.25
    of it was found on tiny/."""
    blocks = blocks_of(transformer)
    lists = {name.rpartition(".")[0] for name in blocks}
    name, block = next(iter(blocks.items()))
    width, _, _ = next(iter(linear_layers(block, name, load).values()))
    of_state = (2 * len(lists) + 3) * width * (load.tokens + load.text_tokens)
    return pictures * load.calls * load.rows * of_state * itemsize


def memory_needed(
    transformer, *, sites, load, pictures, itemsize, checkpoint, quantize="none", offload=False,
    lora=(), lora_size=0,
) -> int:  # fmt: skip
    """Bytes: weights, what autograd keeps of so many pictures at a time, one block's backward, and
    1 GiB to spare. The transformer may be on torch's meta device.

    sites: what is gated, by gate_sites; itemsize: bytes of a stored weight, and of what is
    computed; checkpoint: a mode of recompute.py; lora: names of layers that learn a LoRA, of
    lora_size numbers in all; the others: the flags of erase.py.
    """
    gated_layers = set()
    for site in sites.values():
        gated_layers.update([site.consumer] if site.consumer else site.producers)
    blocks = blocks_of(transformer)
    keeping = gated_layers, set(lora), load, itemsize
    needs = [block_needs(block, name, *keeping) for name, block in blocks.items()]
    kept, inputs, backward = zip(*needs, strict=True)
    block_by_block = checkpoint in ("block", "both")
    calls = 1 if checkpoint in ("step", "both") else load.calls
    alive = max(backward) + calls * sum(inputs if block_by_block else kept)
    if block_by_block:
        alive += max(kept)
    alive *= pictures * load.rows * itemsize

    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks.values()]
    rest = sum(p.numel() for p in transformer.parameters()) - sum(sizes)
    weights = (rest + (max(sizes) if offload else sum(sizes))) * BYTES.get(quantize, itemsize)
    if quantize == "fp8":  # autograd keeps the weights that a block computed with
        weights += itemsize * (max(sizes) if block_by_block else calls * sum(sizes))
    learnt = 16 * lora_size  # in fp32: itself, its gradient and AdamW's two
    return round(weights + alive + learnt + 2**30)
