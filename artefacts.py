"""What an erased folder holds: written whole, and refused where it is not what it should be."""

import copy
import hashlib
import json
import os
import re
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import heal
import models
import promptfiles
from safely import (
    UserError,
    check_link,
    check_regular,
    claim,
    first_line,
    number,
    visible,
    write_atomically,
    write_text,
)
from sites import MODULES, fold, gate_sites

MASK_FORMAT = "minimalist-concept-erasure mask 3"
# Flags without a place in config.json, and those that a resumed run may change: what is learnt is
# the same. FITTED come after all training, unless that goes on from a fit of composed folders.
NOT_RECORDED = ("resume", "dry_run", "device", "out_dir")
FREE = ("save", "save_every", "checkpoint", "micro_batch", "offload", "compile")
FITTED = ("refit", "refit_rank")
OF_TYPE = dict(on=str, neutral=str, prompts=str, num_prompts=int)  # in config.json, or null


def add_flags(parser) -> None:
    add = parser.add_argument
    add("--out_dir", type=Path, help="(erased/<concept>)")
    help = (
        "beside the mask: full: transformer/, 24 GB for FLUX.1; pipeline: all that stock diffusers "
        "opens; single: the one file transformer.safetensors; mask: nothing (%(default)s)"
    )
    add("--save", choices=("full", "pipeline", "single", "mask"), default="full", help=help)
    help = "steps between resumable states (%(default)s)"
    add("--save_every", type=number(int, 1), default=10, help=help)
    add("--resume", action="store_true", help="go on with the killed run of the same command")


def default_folder(concepts: list[str]) -> Path:
    names = [re.sub(r"\W+", "_", name.lower())[:100] for name in concepts]
    short = "_".join(names)
    return Path("erased") / (
        short if len(short) <= 100 else f"{names[0]}_and_{len(names) - 1}_more"
    )


@torch.no_grad()
def fingerprint(module) -> str:
    """Hash of a module's weights: names, shapes and, of every tensor, up to 16 evenly spaced runs
    of 64 neighbouring values, rounded to bf16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.flatten()
        for start in sorted({i * max(0, len(flat) - 64) // 15 for i in range(16)}):
            values = flat[start : start + 64].to("cpu", torch.bfloat16)
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprints(pipe) -> dict[str, str]:
    """{part: fingerprint} of a pipeline's transformer, text encoders and autoencoder."""
    parts = sorted(pipe.components.items())
    return {name: fingerprint(part) for name, part in parts if isinstance(part, torch.nn.Module)}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digests(folder: Path) -> str:
    """Of an erased folder's mask and LoRA: what tells it from any other."""
    files = [folder / f"{name}.safetensors" for name in ("mask", "heal")]
    return " ".join(digest(file) for file in files if file.is_file())


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def closed_of(mask: dict) -> str:
    closed = sum(int((gate == 0).sum()) for gate in mask.values())
    return f"{closed} of {sum(gate.numel() for gate in mask.values())}"


def save_mask(path: Path, mask: dict, base: dict, modules, concept: list | None = None) -> None:
    """{site: (U,) of 0 and 1} for the base of these fingerprints, and what it erases. All that is
    said of it is one entry of metadata, since safetensors writes several in any order."""
    tensors = {site: gate.to("cpu", torch.uint8) for site, gate in mask.items()}
    about = dict(format=MASK_FORMAT, base=base, modules=list(modules), closed=closed_of(mask))
    about |= dict(concept=list(concept)) if concept else {}
    metadata = dict(mask=json.dumps(about, sort_keys=True))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_mask(path: Path, pipe) -> dict:
    """{site: (U,) fp32 of 0 and 1}. Raises UserError as read_mask() does."""
    return read_mask(path, pipe)[0]


def read_mask(path: Path, pipe) -> tuple[dict, dict]:
    """(the mask, what the file says of it). Raises UserError unless the file is whole, made for the
    weights of this pipeline, and of exactly the sites and units of its modules."""
    try:
        with safe_open(path, "pt") as f:
            mask = {site: f.get_tensor(site) for site in f.keys()}
            about = dict(json.loads((f.metadata() or {}).get("mask", "{}")))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from None
    if about.get("format") != MASK_FORMAT:
        raise UserError(f"{path}: its format is {about.get('format')}, not {MASK_FORMAT}")
    for key, kind in dict(base=dict, modules=list, closed=str).items():
        if not isinstance(about.get(key), kind):
            raise UserError(f"{path}: its metadata have no {key}")
    for name in about["modules"]:
        if name not in MODULES:
            raise UserError(f"{path}: its modules have {name!r}, none of {', '.join(MODULES)}")
    found = fingerprints(pipe)
    if about["base"] != found:
        other = [part for part in found if found[part] != about["base"].get(part)]
        other = other or about["base"].keys() - found
        raise UserError(f"{path}: made for other base weights ({', '.join(other)})")
    sites = gate_sites(pipe.transformer, about["modules"])
    if {name: gate.shape for name, gate in mask.items()} != {
        n: (s.units,) for n, s in sites.items()
    }:
        raise UserError(f"{path}: its gates are not those of {' and '.join(about['modules'])}")
    for site, gate in mask.items():
        if gate.dtype != torch.uint8 or (gate > 1).any():
            raise UserError(f"{path}: {site} is not a list of 0 and 1")
    if about["closed"] != closed_of(mask):
        raise UserError(f"{path}: {closed_of(mask)} gates are closed, not {about['closed']}")
    return {site: gate.float() for site, gate in mask.items()}, about


class Erasure(NamedTuple):
    """What is done to a base."""

    mask: dict = {}  # {site: (U,) of 0 and 1}
    modules: list = []  # which parts have gates
    lora: dict = {}  # {layer: (A, B)}, see heal.py


def load_erasure(folder: Path, pipe) -> Erasure:
    """Of an erased folder, for a pipeline of its base. Raises UserError, never gives an
    empty one instead."""
    config = erased_config(folder)
    mask, about = read_mask(folder / "mask.safetensors", pipe)
    modules = about["modules"]
    concept = about.get("concept", config["concept"])  # masks of before do not say it
    if concept != config["concept"]:
        found = f"is of {', '.join(concept)}, its config.json of {', '.join(config['concept'])}"
        raise UserError(f"{folder / 'mask.safetensors'}: {found}")
    file = folder / "heal.safetensors"
    if not config.get("heal"):
        if file.exists():
            raise UserError(f"{file}: is not of this run, whose config.json has no heal")
        return Erasure(mask, modules)
    return Erasure(mask, modules, heal.load(file, pipe.transformer, fingerprints(pipe), mask))


def load_erasures(folders: list[Path], pipe) -> Erasure:
    """Of several erased folders together."""
    return joined(*[load_erasure(folder, pipe) for folder in folders])


def apply(transformer, erasure: Erasure) -> None:
    """In place. The mask is folded last, so that closed neurons' weights are 0 on both sides."""
    heal.merge(transformer, erasure.lora)
    fold(transformer, erasure.mask)


def erased_copy(pipe, erasure: Erasure):
    """The pipeline with a transformer of its own, erased."""
    other = copy.copy(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    apply(other.transformer, erasure)
    return other


def load_erased(*folders, device=None, dtype=None):
    """A stock pipeline with the mask folded in, and mended as its run mended it. Several folders of
    one base: what any of them closes is closed, their LoRAs add up (`--compose` mends anew instead,
    which keeps more). A device may also come last, without its name. Raises UserError, never gives
    the base instead."""
    if folders and is_device(folders[-1]):
        *folders, device = folders
    if not folders:
        raise UserError("load_erased: names no folder")
    if dtype == torch.float16:
        raise UserError("load_erased: dtype: float16 rounds the base weights; cast what comes back")
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        for name in ("config.json", "mask.safetensors"):  # the mask is written last
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name}, so no finished erased model")
    bases = {models.recorded(erased_config(folder)) for folder in folders}
    if len(bases) > 1:
        raise UserError(f"{folder}: of another base than {folders[0]}: {', '.join(sorted(bases))}")
    check_apart(folders)
    pipe = models.load_pipeline(bases.pop(), device, dtype)
    apply(pipe.transformer, load_erasures(folders, pipe))
    return pipe


def check_apart(folders: list[Path]) -> None:
    """Raises UserError where one of them is named twice, or is in another already: its LoRA would
    count twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"one of the folders is named twice: {', '.join(map(str, folders))}")
    found = {}  # {folder: which of those named it is, or is in}
    for folder in folders:
        below = [under(run) for run in runs_of(erased_config(folder))]
        for path in {path.resolve() for path in (folder, *sum(below, []))}:
            first = found.setdefault(path, folder)
            if first != folder:
                pair = f"{first} and {folder} have {path.name} in common"
                raise UserError(f"{pair}; leave one of them out")


def base_of(model: str | None, device: str) -> tuple[str, str | None]:
    """(the base model, the erased folder on which a run stands): of a model that is such a folder
    its own base, of any other (model, None). Raises UserError for an unfinished one."""
    model = models.default_model(device) if model is None else model
    folder = Path(model)
    config = erased_config(folder) if model else {}
    if not config:
        return model, None
    if not (folder / "mask.safetensors").is_file():
        raise UserError(f"--model: {folder}: no mask.safetensors, so no finished erased model")
    return models.recorded(config), models.portable_name(model)


def load_base(model: str, on: str | None, dtype) -> tuple:
    """(the pipeline on the CPU, with what was done to `on` applied; the base weights' fingerprints;
    that erasure, an empty one without such a folder). Raises UserError."""
    pipe = models.load_pipeline(model, "cpu", dtype)
    base = fingerprints(pipe)
    earlier = load_erasure(Path(models.local_name(on)), pipe) if on else Erasure()
    apply(pipe.transformer, earlier)
    return pipe, base, earlier


def is_device(name) -> bool:
    return re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", str(name)) is not None


def joined(*erasures: Erasure) -> Erasure:
    """What any of them closes is closed; their LoRAs add up."""
    masks, modules, loras = zip(*erasures, strict=True)
    both = {}
    for mask in masks:
        both |= {site: gate * both.get(site, 1) for site, gate in mask.items()}
    modules = list(dict.fromkeys(sum(map(list, modules), [])))
    return Erasure(both, modules, heal.joined(*loras))


def erased_transformer(model: str, kind: type, mask: dict, lora: dict | None = None):
    """The model's stored transformer, erased, in the dtype it is stored in."""
    transformer = models.stored_transformer(model, kind)
    apply(transformer, Erasure(mask, lora=lora or {}))
    return transformer


def save_folded(model: str, kind: type, mask: dict, folder: Path, lora: dict | None = None) -> None:
    transformer = erased_transformer(model, kind, mask, lora)
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    write_atomically(folder, transformer.save_pretrained)


def save(out_dir: Path, config: dict, model: str, kind: type, base: dict, erasure: Erasure) -> None:
    """What --save says, then what mends, and last the mask: a folder with it is finished. config:
    the run's; model: with its commit; base: the fingerprints."""
    mask, modules, lora = erasure
    save_weights(config["save"], model, kind, mask, out_dir, lora)
    if lora:
        heal.save(out_dir / "heal.safetensors", lora, base, mask)
    save_mask(out_dir / "mask.safetensors", mask, base, modules, config["concept"])


def save_weights(
    form: str, model: str, kind: type, mask: dict, out_dir: Path, lora: dict | None = None
) -> None:
    """What --save says. A single file has diffusers' names, which ComfyUI's "Load Diffusion Model"
    takes for FLUX.1, SD3, AuraFlow and Z-Image by its source; it was not loaded there."""
    for old in ("transformer.safetensors", "model_index.json"):  # of the run before, by --resume
        (out_dir / old).unlink(missing_ok=True)
    shutil.rmtree(out_dir / "transformer", ignore_errors=True)
    if form == "single":
        state = erased_transformer(model, kind, mask, lora).state_dict()
        path = out_dir / "transformer.safetensors"
        write_atomically(path, lambda temporary: save_file(state, temporary, dict(format="pt")))
    if form in ("full", "pipeline"):
        save_folded(model, kind, mask, out_dir / "transformer", lora)
    if form == "pipeline":
        base = models.folder_of(model)
        how = dict(ignore=shutil.ignore_patterns("*.bin"), copy_function=shutil.copyfile)
        for part in kind.load_config(base):
            if part != "transformer" and (base / part).is_dir():
                shutil.copytree(base / part, out_dir / part, dirs_exist_ok=True, **how)
        shutil.copyfile(base / "model_index.json", out_dir / "model_index.json")


STATES = dict(logits="state.safetensors", lora="heal_state.safetensors")  # by what is learnt


def read_state(
    folder: Path, learnt: str, size: int, cases: int, steps: int, after: int = 0
) -> tuple[int, dict]:
    """(the step to go on from, the state of erase.train or, learnt `after` so many steps of it, of
    heal.tune); (0, {}) where none was written yet. Raises UserError unless the file is that of a
    run with so many numbers to learn, cases and steps."""
    sizes = {"latest": cases, learnt: size, "step": 1, "exp_avg": size, "exp_avg_sq": size}
    path = folder / STATES[learnt]
    if not path.exists():
        return 0, {}
    check_regular(path, "--resume")
    try:
        with safe_open(path, "pt") as f:
            step = int(f.metadata()["step"])
            state = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {path} is damaged ({first_line(error)})") from None
    if {name: tensor.numel() for name, tensor in state.items()} != sizes:
        raise UserError(f"--resume: {path} is damaged (other tensors than this run has)")
    if any(tensor.isnan().any() for tensor in state.values()):
        raise UserError(f"--resume: {path} is damaged (it holds NaN)")
    if not 0 <= step <= steps:
        flag = "--heal_steps" if after else "--steps"
        raise UserError(f"--resume: {path} is of step {step}, {flag} is {steps}")
    rows = len(read_metrics(folder, after + step))
    if rows < after + step:
        raise UserError(f"--resume: metrics.jsonl has {rows} rows, {path} is of step {step}")
    return step, state


def read_metrics(folder: Path, rows: int | None = None) -> list[dict]:
    """The first rows of metrics.jsonl, without what a kill left of a last one. Raises UserError."""
    path = folder / "metrics.jsonl"
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines(keepends=True)
        return [json.loads(line) for line in lines[:rows] if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def open_folder(folder: Path, config: dict, step: int):
    """Begins a run, or goes on with one from `step`: metrics of later steps are dropped. Returns a
    function for on_step of train, and of tune, whose steps count on from there: a line of
    metrics.jsonl a step, the state now and then."""
    write_json(folder / "config.json", config)
    kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder, step))
    write_text(folder / "metrics.jsonl", kept)
    log = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def on_step(metrics: dict, state: dict) -> None:
        learnt, before, steps = "logits", 0, config["steps"]
        if "lora" in state:
            learnt, before, steps = "lora", config["steps"], config["heal_steps"]
        log.write(json.dumps(metrics | dict(step=before + metrics["step"])) + "\n")
        log.flush()
        done = metrics["step"] + 1
        if done % config["save_every"] == 0 or done == steps:
            about = dict(step=str(done))
            path = folder / STATES[learnt]
            write_atomically(path, lambda temporary: save_file(state, temporary, about))

    return on_step


def listing(folder: Path) -> str:
    return " ".join(path.name for path in visible(folder))


def last_words(folder: Path, steps: int, heal: int, left: list[str]) -> str:
    """What a finished run wrote, and what to do next; `left`: the concepts that are still there.
    steps: of the mask, 0 where there was none to learn; heal: whether there is a LoRA."""
    lines = [f"wrote {folder}/: {listing(folder)}"]
    if 0 < steps < 200:
        lines.append(f"after only {steps} steps few gates have closed yet: a trial, not a result")
    if left:
        advice = "; try more --steps, --heal_steps or --num_prompts, or a smaller --beta"
        advice = advice if heal else "; try --heal 1, more --steps, or a smaller --beta"
        advice = advice if steps else "; try --heal_steps 400" * heal
        lines.append(f"warning: NOT ERASED: {', '.join(left)}{advice}")
        return "\n".join(lines)
    preview = shlex.quote(str(folder / "preview.png"))
    lines.append(f"next: look at {preview}, then python evaluate.py {shlex.quote(str(folder))}")
    return "\n".join(lines)


def run_config(flags: dict, call: dict, rows) -> dict:
    """What config.json says of a run: its flags, with those of the sampler as one dict, and a hash
    of the promptfiles.Rows that it learns from."""
    left_out = (*NOT_RECORDED, *models.CALL_FLAGS)
    config = {name: value for name, value in flags.items() if name not in left_out}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    model, revision = models.address(models.portable_name(flags["model"]))
    config |= dict(model=model, revision=revision, call=call, rows=promptfiles.digest(rows))
    vocabulary = promptfiles.known_words(models.prompt_folder(flags["model"]))
    kinds = promptfiles.kinds_of(flags["concept"], flags["kind"], vocabulary)
    kinds = {name: kind for name, kind in kinds.items() if kind}
    if flags["on"]:  # a second run: both concepts are gone, and the same mask is to be there again
        folder = Path(models.local_name(flags["on"]))
        before = read_config(folder)
        config["concept"] = promptfiles.distinct([*flags["concept"], *before["concept"]])
        kinds = kinds_in([before]) | kinds
        config["heal"] = max(flags["heal"], before.get("heal", 0))
        config["on_mask"] = digests(folder)
    config["kind"] = kinds or None
    del config["compose"], config["restore"]
    if flags["compose"]:
        config["parts"] = {models.portable_name(str(f)): digests(f) for f in flags["compose"]}
    config |= dict(device_type=torch.device(flags["device"]).type)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return config | dict(versions=versions)


def kinds_in(configs: list[dict]) -> dict:
    """{concept: its kind} as runs recorded it, of concepts that no vocabulary has."""
    kinds = {}
    for config in configs:
        kind = config.get("kind") or {}
        kinds |= dict.fromkeys(config["concept"], kind) if isinstance(kind, str) else kind
    return kinds


def under(config: dict) -> list[Path]:
    """The erased folders that a run is made of, or stands on."""
    names = [*config.get("parts", {}), *([config["on"]] if config.get("on") else [])]
    return [Path(models.local_name(name)) for name in names]


def runs_of(config: dict) -> list[dict]:
    """This run, those that it stands on, and those that it is made of."""
    runs = []
    below = [config]
    while below:
        run = below.pop()
        if run not in runs:  # else they stand on each other in a circle
            runs.append(run)
            below += [read_config(folder) for folder in under(run)]
    return runs


def neutrals_in(configs: list[dict]) -> dict:
    """{concept: what its templates have instead of it}, where --neutral said it."""
    neutrals = {}
    for run in [run for config in configs for run in reversed(runs_of(config))]:
        if run.get("neutral") is not None:
            before = read_config(Path(models.local_name(run["on"]))) if run.get("on") else {}
            own = [name for name in run["concept"] if name not in before.get("concept", [])]
            neutrals |= dict.fromkeys(own, run["neutral"])
    return neutrals


def read_json(file: Path) -> dict:
    """{} if there is no such file. Raises UserError."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is not a JSON object")
    return found


def read_config(folder: Path) -> dict:
    return read_json(folder / "config.json")


def erased_config(folder: Path) -> dict:
    """config.json of a folder that erase.py wrote, {} for any other. Raises UserError, which names
    the key, for one that erase.py does not write."""
    config = read_config(folder)
    if "concept" not in config and not (folder / "mask.safetensors").is_file():
        return {}
    where = f"{folder / 'config.json'}:"
    concepts, modules, model = map(config.get, ("concept", "modules", "model"))
    for key, found in dict(concept=concepts, modules=modules).items():
        if not isinstance(found, list) or not found:
            raise UserError(f"{where} {key} is not a list of names")
    for name in concepts:
        promptfiles.check_concept(name, f"{where} concept")
    for name in modules:
        if name not in MODULES:
            raise UserError(f"{where} modules: {name!r} is none of {', '.join(MODULES)}")
    if config.get("heal", 0) not in (0, 1):
        raise UserError(f"{where} heal is {config['heal']!r}, not 0 or 1")
    kind = config.get("kind")
    words = [*kind.values(), *kind] if isinstance(kind, dict) else [kind or ""]
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"{where} kind is {kind!r}")
    if not isinstance(model, str) or not model.strip() or not model.isprintable():
        raise UserError(f"{where} model is {model!r}")
    for key, kind in OF_TYPE.items():
        if not isinstance(config.get(key), kind | None):
            raise UserError(f"{where} {key} is {config[key]!r}")
    models.check_call(config.get("call"), f"{where} call")
    parts = config.get("parts", {})
    if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
        raise UserError(f"{where} parts are not folders and the hashes of their masks")
    return config


def check_writable(folder: Path, flag: str = "--out_dir") -> None:
    """Raises UserError."""
    home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not home.is_dir():
        raise UserError(f"{flag}: {home} is a file")
    if not os.access(home, os.W_OK):
        raise UserError(f"{flag}: {home} is not ours to write to")


def check_report(folder: Path, key: str, names) -> None:
    """Raises UserError for files of these names, which would be overwritten, unless they are of the
    script whose results.json has this key."""
    for file in (folder / name for name in names):
        check_link(file)
        if file.exists() and key not in read_json(folder / "results.json"):
            raise UserError(f"--out_dir: {file} is of something else; choose another folder")


def pinned_model(model: str, out_dir: Path, resume: bool) -> str:
    """--model with the commit that main is now, or was when the run that goes on began."""
    before = read_config(out_dir) if resume else {}
    if before.get("revision") and before.get("model") == model:
        model = models.recorded(before)
    return models.pinned(model)


def disk_of(folder: Path) -> tuple[int, int]:
    """(which disk it is or will be on, free bytes there)."""
    folder = folder.absolute()
    home = next(path for path in (folder, *folder.parents) if path.exists())
    return home.stat().st_dev, shutil.disk_usage(home).free


def check_disk(out_dir: Path, form: str, sizes: dict, of_lora: int) -> None:
    """Raises UserError unless there is room for what comes from the hub, what --save writes and the
    of_lora bytes of the LoRA and its states. sizes: models.stored_bytes."""
    cache = Path(constants.HF_HUB_CACHE)
    of_cache, of_out_dir = disk_of(cache), disk_of(out_dir)
    written = dict(mask=0, pipeline=sizes["all"]).get(form, sizes["transformer"]) + 2**26 + of_lora
    if of_cache[0] == of_out_dir[0]:
        written += sizes["download"]
    advice = "--save mask needs little"
    if form == "mask":
        advice = "smaller --heal_rank and --refit_rank need less"
    for flag, needed, free, advice in (
        ("--model", sizes["download"], of_cache[1], f"HF_HOME names another disk than {cache}"),
        ("--out_dir", written, of_out_dir[1], advice),
    ):
        if free < needed:
            found = f"{free / 2**30:.2f} GiB free, {needed / 2**30:.2f} needed"
            raise UserError(f"{flag}: {found}; {advice}")


def check_folder(out_dir: Path, config: dict, resume: bool, transformer, others: dict) -> None:
    """Raises UserError unless out_dir is new or empty, or, to resume, holds an unfinished run of
    the same command; and unless the disks have room. Then claims it. others: {other part:
    parameters}."""
    check_writable(out_dir)
    is_begun = out_dir.is_dir() and visible(out_dir)
    if is_begun and not resume:
        advice = "choose another folder, or --resume its run"
        raise UserError(f"--out_dir: {out_dir} is not empty; {advice}")
    if resume and (is_begun or not out_dir.is_dir()):  # empty: killed before it wrote anything
        before = read_config(out_dir)
        if not before:
            raise UserError(f"--resume: no run to go on with in {out_dir} (no config.json)")
        free = FREE if config.get("parts") and config["heal_steps"] else FREE + FITTED
        for flag, value in config.items():
            if flag not in free and before.get(flag) != value:
                found = f"was {before.get(flag)}, now {value}"
                if flag == "versions":
                    raise UserError(f"--resume: the versions of packages: {found}; install those")
                if flag == "rows":
                    raise UserError("--resume: the prompts are others than those it began with")
                raise UserError(f"--resume: --{flag} {found}; repeat the same command")
        if (out_dir / "mask.safetensors").exists():
            raise UserError(f"--resume: the run in {out_dir} is finished")
    claim(out_dir)
    sizes = models.stored_bytes(models.recorded(config), transformer, others)
    of_lora = 0
    if config.get("heal"):  # in fp32
        of_lora = 4 * heal.size_of(transformer, config["refit_rank"])
    if config.get("heal") and config["heal_steps"]:  # 3 numbers each, written beside the old ones
        of_lora += 2 * 3 * 4 * heal.size_of(transformer, config["heal_rank"])
    check_disk(out_dir, config["save"], sizes, of_lora)
