"""Erased folders put together without any training. Of what any of them closes, the half that harms
other things least is closed; a ridge regression (refit.py) fits one LoRA to what each of them does
to its own concept, and the base to all else.

    python erase.py --compose erased/gun erased/knife --out_dir erased/both
    python erase.py --compose erased/both --restore gun --out_dir erased/knife_only
"""

from functools import partial
from pathlib import Path

import artefacts
import models
import promptfiles
from refit import Teacher
from safely import UserError
from sites import gated


def add_flags(parser) -> None:
    help = "instead of --concept: erased folders whose masks become one, mended together"
    parser.add_argument("--compose", nargs="+", type=Path, help=help)
    help = "of what --compose names, the concepts that are to be drawn again"
    parser.add_argument("--restore", nargs="+", default=[], help=help)


def parts_of(folders: list[Path], restore=()) -> list[Path]:
    """The folders, of a composed one its parts instead, without those that erase what `restore`
    names. Raises UserError for one that is not finished or has changed since it was composed."""
    parts = {}  # {folder, whatever it was called: (its name here, the concepts it erases)}
    for folder in folders:
        config = artefacts.erased_config(folder)
        mask = folder / "mask.safetensors"
        if not config or not mask.is_file():
            raise UserError(f"--compose: {folder}: no finished erased model")
        check_prompts(folder, config)
        for name, known in config.get("parts", {}).items():
            file = Path(models.local_name(name)) / "mask.safetensors"
            if not file.is_file() or artefacts.digests(file.parent) != known:
                raise UserError(f"--compose: {name}, a part of {folder}, is gone or has changed")
            concepts = artefacts.erased_config(file.parent)["concept"]
            parts.setdefault(file.parent.resolve(), (file.parent, concepts))
        if not config.get("parts"):
            parts.setdefault(folder.resolve(), (folder, config["concept"]))
    for concept in restore:
        holding = {key: part for key, part in parts.items() if concept in part[1]}
        if not holding:
            raise UserError(f"--restore: none of the folders erases {concept!r}")
        for key, (folder, concepts) in holding.items():
            if len(concepts) > 1:
                found = f"{folder} was trained for {', '.join(concepts)} together"
                raise UserError(f"--restore: {found}, which cannot be told apart")
            del parts[key]
    if not parts:
        raise UserError("--restore: nothing is left to erase")
    return [folder for folder, _ in parts.values()]


def check_prompts(folder: Path, config: dict) -> None:
    """Raises UserError for a run on top of another, where one had other prompts than its words
    give: they are recorded of the last alone."""
    runs = artefacts.runs_of(config)
    has_own = [run.get("prompts") or run.get("neutral") is not None for run in runs]
    if config.get("on") and any(has_own):
        found = f"{folder} stands on {config['on']}, and one of them has prompts of its own"
        raise UserError(f"--compose: {found}; erase each from the base, then compose both")


def fill(args) -> None:
    """What the parts say takes the place of --concept, --model, --modules and --steps."""
    for flag in ("concept", "kind", "neutral", "prompts", "model", "modules", "steps"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag}: does not go with --compose, whose folders say it")
    args.compose = parts_of(args.compose, args.restore)
    configs = [artefacts.erased_config(folder) for folder in args.compose]
    bases = {models.recorded(config): folder for config, folder in zip(configs, args.compose)}
    if len(bases) > 1:
        found = ", ".join(f"{folder} from {base}" for base, folder in bases.items())
        raise UserError(f"--compose: other bases: {found}")
    args.model = next(iter(bases))
    args.concept = promptfiles.distinct(sum((config["concept"] for config in configs), []))
    args.modules = list(dict.fromkeys(name for config in configs for name in config["modules"]))
    args.kind = artefacts.kinds_in(configs) or None
    for flag in models.CALL_FLAGS:
        if getattr(args, flag) is None:
            values = [config.get("call", {}).get(flag) for config in configs]
            if len(set(values)) > 1:
                pairs = zip(args.compose, values, strict=True)
                found = ", ".join(f"{folder} has {value}" for folder, value in pairs)
                raise UserError(f"--{flag}: needed, for {found}")
            setattr(args, flag, values[0])
    args.steps = 0
    usual = dict(heal=1, heal_steps=0, refit_rank=64 * len(args.compose), reopen=0.5)
    for flag, value in usual.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.heal and args.refit == 0 and not args.heal_steps:
        raise UserError("--refit: 0 leaves no LoRA; add --heal_steps, or --heal 0 for masks alone")


def rows_of_parts(args, folder: Path) -> list[promptfiles.Rows]:
    """What each part was trained on."""
    flags = {name: getattr(args, name) for name in promptfiles.FLAGS}
    found = []
    for part in args.compose:
        config = artefacts.read_config(part)
        known = {name: config.get(name) for name in ("concept", "neutral", "prompts")}
        known["kind"] = artefacts.kinds_in([config])
        if known["prompts"]:
            known["prompts"] = Path(known["prompts"])
        known["num_prompts"] = args.num_prompts or config.get("num_prompts")
        found.append(promptfiles.training_rows(folder, **flags | known))
    return found


def training_rows(args, folder: Path) -> promptfiles.Rows:
    """Those that the parts were trained on, or, without parts, what the flags ask for."""
    if args.compose:
        each = rows_of_parts(args, folder)
        rows = promptfiles.together(each, args.concept)
        for part, own in zip(args.compose, each):
            if not any(row in rows.pairs for row in own.pairs):
                found = f"every neutral prompt of {part} names what is to be erased beside it"
                raise UserError(f"--compose: {found}")
        return rows
    return promptfiles.training_rows(
        folder, **{name: getattr(args, name) for name in promptfiles.FLAGS}
    )


def teachers(args, pipe) -> tuple[artefacts.Erasure, list[Teacher]]:
    """(their masks as one, without a LoRA; each with the prompts that name its concept alone)."""
    parts = [artefacts.load_erasure(folder, pipe) for folder in args.compose]
    found = []
    kept = training_rows(args, models.prompt_folder(args.model)).pairs
    for part, rows in zip(parts, rows_of_parts(args, models.prompt_folder(args.model))):
        prompts = [row["prompt"] for row in rows.pairs if row in kept]
        found.append(Teacher(prompts, partial(gated, pipe.transformer, part.mask), part.lora))
    return artefacts.joined(*parts)._replace(lora={}), found
