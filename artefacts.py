"""What an erased folder holds: written whole, and refused where it is not what it should be."""

import hashlib
import json
import os
import re
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import models
from safely import UserError, check_regular, first_line, number, write_atomically, write_text
from sites import fold, gate_sites

MASK_FORMAT = "minimalist-concept-erasure mask 2"
# Flags without a place in config.json, and those that a resumed run may change: the result is not.
NOT_RECORDED = ("resume", "dry_run", "device", "out_dir")
FREE = ("save", "save_every", "checkpoint", "micro_batch", "offload", "compile")


def add_flags(parser) -> None:
    add = parser.add_argument
    add("--out_dir", type=Path, help="(erased/<concept>)")
    help = "mask: no transformer folder, which is 24 GB for FLUX.1 (%(default)s)"
    add("--save", choices=("full", "mask"), default="full", help=help)
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


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def closed_of(mask: dict) -> str:
    closed = sum(int((gate == 0).sum()) for gate in mask.values())
    return f"{closed} of {sum(gate.numel() for gate in mask.values())}"


def save_mask(path: Path, mask: dict, base: str, modules, **about) -> None:
    """{site: (U,) of 0 and 1} for base weights of fingerprint `base`. All that is said of it is one
    entry of metadata, since safetensors writes several in any order."""
    tensors = {site: gate.to("cpu", torch.uint8) for site, gate in mask.items()}
    about |= dict(format=MASK_FORMAT, base=base, modules=list(modules), closed=closed_of(mask))
    metadata = dict(mask=json.dumps(about, sort_keys=True))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_mask(path: Path, transformer) -> dict:
    """{site: (U,) fp32 of 0 and 1}. Raises UserError unless the file is whole, made for these base
    weights, and of exactly the sites and units of its modules."""
    try:
        with safe_open(path, "pt") as f:
            mask = {site: f.get_tensor(site) for site in f.keys()}
            about = json.loads((f.metadata() or {}).get("mask", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from None
    if about.get("format") != MASK_FORMAT:
        raise UserError(f"{path}: its format is {about.get('format')}, not {MASK_FORMAT}")
    found = fingerprint(transformer)
    if about["base"] != found:
        raise UserError(f"{path}: made for base weights {about['base']}, these are {found}")
    sites = gate_sites(transformer, about["modules"])
    if {name: gate.shape for name, gate in mask.items()} != {
        n: (s.units,) for n, s in sites.items()
    }:
        raise UserError(f"{path}: its gates are not those of {' and '.join(about['modules'])}")
    for site, gate in mask.items():
        if gate.dtype != torch.uint8 or (gate > 1).any():
            raise UserError(f"{path}: {site} is not a list of 0 and 1")
    if about["closed"] != closed_of(mask):
        raise UserError(f"{path}: {closed_of(mask)} gates are closed, not {about['closed']}")
    return {site: gate.float() for site, gate in mask.items()}


def load_erased(folder, device=None, dtype=None):
    """A stock pipeline with the mask folded in. Raises UserError, never gives the base instead."""
    folder = Path(folder)
    for name in ("config.json", "mask.safetensors"):  # the mask is written last
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}, so no finished erased model")
    model = read_config(folder).get("model", "")
    pipe = models.load_pipeline(models.local_name(model), device, dtype)
    fold(pipe.transformer, load_mask(folder / "mask.safetensors", pipe.transformer))
    return pipe


def base_of(model: str | None, device: str) -> tuple[str, str | None]:
    """(the base model, the erased folder on which a run stands): of a model that is such a folder
    its own base, of any other (model, None). Raises UserError for an unfinished one."""
    model = models.default_model(device) if model is None else model
    folder = Path(model)
    config = read_config(folder) if model else {}
    if "concept" not in config:
        return model, None
    if not (folder / "mask.safetensors").is_file():
        raise UserError(f"--model: {folder}: no mask.safetensors, so no finished erased model")
    if not isinstance(config.get("model"), str):
        raise UserError(f"--model: {folder}/config.json names no base model")
    return models.local_name(config["model"]), models.portable_name(model)


def load_base(model: str, on: str | None, dtype) -> tuple:
    """(the pipeline on the CPU, with what `on` closed folded in; the base weights' fingerprint;
    (that mask, its modules), or ({}, []) without such a folder). Raises UserError."""
    pipe = models.load_pipeline(model, "cpu", dtype)
    base = fingerprint(pipe.transformer)
    if not on:
        return pipe, base, ({}, [])
    path = Path(models.local_name(on)) / "mask.safetensors"
    mask = load_mask(path, pipe.transformer)
    fold(pipe.transformer, mask)
    with safe_open(path, "pt") as f:
        modules = json.loads(f.metadata()["mask"])["modules"]
    return pipe, base, (mask, modules)


def joined(mask: dict, modules: list, earlier: tuple) -> tuple[dict, list]:
    """The mask and its modules with those of an earlier run: what either closes is closed."""
    earlier_mask, earlier_modules = earlier
    both = dict(earlier_mask)
    for site, gate in mask.items():
        both[site] = gate * earlier_mask.get(site, 1)
    return both, list(dict.fromkeys([*modules, *earlier_modules]))


def save_folded(model: str, kind: type, mask: dict, folder: Path) -> None:
    """The model's stored transformer with the mask folded in, in the dtype it is stored in."""
    transformer = models.stored_transformer(model, kind)
    fold(transformer, mask)
    for leftover in (folder, folder.with_name(folder.name + ".tmp")):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    write_atomically(folder, transformer.save_pretrained)


def read_state(folder: Path, gates: int, cases: int, steps: int) -> tuple[int, dict]:
    """(the step to go on from, train's state); (0, {}) where none was written yet. Raises UserError
    unless the file is that of a run with so many gates, cases and steps."""
    sizes = dict(latest=cases, logits=gates, step=1, exp_avg=gates, exp_avg_sq=gates)
    path = folder / "state.safetensors"
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
        raise UserError(f"--resume: {path} is of step {step}, --steps is {steps}")
    rows = len(read_metrics(folder, step))
    if rows < step:
        raise UserError(f"--resume: metrics.jsonl has {rows} rows, {path} is of step {step}")
    return step, state


def read_metrics(folder: Path, rows: int | None = None) -> list[dict]:
    """The first rows of metrics.jsonl, without what a kill left of a last one."""
    path = folder / "metrics.jsonl"
    check_regular(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    return [json.loads(line) for line in lines[:rows] if line.endswith("\n")]


def open_folder(folder: Path, config: dict, step: int):
    """Begins a run, or goes on with one from `step`: metrics of later steps are dropped. Returns a
    function for train's on_step: a line of metrics.jsonl a step, the state now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder, step))
    write_text(folder / "metrics.jsonl", kept)
    log = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def on_step(metrics: dict, state: dict) -> None:
        log.write(json.dumps(metrics) + "\n")
        log.flush()
        done = metrics["step"] + 1
        if done % config["save_every"] == 0 or done == config["steps"]:
            about = dict(step=str(done))
            path = folder / "state.safetensors"
            write_atomically(path, lambda temporary: save_file(state, temporary, about))

    return on_step


def listing(folder: Path) -> str:
    return " ".join(sorted(path.name for path in folder.iterdir()))


def last_words(folder: Path, steps: int) -> str:
    """What a finished run wrote, and what to do next."""
    lines = [f"wrote {folder}/: {listing(folder)}"]
    if steps < 200:
        lines.append(f"after only {steps} steps few gates have closed yet: a trial, not a result")
    preview = shlex.quote(str(folder / "preview.png"))
    lines.append(f"next: look at {preview}, then python evaluate.py {shlex.quote(str(folder))}")
    return "\n".join(lines)


def run_config(flags: dict, call: dict) -> dict:
    """What config.json says of a run: its flags, with those of the sampler as one dict."""
    left_out = (*NOT_RECORDED, *models.CALL_FLAGS)
    config = {name: value for name, value in flags.items() if name not in left_out}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    config |= dict(model=models.portable_name(flags["model"]), call=call)
    if flags["on"]:  # a second run: both concepts are gone, and the same mask is to be there again
        folder = Path(models.local_name(flags["on"]))
        before = read_config(folder)
        config["concept"] = list(dict.fromkeys([*flags["concept"], *before["concept"]]))
        config["kind"] = flags["kind"] or before.get("kind")
        config["on_mask"] = hashlib.sha256((folder / "mask.safetensors").read_bytes()).hexdigest()
    config |= dict(device_type=torch.device(flags["device"]).type)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return config | dict(versions=versions)


def read_config(folder: Path) -> dict:
    """Its config.json, {} if there is none. Raises UserError."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: is not a JSON object")
    return config


def check_writable(folder: Path, flag: str = "--out_dir") -> None:
    """Raises UserError."""
    home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not home.is_dir():
        raise UserError(f"{flag}: {home} is a file")
    if not os.access(home, os.W_OK):
        raise UserError(f"{flag}: {home} is not ours to write to")


def check_folder(out_dir: Path, config: dict, resume: bool, transformer_size: int) -> None:
    """Raises UserError unless out_dir is new or empty, or, to resume, holds an unfinished run of
    the same command; and unless the disk has room for what it writes, in bytes."""
    check_writable(out_dir)
    if out_dir.is_dir() and any(out_dir.iterdir()) and not resume:
        advice = "choose another folder, or --resume its run"
        raise UserError(f"--out_dir: {out_dir} is not empty; {advice}")
    if resume:
        before = read_config(out_dir)
        if not before:
            raise UserError(f"--resume: no run to go on with in {out_dir} (no config.json)")
        for flag, value in config.items():
            if flag not in FREE and before.get(flag) != value:
                found = f"was {before.get(flag)}, now {value}"
                raise UserError(f"--resume: --{flag} {found}; repeat the same command")
        if (out_dir / "mask.safetensors").exists():
            raise UserError(f"--resume: the run in {out_dir} is finished")
    needed = 2**26 + (transformer_size if config["save"] == "full" else 0)
    home = next(p for p in (out_dir.absolute(), *out_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        found = f"{free / 2**30:.2f} GiB free, {needed / 2**30:.2f} needed"
        raise UserError(f"--out_dir: {found}; --save mask needs little")
