"""What can stand beside a base as its erased version, ours or another tool's: what a path holds,
and the base's pipeline with it in place. Safetensors alone, never a pickle.

    erased/gun, a+b     a folder that erase.py wrote; several of one base, composed
    FOLDER              a diffusers pipeline, a transformer (the folder or inside it), or pictures
    FILE.safetensors    some or all tensors of the transformer in diffusers' names (ESD, UCE), or a
                        LoRA on it in PEFT's names; also a folder with one such file

A tensor that the base's transformer lacks is refused by name, and so is what changes nothing in it.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
import torch
from safetensors import safe_open

import artefacts
import heal
from loras import finite, is_lora, read_lora
from safely import UserError, first_line
from sites import closed_share


class Found(NamedTuple):
    """What a path holds."""

    form: str  # in words
    weights: str = ""  # what tells them from others'
    load: Callable | None = None  # gives a pipeline; None: the pictures are all there is
    mask: dict = {}  # {site: (U,)}, to be gated or folded in that
    closed: float | None = None  # share of the gate units that are zero in it; None: see the mask


def parts_of(path: Path) -> list[Path]:
    """The folders of "a+b"; of any other path itself. Raises UserError for what is not there."""
    names = [str(path)] if path.exists() else str(path).split("+")
    for name in names:
        if not name or not Path(name).exists():
            raise UserError(f"{name or path}: no such file or folder")
    return [Path(name) for name in names]


def home(path: Path) -> Path:
    """Where what is found out about it goes: into its folder, or into results/."""
    parts = parts_of(path)
    if len(parts) == 1 and path.is_dir() and not is_pictures(path):
        return path
    return Path("results") / "+".join(part.name.removesuffix(".safetensors") for part in parts)


def is_pictures(path: Path) -> bool:
    """A folder of PNG files, flat or by set, and of no model; one that evaluate.py drew."""
    model = ("model_index.json", "config.json", "transformer/config.json", "*.safetensors")
    is_model = any(any(path.glob(name)) for name in model)
    is_drawn = (path / "cases.json").is_file()
    return (is_drawn or not is_model) and any([*path.glob("*.png"), *path.glob("*/*.png")])


def find(path: Path, base, lora_scale: float | None = None) -> Found:
    """What the path holds. base: the base's pipeline; lora_scale: of a LoRA alone, whose usual is
    1. Raises UserError, never gives the base."""
    parts = parts_of(path)
    if len(parts) > 1 or artefacts.erased_config(path):
        return find_ours(parts, base)
    if is_pictures(path):
        return Found("pictures")
    scale = 1.0 if lora_scale is None else lora_scale
    try:  # loaded once here: what is wrong with it shows before anything is drawn
        pipe, form, files = load(path, base, scale)
    except (*models.LOADING_ERRORS, RuntimeError) as error:
        raise UserError(f"{path}: cannot load: {first_line(error)}") from None
    weights = [artefacts.digest(file) for file in files]
    weights += [f"times {scale}"] if form.startswith("LoRA") else []
    weights = weights or artefacts.fingerprints(pipe).values()  # text encoders too
    closed = closed_share(pipe.transformer)
    return Found(form, " ".join(weights), lambda: load(path, base, scale)[0], closed=closed)


def find_ours(folders: list[Path], base) -> Found:
    """What erase.py wrote, put together as artefacts.load_erased() does it."""
    for folder in folders:
        if not artefacts.erased_config(folder):
            raise UserError(f"{folder}: no folder that erase.py wrote; + joins only these")
    artefacts.check_apart(folders)
    erasure = artefacts.load_erasures(folders, base)
    weights = " ".join(map(artefacts.digests, folders))
    form = f"{artefacts.closed_of(erasure.mask)} gates closed"
    if not erasure.lora:
        return Found(form, weights, lambda: base, erasure.mask)
    form += f", LoRA on {len(erasure.lora)} layers"
    return Found(form, weights, lambda: artefacts.erased_copy(base, erasure), erasure.mask)


def load(path: Path, base, lora_scale: float) -> tuple:
    """(the pipeline, what it is in words, the file, if it is one, and its configuration). Raises
    UserError and what loading raises."""
    if (path / "model_index.json").is_file():
        return (*load_pipeline(path, base), [])
    pipe = copy.copy(base)
    folder = transformer_folder(path, type(base.transformer).__name__)
    if folder:
        form, files = "transformer", []
        pipe.transformer = load_transformer(folder, base)
    else:
        file = only_file(path)
        files = [file, file.with_name("adapter_config.json")]
        files = [file for file in files if file.is_file()]
        pipe.transformer = copy.deepcopy(base.transformer)
        with safe_open(file, "pt") as f:
            if is_lora(f.keys()):
                lora, form = read_lora(pipe.transformer, file, f, lora_scale)
                heal.merge(pipe.transformer, lora)
            else:
                form = put_tensors(pipe.transformer, file, f)
    changed, total = differing(pipe.transformer, base.transformer)
    if not changed:
        raise UserError(f"{path}: no tensor differs from the base's")
    return pipe, f"{form}, {changed} of {total} tensors differ", files


def load_pipeline(path: Path, base) -> tuple:
    """(a whole pipeline of the base's class, what it is in words). Raises UserError."""
    pipe = models.load_pipeline(str(path), base.device, base.dtype)
    if type(pipe) is not type(base):
        kinds = f"is a {type(pipe).__name__}, the base a {type(base).__name__}"
        raise UserError(f"{path}: {kinds}")
    counts = []
    for name, part in base.components.items():
        if isinstance(part, torch.nn.Module):
            check_sizes(path, getattr(pipe, name), part)
            changed, total = differing(getattr(pipe, name), part)
            counts += [f"{name} {changed} of {total}"] if changed else []
    if not counts:
        raise UserError(f"{path}: no tensor differs from the base's")
    return pipe, f"whole pipeline, {', '.join(counts)} tensors differ"


def transformer_folder(path: Path, kind: str) -> Path | None:
    """Where a transformer of that class lies, None without any. Raises UserError for another."""
    for folder in (path, path / "transformer"):
        name = artefacts.read_config(folder).get("_class_name")
        if name == kind:
            return folder
        if name:
            raise UserError(f"{folder}: is a {name}, the base's transformer a {kind}")
    return None


def load_transformer(folder: Path, base):
    """Of the base's class, with all its tensors and no others. Raises UserError."""
    how = dict(dtype=base.transformer.dtype, use_safetensors=True, output_loading_info=True)
    transformer, info = type(base.transformer).from_pretrained(folder, **how)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise UserError(f"{folder}: has not the tensors of its class: {min(wrong)}")
    check_sizes(folder, transformer, base.transformer)
    return transformer.eval().requires_grad_(False).to(base.device)


def only_file(path: Path) -> Path:
    """The .safetensors file that the path is, or the only one that it holds. Raises UserError."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        holds = "neither an erased model, a diffusers model, a .safetensors file nor pictures"
        raise UserError(f"{path}: is empty, or holds {holds}")
    if len(files) > 1:
        raise UserError(f"{path}: holds {len(files)} .safetensors files; name one of them")
    if files[0].suffix != ".safetensors":
        raise UserError(f"{path}: is no .safetensors file; no other is read")
    return files[0]


def check_sizes(path: Path, module, base) -> None:
    """Raises UserError unless both have the same tensors, of the same shapes."""
    sizes, wanted = (
        {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
        for part in (module, base)
    )
    odd = sorted(dict(sizes.items() ^ wanted.items()))
    if odd:
        found = f"{odd[0]} is {sizes.get(odd[0])}, the base's {wanted.get(odd[0])}"
        raise UserError(f"{path}: of another size than the base: {found}")


def differing(module, base) -> tuple[int, int]:
    """(how many of its tensors are not the base's, how many it has)."""
    before = base.state_dict()
    after = module.state_dict()
    same = [name in before and torch.equal(x, before[name]) for name, x in after.items()]
    return same.count(False), len(same)


@torch.no_grad()
def put_tensors(transformer, file: Path, f) -> str:
    """A state dict's tensors in place of the transformer's. f: the open file. Raises UserError."""
    state = transformer.state_dict()
    seen = set()
    for key in f.keys():
        name = key.removeprefix("transformer.")
        if name not in state or name in seen:
            fault = "is there twice" if name in seen else "is not in the base's transformer"
            raise UserError(f"{file}: {key} {fault}")
        found, wanted = f.get_slice(key).get_shape(), list(state[name].shape)
        if found != wanted:
            raise UserError(f"{file}: {key} is {found}, the base's {wanted}")
        seen.add(name)
        state[name].copy_(finite(file, f, key))
    return "whole state dict" if len(seen) == len(state) else "partial state dict"
