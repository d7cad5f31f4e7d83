"""Whose pictures an evaluation compares: folders in, the columns of its table and their pictures
out. A picture is drawn once and kept."""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tqdm import tqdm

import erase
from artefacts import fingerprint, load_mask, read_config
from cases import Case
from pictures import check_picture, draw
from safely import UserError, first_line, write_atomically


class Column(NamedTuple):
    """One model of the table: where its pictures lie and what draws them."""

    name: str
    folder: Path
    load: Callable | None = None  # gives a pipeline; None: the pictures are all there is
    gates: dict = {}  # {site: (U,)} over that pipeline; equal to folding them in, bit for bit
    weights: str = ""  # what tells its weights from others'

    def files(self, cases: list[Case]) -> list[Path]:
        return [self.folder / case.file for case in cases]


def load_other(base, folder: Path):
    """A whole pipeline of the base's class. Raises UserError."""
    pipe = models.load_pipeline(str(folder), "cpu", base.dtype)
    if type(pipe) is not type(base):
        raise UserError(f"{folder}: is a {type(pipe).__name__}, the base a {type(base).__name__}")
    return pipe


def with_transformer(base, folder: Path):
    """The base's pipeline with the transformer of another folder."""
    pipe = copy.copy(base)
    how = dict(dtype=base.transformer.dtype, use_safetensors=True)
    pipe.transformer = type(base.transformer).from_pretrained(folder, **how)
    return pipe


def make_column(path: Path, out_dir: Path, base) -> Column:
    """The column of an erased folder of ours, a diffusers pipeline or transformer folder, or a
    folder of pictures. base: the base's pipeline. Raises UserError."""
    home = out_dir / re.sub(r"\W+", "_", str(path)).strip("_")
    if "concept" in read_config(path):
        file = path / "mask.safetensors"
        mask = load_mask(file, base.transformer)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return Column(str(path), home, lambda: base, mask, digest)
    kind = type(base.transformer).__name__
    folders = [path, path / "transformer"]
    folders = [folder for folder in folders if read_config(folder).get("_class_name") == kind]
    if (path / "model_index.json").is_file():
        column = Column(str(path), home, lambda: load_other(base, path))
    elif folders:
        column = Column(str(path), home, lambda: with_transformer(base, folders[0]))
    elif any(path.glob("*/*.png")):
        return Column(str(path), path)
    else:
        holds = "neither an erased model, a diffusers model nor pictures"
        raise UserError(f"{path}: is empty, or holds {holds}")
    try:  # loaded once here: what is wrong with it shows before anything is drawn
        parts = [part for _, part in sorted(column.load().components.items())]
        weights = [fingerprint(part) for part in parts if isinstance(part, torch.nn.Module)]
    except (*models.LOADING_ERRORS, RuntimeError) as error:
        raise UserError(f"{path}: cannot load: {first_line(error)}") from None
    return column._replace(weights=" ".join(weights))  # text encoders too: some methods edit them


def random_mask(mask: dict, seed: int = 0) -> dict:
    """As many closed gates as in `mask` at each site: sites differ in how much a gate does."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for site, gates in mask.items():
        shuffled[site] = gates[torch.randperm(gates.numel(), generator=generator)]
    return shuffled


def soft_gates(folder: Path, mask: dict, transformer) -> dict:
    """The relaxed gates as training left them, neither thresholded nor folded; but what an earlier
    run had closed in the mask stays closed."""
    config = read_config(folder)
    logits = load_file(folder / "state.safetensors")["logits"]
    threshold = erase.closing_threshold(logits, config["max_closed"])
    gates = erase.relax(logits, config["gate"], threshold)
    sites = erase.gate_sites(transformer, config["modules"])
    is_open = erase.split((logits > threshold).float(), sites)
    soft = dict(mask)
    for site, gate in erase.split(gates, sites).items():
        soft[site] = torch.where((is_open[site] == 1) & (mask[site] == 0), 0.0, gate)
    return soft


def make_controls(columns: list[Column], out_dir: Path) -> tuple[list[Column], str]:
    """(the base drawn again, and for the first column with a mask as many gates closed at random
    and its gates before thresholding; "" or which of them there cannot be). columns: the base, then
    the erased."""
    base, *erased = columns
    controls = [Column("base again", out_dir / "base_again", base.load, weights=base.weights)]
    masked = next((column for column in erased if column.gates), None)
    names = " ".join(column.name for column in erased)
    if not masked:
        return controls, f"neither random nor soft gates: no mask in {names}"
    mask = random_mask(masked.gates)
    weights = f"{masked.weights}, shuffled at each site"
    controls.append(Column("random gates", out_dir / "random_gates", base.load, mask, weights))
    if not (Path(masked.name) / "state.safetensors").is_file():
        return controls, f"no soft gates: no state.safetensors in {names}"
    gates = soft_gates(Path(masked.name), masked.gates, base.load().transformer)
    controls.append(Column("soft gates", out_dir / "soft_gates", base.load, gates, masked.weights))
    return controls, ""


def check_columns(columns: list[Column], cases: list[Case], listings: dict, size: tuple) -> None:
    """Raises UserError unless the pictures there are whole, and those that we drew belong to the
    same prompts, sizes and weights. listings: {column's name: its cases.json}."""
    names = [column.name for column in columns]
    if len(set(names)) < len(names) or len({column.folder for column in columns}) < len(names):
        raise UserError(f"--compare: two columns of the same name: {', '.join(names)}")
    for column in columns:
        file = column.folder / "cases.json"
        if column.load and any(column.folder.glob("*/*.png")):
            text = file.read_text(encoding="utf-8") if file.is_file() else "null"
            if json.loads(text) != listings[column.name]:
                found = f"{column.folder} holds pictures of other prompts, sizes or weights"
                raise UserError(f"--out_dir: {found}; delete it or choose another folder")
    for column in columns:
        for file in column.files(cases):
            if not column.load or file.exists():
                check_picture(file, size)


def my_batches(cases: list[Case], size: int) -> list[list[Case]]:
    """This process's share of the cases, whole batches at a time."""
    workers = PartialState()
    starts = range(0, len(cases), size)[workers.process_index :: workers.num_processes]
    return [cases[start : start + size] for start in starts]


def draw_missing(column: Column, cases: list[Case], call: dict, batch: int, device) -> None:
    """Draws the pictures that are not there yet, whole batches at a time: a picture has the same
    bits whichever process draws it and whatever is there already."""
    todo = []
    for part in my_batches(cases, batch):
        if column.load and not all(file.exists() for file in column.files(part)):
            todo.append(part)
    if todo:
        pipe = column.load()
        if "encode_prompt" not in vars(pipe):  # once for all columns of the base
            models.remember_prompts(pipe)
        pipe.to(device)
        is_quiet = not PartialState().is_local_main_process
        with erase.gated(pipe.transformer, column.gates):
            for part in tqdm(todo, f"draw {column.name}", disable=is_quiet):
                prompts = [case.prompt for case in part]
                drawn = draw(pipe, prompts, [case.seed for case in part], batch, **call)
                for file, picture in zip(column.files(part), drawn, strict=True):
                    if not file.exists():
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(file, lambda path: picture.save(path, format="png"))
        pipe.to("cpu")  # one model at a time on the device
    PartialState().wait_for_everyone()
