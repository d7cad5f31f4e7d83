"""Where gates sit in a transformer: a table of layer names, and what follows from it."""

import contextlib
from functools import partial
from typing import NamedTuple

import torch

from safely import UserError

# What is gated, by the layers' names: who makes the units, who reads them. Gates multiply what the
# reader reads, or, without a reader, what the makers make. A gated FFN makes each neuron twice.
PARTS = dict(
    ffn=[  # hidden neurons of the feed-forward layers
        (("net.0.proj",), "net.2"),  # FLUX.1, SD3, Qwen-Image, Chroma
        (("linear_in",), "linear_out"),  # FLUX.2
        (("w1", "w3"), "w2"),  # Z-Image
        (("linear_1", "linear_3"), "linear_2"),  # Lumina 2
        (("linear_1", "linear_2"), "out_projection"),  # AuraFlow
        (("gate", "up"), "down"),  # Krea 2
        (("proj", "gate_layer"), "out"),  # Qwen-Image 2.1
        (("gate_proj", "up_proj"), "linear_fc2"),  # ERNIE-Image
        (("conv_inverted", "conv_depth"), "conv_point"),  # Sana
    ],
    norm=[  # shifts, scales and gates of the text's AdaLN, where each block has its own
        (("norm1_context.linear",), None),  # FLUX.1, SD3, AuraFlow
        (("txt_mod.1",), None),  # Qwen-Image
        (("adaLN_modulation.0",), None),  # Z-Image, whose text and picture share all layers
    ],
    # differs from paper: channels of the text's keys and values, where styles enter the picture
    kv=[(("add_k_proj",), None), (("add_v_proj",), None)],
    heads=[(("to_v", "add_v_proj"), None), (("to_v",), None)],  # attention heads, by their values
    # neurons beside attention in single blocks: of FLUX.1 and Chroma, of FLUX.2
    mlp=[(("proj_mlp",), "proj_out"), (("to_qkv_mlp_proj",), "to_out")],
)
MODULES = tuple(PARTS)
TOKENS_FIRST = "linear_fc2"  # ERNIE-Image's FFN computes on (tokens, B, units)
NO_PICTURES = "layerwise_blocks"  # Krea 2: a batch of tokens there, not of pictures


class Site(NamedTuple):
    """The gates of one layer, which is the consumer, or else the first producer. Layers are dotted
    module names."""

    units: int
    producers: tuple  # the layers whose output rows are the units
    consumer: str | None  # whose last input columns read them; those before are attention's


def width(layer) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or a convolution."""
    if isinstance(layer, torch.nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def gate_sites(transformer, modules=("ffn", "norm")) -> dict:
    """{name of the layer at which the gates multiply: Site}, read off the layers' names and sizes.
    Raises UserError for a transformer without a known feed-forward layer."""
    layers = dict(transformer.named_modules())
    sites = {}
    for name, module in layers.items():
        for kind in modules:
            for makers, reader in PARTS[kind]:
                producers = tuple(f"{name}.{maker}" for maker in makers)
                consumer = f"{name}.{reader}" if reader else None
                site = consumer or producers[0]
                found = all(hasattr(layers.get(part), "weight") for part in (site, *producers))
                if not found or site in sites or NO_PICTURES in name:
                    continue
                inputs, outputs = width(layers[site])
                if kind == "ffn":
                    units = inputs
                elif kind == "mlp":  # beside them the reader gets the attention's outputs
                    units = inputs - outputs
                elif kind == "heads":  # Krea 2's attention does not say how many it has
                    units = outputs * getattr(module, "heads", 0) // width(module.to_q)[1]
                else:
                    units = outputs
                if units:
                    sites[site] = Site(units, producers, consumer)
    if "ffn" in modules and not any(site.consumer for site in sites.values()):
        raise UserError(f"--model: no feed-forward layer known in {type(transformer).__name__}")
    return sites


def absent(transformer, modules) -> str:
    """Text for a run's first line: which of the modules no block has to itself, as where one
    modulation serves all blocks (FLUX.2). Raises UserError if that is so of all of them."""
    missing = [module for module in modules if not gate_sites(transformer, (module,))]
    names = " and ".join(missing)
    if len(missing) == len(modules):
        raise UserError(f"--modules: no block of {type(transformer).__name__} has its own {names}")
    return f" ({names}: no block has its own, not gated)" if missing else ""


def shaped(gate, x, layer, is_read: bool, tokens_first: bool = False):
    """A site's gates, (U,) or (B, U), shaped to multiply x, what the layer reads or makes:
    (B, ..., channels), (tokens, B, channels) or (B, channels, height, width). No layer's name comes
    in here, so that compiled blocks of one kind share their graphs."""
    is_convolution = isinstance(layer, torch.nn.Conv2d)
    channels = x.shape[1 if is_convolution else -1]
    if is_read:  # the units are its last channels
        gate = torch.nn.functional.pad(gate, (channels - gate.shape[-1], 0), value=1.0)
    else:  # neighbouring channels make one head
        gate = gate.repeat_interleave(channels // gate.shape[-1], -1)
    if gate.dim() == 2:
        gate = gate.repeat(x.shape[int(tokens_first)] // len(gate), 1)  # guidance doubles B
        if not is_convolution and not tokens_first:
            gate = gate.view(len(gate), *[1] * (x.dim() - 2), channels)
    if is_convolution:
        gate = gate[..., None, None]
    return gate.to(x)


@contextlib.contextmanager
def gated(transformer, gates: dict):
    """Multiplies each site's units by its gates: (U,), or (B, U) for a row a picture. The `with`
    must last until after the backward. Raises ValueError for gates that do not fit."""
    sites = gate_sites(transformer, MODULES)

    def scale_input(layer, inputs, gate, tokens_first):
        return (inputs[0] * shaped(gate, inputs[0], layer, True, tokens_first), *inputs[1:])

    def scale_output(layer, inputs, output, gate):
        return output * shaped(gate, output, layer, False)

    with contextlib.ExitStack() as hooks:
        for name, gate in gates.items():
            if name not in sites or gate.shape[-1] != sites[name].units:
                raise ValueError(f"{name}: {gate.shape[-1]} gates do not fit {sites.get(name)}")
            if sites[name].consumer:
                reader = transformer.get_submodule(name)
                hook = partial(scale_input, gate=gate, tokens_first=name.endswith(TOKENS_FIRST))
                hooks.enter_context(reader.register_forward_pre_hook(hook))
                continue
            for producer in sites[name].producers:
                maker = transformer.get_submodule(producer)
                hook = partial(scale_output, gate=gate)
                hooks.enter_context(maker.register_forward_hook(hook))
        yield


def reopened(mask: dict, harm: dict, share: float) -> dict:
    """The mask with this share of its closed gates open again: those of the most harm. Both are
    {site: (U,)}, of the same sites."""
    flat = torch.cat(list(mask.values()))
    harms = torch.cat([harm[site] for site in mask]).masked_fill(flat > 0, -1)  # harm is >= 0
    count = round(share * int((flat == 0).sum()))
    flat[harms.topk(count).indices] = 1
    sizes = [len(gates) for gates in mask.values()]
    return dict(zip(mask, flat.split(sizes), strict=True))


def closed_slices(transformer, mask: dict):
    """Yields (parameter name, dim, indices) of the weights that make closed units and, where one
    layer reads them, of those that read: neither gets a gradient from which it could grow again."""
    sites = gate_sites(transformer, MODULES)
    for name, gate in mask.items():
        units, producers, consumer = sites[name]
        closed = (gate == 0).nonzero().flatten().cpu()
        for producer in producers:
            layer = transformer.get_submodule(producer)
            rows = width(layer)[1]
            if consumer:  # the last rows, behind any q, k and v; in a fused gated FFN twice
                copies = range(1, min(2, rows // units) + 1)
                index = torch.cat([rows - i * units + closed for i in copies])
            else:
                index = closed[:, None] * (rows // units) + torch.arange(rows // units)
            yield f"{producer}.weight", 0, index.flatten()
            if layer.bias is not None:
                yield f"{producer}.bias", 0, index.flatten()
        if consumer:
            inputs = width(transformer.get_submodule(consumer))[0]
            yield f"{consumer}.weight", 1, inputs - units + closed


@torch.no_grad()
def fold(transformer, mask: dict) -> None:
    """Zeroes the closed units' weights, in place. Equals `gated` bit for bit in fp32."""
    for name, dim, index in closed_slices(transformer, mask):
        parameter = transformer.get_parameter(name)
        parameter.index_fill_(dim, index.to(parameter.device), 0)


def closed_share(transformer) -> float:
    """Share of the gate units that are zero in the weights, as fold() leaves them: all rows that
    make them, with their biases, or all that read them."""
    closed = []
    for name, site in gate_sites(transformer).items():
        made = torch.ones(site.units, dtype=torch.bool)
        read = torch.zeros(site.units, dtype=torch.bool)
        for parameter, dim, index in closed_slices(transformer, {name: torch.zeros(site.units)}):
            weights = transformer.get_parameter(parameter).movedim(dim, 0)
            rows = weights[index.to(weights.device)].reshape(len(index), -1)
            is_zero = (rows == 0).all(1).cpu()
            if dim:
                read = is_zero
            else:
                made &= is_zero.view(-1, site.units).all(0)  # a gated FFN makes each unit twice
        closed.append(made | read)
    return round(torch.cat(closed).float().mean().item(), 5)
