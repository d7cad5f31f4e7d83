"""A mask of the authors' released code, made one of ours: its lists of one tensor a layer, closed
where a value is 0 or less, under the same names as our modules.

    python erase.py --import_mask theirs.safetensors --concept gun --model MODEL --out_dir DIR
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import artefacts
from safely import UserError, check_regular, first_line
from sites import gate_sites

CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    "lists = dict(ffn=torch.load('ff.pt', weights_only=True), "
    "norm=torch.load('norm.pt', weights_only=True)); "
    "save_file({f'{k}.{i}': t.detach().float().flatten().clone() for k in lists "
    "for i, t in enumerate(lists[k])}, 'theirs.safetensors')"
)


def add_flags(parser) -> None:
    help = "instead of training: a mask of the authors' code, whose lists of tensors, one a layer, "
    help += "stand in a safetensors file as ffn.0, ffn.1, ... and norm.0, ..."
    parser.add_argument("--import_mask", type=Path, help=help)


def fill(args) -> None:
    """What takes the place of training. Raises UserError for flags that do not go with it."""
    if args.compose:
        raise UserError("--import_mask: does not go with --compose")
    for flag in ("steps", "modules"):  # those of training are refused in flags.check_used()
        if getattr(args, flag):
            raise UserError(f"--{flag}: does not go with --import_mask")
    check_regular(args.import_mask, "--import_mask")
    if args.import_mask.suffix != ".safetensors":
        advice = f'is never unpickled; convert it where you trust it: python -c "{CONVERT}"'
        raise UserError(f"--import_mask: {args.import_mask} {advice}")
    args.steps = args.heal = 0
    lists = read_lists(args.import_mask)
    args.modules = list(lists)


def read_lists(file: Path) -> dict:
    """{module: [its tensors in order]}. Raises UserError."""
    try:
        with safe_open(file, "pt") as f:
            found = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--import_mask: {file}: {first_line(error)}") from None
    lists = {}
    for name in sorted(found, key=lambda name: (name.split(".")[0], len(name), name)):
        if not re.fullmatch(r"(ffn|norm)\.\d+", name):
            raise UserError(f"--import_mask: {file}: {name} is neither ffn. nor norm. and a number")
        module, _, number = name.partition(".")
        if int(number) != len(lists.setdefault(module, [])):
            raise UserError(f"--import_mask: {file}: {module}.{len(lists[module])} is missing")
        lists[module].append(found[name])
    if not lists:
        raise UserError(f"--import_mask: {file} holds no tensor")
    return lists


def read(file: Path, transformer) -> artefacts.Erasure:
    """The mask, of this transformer's layers in their order. Raises UserError."""
    mask = {}
    lists = read_lists(file)
    for module, tensors in lists.items():
        sites = gate_sites(transformer, (module,))
        if len(sites) != len(tensors):
            counts = f"{len(tensors)} tensors, the model {len(sites)} layers"
            raise UserError(f"--import_mask: {file} has of {module} {counts}")
        for i, ((name, site), tensor) in enumerate(zip(sites.items(), tensors, strict=True)):
            if tensor.numel() != site.units:
                counts = f"{tensor.numel()} values, {name} {site.units} units"
                raise UserError(f"--import_mask: {file}: {module}.{i} has {counts}")
            if not tensor.isfinite().all():
                raise UserError(f"--import_mask: {file}: {module}.{i} is not finite")
            mask[name] = (tensor.flatten() > 0).float()
    if all(torch.all(gates == 1) for gates in mask.values()):
        raise UserError(f"--import_mask: {file} closes nothing")
    return artefacts.Erasure(mask, list(lists))
