"""Whose pictures an evaluation compares: erased models in, the columns of its table and their
pictures out. A picture is drawn once and kept. foreign.py says what a path holds."""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import artefacts
import erase
import foreign
from artefacts import digest, erased_config, read_json, write_json
from cases import Case, neutral_digest
from pictures import check_picture, draw
from safely import UserError, check_link, first_line, remove_leftovers, write_atomically

LATENTS = "latents.safetensors"


class Column(NamedTuple):
    """One model of the table: where its pictures lie and what draws them."""

    name: str
    folder: Path
    load: Callable | None = None  # gives a pipeline; None: the pictures are all there is
    gates: dict = {}  # {site: (U,)} over that pipeline; equal to folding them in, bit for bit
    weights: str = ""  # what tells its weights from others'
    form: str = ""  # what it is, in words
    closed: float | None = None  # share of the gate units that are zero in it; None: see gates
    flat: dict = {}  # {case's file: its picture}, where they are not in folders by set

    def files(self, cases: list[Case]) -> list[Path]:
        return [self.flat.get(case.file, self.folder / case.file) for case in cases]


def slug(name: str) -> str:
    """The name of a column's folder."""
    return re.sub(r"\W+", "_", name).strip("_")


def make_column(path: Path, out_dir: Path, base, cases: list, call: dict, lora_scale=None):
    """The Column of whatever foreign.find() takes. base: the base's pipeline; call: the sampler's
    arguments. Raises UserError."""
    found = foreign.find(path, base, lora_scale)
    if not found.load:
        return picture_column(path, cases, call)
    home = out_dir / slug(str(path))
    column = Column(str(path), home, found.load, found.mask, found.weights)
    return column._replace(form=found.form, closed=found.closed)


def earlier_columns(names, out_dir: Path, cases: list, call: dict, weights: dict) -> list[Column]:
    """Those of earlier evaluations in out_dir of which pictures are still there, and of a folder of
    pictures the same. weights: {name: what told it from others then}."""
    found = []
    for name in names:
        column = Column(name, out_dir / slug(name))
        if not column.folder.is_dir() and foreign.is_pictures(Path(name)):
            with suppress(UserError):  # of other cases by now
                column = picture_column(Path(name), cases, call)
                if column.weights != weights.get(name, column.weights):
                    continue
        if any(file.is_file() for file in column.files(cases)):
            found.append(column)
    return found


def picture_column(folder: Path, cases: list[Case], call: dict) -> Column:
    """Of pictures in folders by set, as cases.json lists them, or flat: named <set>_<name>.png, or
    as many as there are cases, in their order, 2.png before 10.png; told from others by a hash of
    them. call: the sampler's arguments, which a cases.json may say too. Raises UserError."""
    column = found_pictures(folder, cases, call)
    files = [file for file in column.files(cases) if file.is_file()]
    hashes = "".join(digest(file) for file in files)
    return column._replace(weights=hashlib.sha256(hashes.encode()).hexdigest())


def found_pictures(folder: Path, cases: list[Case], call: dict) -> Column:
    """Without that hash."""
    told = read_json(folder / "cases.json")
    said = told["call"] if isinstance(told.get("call"), dict) else told  # flat: evaluate.py's own
    drawn = call | {name: said[name] for name in call if name in said}
    if drawn != call:
        raise UserError(f"{folder}: its cases.json is of the call {drawn}, not {call}")
    listing = told.get("cases")
    rows = [row for row in listing if isinstance(row, dict)] if isinstance(listing, list) else []
    known = {str(row.get("file")): (row.get("prompt"), row.get("seed")) for row in rows}
    for case in cases if listing else ():
        if known.get(case.file) != (case.prompt, case.seed):
            raise UserError(f"{folder}: its cases.json has no {case.file} of this prompt and seed")
    if any((folder / case.set).is_dir() for case in cases):
        return Column(str(folder), folder, form="pictures in folders by set")
    named = {case.file: folder / f"{case.set}_{case.name}.png" for case in cases}
    lacking = [file.name for file in named.values() if not file.exists()]
    if not lacking:
        return Column(str(folder), folder, form="pictures matched by name", flat=named)
    pictures = sorted(folder.glob("*.png"), key=natural_order)
    if len(pictures) != len(cases) or len(lacking) < len(cases):  # in order only without any name
        found = f"{len(pictures)} pictures for {len(cases)} cases, none is named {lacking[0]}"
        raise UserError(f"{folder}: {found}")
    flat = {case.file: file for case, file in zip(cases, pictures, strict=True)}
    return Column(str(folder), folder, form="pictures matched in sorted order", flat=flat)


def natural_order(file: Path) -> list:
    """For sorting: 2.png comes before 10.png."""
    return [int(x) if x.isdigit() else x for x in re.split(r"([0-9]+)", file.name)]


def random_mask(mask: dict, seed: int = 0) -> dict:
    """As many closed gates as in `mask` at each site: sites differ in how much a gate does."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for site, gates in mask.items():
        shuffled[site] = gates[torch.randperm(gates.numel(), generator=generator)]
    return shuffled


def load_logits(file: Path, gates: int) -> torch.Tensor:
    """(G,) as training left them. Raises UserError."""
    try:
        logits = load_file(file)["logits"]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{file}: is damaged ({first_line(error)})") from None
    if logits.shape != (gates,) or not logits.isfinite().all():
        raise UserError(f"{file}: is damaged (not {gates} finite logits)")
    return logits


def soft_gates(folder: Path, mask: dict, transformer) -> dict:
    """The relaxed gates as training left them, neither thresholded nor folded; but what an earlier
    run had closed in the mask stays closed."""
    config = erased_config(folder)
    gate, most, heat = map(config.get, ("gate", "max_closed", "temperature"))
    if gate not in erase.START or type(most) not in (int, float) or not 0 <= most <= 1:
        raise UserError(f"{folder / 'config.json'}: gate is {gate!r}, max_closed {most!r}")
    if type(heat) not in (int, float) or heat <= 0:
        raise UserError(f"{folder / 'config.json'}: temperature is {heat!r}")
    sites = erase.gate_sites(transformer, config["modules"])
    logits = load_logits(folder / "state.safetensors", sum(site.units for site in sites.values()))
    threshold = erase.closing_threshold(logits, most)
    gates = erase.relax(logits, gate, threshold, temperature=heat)
    is_open = erase.split((logits > threshold).float(), sites)
    soft = dict(mask)
    for site, gates_there in erase.split(gates, sites).items():
        was_closed = (is_open[site] == 1) & (mask[site] == 0)
        soft[site] = torch.where(was_closed, 0.0, gates_there)
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
    weights = f"{masked.weights}, its gates shuffled at each site"
    parts = foreign.parts_of(Path(masked.name))
    erasure = artefacts.load_erasures(parts, base.load())._replace(mask={})
    load = partial(artefacts.erased_copy, base.load(), erasure)
    controls.append(Column("random gates", out_dir / "random_gates", load, mask, weights))
    if not (Path(masked.name) / "state.safetensors").is_file():
        return controls, f"no soft gates: no state.safetensors in {names}"
    gates = soft_gates(Path(masked.name), masked.gates, base.load().transformer)
    weights = f"{masked.weights}, before thresholding"
    controls.append(Column("soft gates", out_dir / "soft_gates", load, gates, weights))
    return controls, ""


def check_columns(columns: list[Column], cases: list[Case], listings: dict, size: tuple) -> None:
    """Raises UserError unless the pictures there are whole, and those that we drew belong to the
    same prompts, sizes and weights. listings: {column's name: its cases.json}."""
    names = [column.name for column in columns]
    if len(set(names)) < len(names) or len({column.folder for column in columns}) < len(names):
        raise UserError(f"--compare: two columns of the same name: {', '.join(names)}")
    for column in columns:
        files = column.files(cases)
        homes = {column.folder, *(file.parent for file in files)}
        for path in (*homes, *files) if column.load else ():
            check_link(path)
            remove_leftovers(path)
        has_some = any(column.folder.glob("*/*.png")) or (column.folder / LATENTS).exists()
        if column.load and has_some:
            if read_json(column.folder / "cases.json") != listings[column.name]:
                found = f"{column.folder} holds pictures of other prompts, sizes or weights, or"
                found += " drawn on another device or by other versions of packages"
                raise UserError(f"--out_dir: {found}; delete it or choose another folder")
    for column in columns:
        known = read_json(column.folder / "pictures.json") if column.load else {}
        for case, file in zip(cases, column.files(cases), strict=True):
            if not column.load or file.exists():
                check_picture(file, size)
                if case.file in known and known[case.file] != digest(file):
                    raise UserError(f"{file}: was changed since it was drawn; delete it")


def write_digests(column: Column, cases: list[Case]) -> None:
    """Of the pictures that it drew, by which check_columns() knows them again."""
    files = zip(cases, column.files(cases), strict=True)
    known = {case.file: digest(file) for case, file in files}
    write_json(column.folder / "pictures.json", known)


def my_batches(cases: list[Case], size: int) -> list[list[Case]]:
    """This process's share of the cases, whole batches at a time."""
    workers = PartialState()
    starts = range(0, len(cases), size)[workers.process_index :: workers.num_processes]
    return [cases[start : start + size] for start in starts]


def save_latents(column: Column, pipe, cases: list[Case], call: dict, batch: int) -> None:
    """The final latents (N, ...) of the concept prompts; the base's of their neutral prompts too,
    from the same noise, with their digest."""
    paired = [case for case in cases if case.neutral is not None]
    prompts = dict(concept=[case.prompt for case in paired])
    if column.name == "base":
        prompts["neutral"] = [case.neutral for case in paired]
    latents = {}
    for name, texts in prompts.items():
        parts = []
        for start in range(0, len(paired), batch):
            part = slice(start, start + batch)
            seeds = [case.seed for case in paired[part]]
            with torch.no_grad():
                parts.append(erase.rollout(pipe, texts[part], seeds, **call).cpu())
        latents[name] = torch.cat(parts)
    about = dict(neutral=neutral_digest(cases))
    write_atomically(column.folder / LATENTS, lambda path: save_file(latents, path, about))


def has_latents(column: Column, cases: list[Case]) -> bool:
    """Whether they are there; the base's are of these very neutral prompts."""
    file = column.folder / LATENTS
    if not file.exists() or column.name != "base":
        return file.exists()
    try:
        with safe_open(file, "pt") as f:
            return (f.metadata() or {}).get("neutral") == neutral_digest(cases)
    except (SafetensorError, OSError):
        return True  # residues() says what is wrong with it


def residues(column: Column, base: Column, cases: list[Case]) -> dict:
    """{(set, name, "residue", concept): |erased - neutral|^2 / |base - neutral|^2 of the final
    latents}: 0 is the neutral picture, 1 the base's. It sees what a judge overlooks. {} for
    pictures without a model, and without neutral prompts. Raises UserError."""
    paired = [case for case in cases if case.neutral is not None]
    if not paired or not column.load:
        return {}
    loaded = []
    for one in (column, base):
        try:
            loaded.append(load_file(one.folder / LATENTS))
            lacking = {"concept", *(["neutral"] if one is base else [])} - loaded[-1].keys()
            if lacking:
                raise SafetensorError(f"no {min(lacking)}")
        except (SafetensorError, OSError) as error:
            found = f"is damaged ({first_line(error)}); delete it"
            raise UserError(f"{one.folder / LATENTS}: {found}") from None
    erased, before = loaded
    if not len(erased["concept"]) == len(before["neutral"]) == len(paired):
        raise UserError(f"{column.folder / LATENTS}: is of other prompts; delete it")
    after = erase.squared_error(erased["concept"], before["neutral"])
    whole = erase.squared_error(before["concept"], before["neutral"])
    ratios = (after / whole.clamp(min=1e-12)).tolist()
    found = {}
    for case, ratio in zip(paired, ratios, strict=True):
        found[case.set, case.name, "residue", case.asks[0][1]] = ratio
    return found


def draw_missing(column: Column, cases: list[Case], call: dict, batch: int, device) -> None:
    """Draws the pictures that are not there yet, whole batches at a time: a picture has the same
    bits whichever process draws it and whatever is there already."""
    todo = []
    for part in my_batches(cases, batch):
        if column.load and not all(file.exists() for file in column.files(part)):
            todo.append(part)
    paired = [case for case in cases if case.neutral is not None]
    lacks_latents = column.load and paired and not has_latents(column, cases)
    is_first = PartialState().is_main_process
    if todo or (lacks_latents and is_first):
        pipe = column.load()
        models.remember_prompts(pipe)  # once for all columns of the base
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
            if lacks_latents and is_first:
                save_latents(column, pipe, cases, call, batch)
        pipe.to("cpu")  # one model at a time on the device
    PartialState().wait_for_everyone()
