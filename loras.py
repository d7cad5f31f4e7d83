"""A LoRA that another tool trained on the transformer, in PEFT's names as diffusers writes them,
read without PEFT: {layer: (A, B)}, as heal.py has its own."""

import json
import re
from pathlib import Path

import torch

from artefacts import read_json
from safely import UserError, first_line, number

KEY = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(.+)\.(lora_[AB]\.weight|alpha)")
LIKE = re.compile(r"lora|\.alpha$|hada_|lokr_")  # a key of any kind of LoRA
NOT_READ = {  # by a part of a key
    r"lora_(te|unet|transformer|down|up)": "Kohya's form",
    r"lora\.(down|up)": "diffusers' old form",
    r"text_(encoder|model)": "on a text encoder",
    r"lora_magnitude|dora_scale": "a DoRA",
    r"hada_|lokr_": "a LyCORIS",
}
NOT_READ_IN_CONFIG = ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out", "lora_bias")


def add_flags(parser) -> None:
    help = "a LoRA of another tool is added times this (1)"
    parser.add_argument("--lora_scale", type=number(float, -100, 100), help=help)


def check_scale(lora_scale: float | None, forms: list[str]) -> None:
    """Raises UserError for a --lora_scale that no LoRA is there for."""
    if lora_scale is not None and not any(form.startswith("LoRA") for form in forms):
        raise UserError(f"--lora_scale: no LoRA of another tool here, but {'; '.join(forms)}")


def is_lora(keys) -> bool:
    return any(map(LIKE.search, keys))


def finite(file: Path, f, key: str):
    """The tensor. f: the open file. Raises UserError for what is no weight."""
    tensor = f.get_tensor(key)
    if not tensor.is_floating_point() or not tensor.float().isfinite().all():
        raise UserError(f"{file}: {key} holds other than finite floating-point numbers")
    return tensor


def read_tensors(file: Path, f) -> dict:
    """{layer: {"lora_A.weight", "lora_B.weight" and, maybe, "alpha": tensor}}. Raises UserError."""
    layers = {}
    for key in f.keys():
        form = next((form for part, form in NOT_READ.items() if re.search(part, key)), None)
        match = KEY.fullmatch(key)
        if form or not match:
            form = form or "no tensor of a LoRA"
            raise UserError(f"{file}: {key}: {form}; read are lora_A, lora_B and alpha, as of PEFT")
        tensors = layers.setdefault(match[1], {})
        if match[2] in tensors:
            raise UserError(f"{file}: {key}: is there twice")
        tensors[match[2]] = finite(file, f, key)
    return layers


def read_config(file: Path, metadata: dict) -> dict:
    """What the file's metadata, as diffusers writes them, or adapter_config.json say; {} without.
    Raises UserError for what changes the result and is not read here."""
    if "heal" in metadata:
        raise UserError(f"{file}: goes with the mask beside it; name their folder")
    config = read_json(file.with_name("adapter_config.json"))
    try:
        config |= dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: lora_adapter_metadata: {first_line(error)}") from None
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    for key in NOT_READ_IN_CONFIG:
        if config.get(key):
            raise UserError(f"{file}: its configuration has {key}, which is not read here")
    for key in ("lora_alpha", "r"):
        if type(config.get(key, 1)) not in (int, float):
            raise UserError(f"{file}: its configuration has {key} {config[key]!r}")
    return config


def read_lora(transformer, file: Path, f, lora_scale: float) -> tuple[dict, str]:
    """({layer: (A, B)}, what it is in words), for W += B A: B is times lora_scale alpha / R. alpha
    is that of the file's tensors, of its metadata, or of the adapter_config.json beside it, else R.
    f: the open file. Raises UserError unless all of it fits this transformer."""
    config = read_config(file, f.metadata() or {})
    modules = dict(transformer.named_modules())
    lora = {}
    factors = set()
    for name, tensors in read_tensors(file, f).items():
        layer = modules.get(name)
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(f"{file}: {name} is no linear layer of the base's transformer")
        a, b = (tensors.get(f"lora_{x}.weight", torch.empty(0)) for x in "AB")
        rank = len(a)
        if a.shape != (rank, layer.in_features) or b.shape != (layer.out_features, rank):
            found = f"{tuple(a.shape)} and {tuple(b.shape)}"
            wanted = f"(R, {layer.in_features}) and ({layer.out_features}, R)"
            raise UserError(f"{file}: A and B of {name} are {found}, not {wanted}")
        if not rank:
            raise UserError(f"{file}: {name} has rank 0")
        if config.get("r", rank) != rank and not config.get("rank_pattern"):
            raise UserError(f"{file}: {name} has rank {rank}, its configuration {config['r']}")
        alpha = config.get("lora_alpha", rank)
        if "alpha" in tensors:
            if "lora_alpha" in config or tensors["alpha"].numel() != 1:
                raise UserError(f"{file}: {name}.alpha is no single number, or said twice")
            alpha = tensors["alpha"].item()
        factor = lora_scale * alpha / rank
        factors.add(f"{factor:g}")
        lora[name] = a, b.float() * factor
    return lora, f"LoRA on {len(lora)} layers, times {', '.join(sorted(factors))}"
