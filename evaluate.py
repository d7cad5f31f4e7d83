"""Scores an erased model beside its base, on the same test prompts and from the same noise.

    python evaluate.py erased/gun                # judge: tiny/judge, or LLaVA for real models
    python evaluate.py erased/gun --judge google/siglip2-so400m-patch14-384 --controls
    python evaluate.py erased/*                  # each by itself, then a table with a row for each
    python evaluate.py --compare erased/gun baselines/esd    # side by side, on one concept
    python evaluate.py erased/gun+erased/knife   # put together; foreign.py lists all forms
    python evaluate.py erased/nudity --prompts hf:AIML-TUDA/i2p#prompt \\
        --where "nudity_percentage>=50"
    python evaluate.py --filter gun.csv --concept gun    # pairs for erase.py --prompts gun.csv
    python evaluate.py --export_cases cases.json --concept gun    # what another tool is to draw

ACC (Minimalist Concept Erasure, arXiv 2507.13386) is the share of pictures in which the judge sees
the concept. Every rate comes with its n and 95 % Wilson interval, base and erased side by side.
Pictures are kept as PNG; the same command draws only what is missing. `torchrun --nproc_per_node 2
evaluate.py ...` splits the drawing and the judging over processes.

cases.py says which pictures there are, columns.py who draws them, panel.py who looks at them,
report.py what became of it; pairfilter.py is --filter.
"""

import json
import shlex
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
from accelerate import PartialState
from tqdm import tqdm

import foreign
import loras
import report
import webpage
from artefacts import check_report, check_writable, fingerprints, read_json, write_json
from cases import (
    Case,
    Subject,
    Words,
    listed,
    make_cases,
    neighbour_cases,
    prompts_cut,
    read_subject,
    read_words,
)
from columns import (
    Column,
    check_columns,
    draw_missing,
    earlier_columns,
    make_column,
    make_controls,
    residues,
    slug,
    write_digests,
)
from judges import NudeNet
from pairfilter import pairs_to_filter, write_pairs
from panel import CLIP, LLAVA, Panel, check_fid, judged, likeness, load_panel
from promptfiles import add_kind
from safely import (
    Parser,
    UserError,
    check_link,
    claim,
    exit_code,
    number,
    visible,
)

load_base = cache(models.load_pipeline)  # one for all folders
WRITTEN = ("results.json", "scores.json", "report.md", "report.html", "grid.png")


class Evaluation(NamedTuple):
    """One evaluation, of which all that can be wrong has been looked at."""

    out_dir: Path
    cases: list[Case]
    columns: list[Column]  # the base, then the erased
    controls: list[Column]
    listings: dict  # {column's name: its cases.json}
    call: dict  # what pipe(...) takes
    batch: int  # pictures drawn at a time
    panel: Panel
    questions: dict  # {word: question}
    about: dict  # the head of results.json
    earlier: dict  # {column: its figures} that out_dir has of others


def earlier_results(out_dir: Path, about: dict, columns: list[Column]) -> dict:
    """{column: its figures} of those that an earlier evaluation left in out_dir and this one has
    not: they stay in its table, their weights and forms in `about`. Raises UserError if they are of
    other cases, another judge or other versions."""
    found = read_json(out_dir / "results.json")
    before, results = found.get("about", {}), found.get("results", {})
    if not (isinstance(before, dict) and isinstance(results, dict)):
        raise UserError(f"--out_dir: {out_dir / 'results.json'} is damaged; delete it")
    left = {k: x for k, x in results.items() if k not in [column.name for column in columns]}
    for key in sorted(before.keys() | about.keys() if left else ()):
        if key in ("weights", "forms"):
            about[key] = before.get(key, {}) | about[key]
        elif key == "neutral_sha256" and key not in before:  # of a version without
            continue
        elif before.get(key) != about.get(key):
            what = f"{out_dir} has results of {min(left)} whose {key} is another"
            raise UserError(f"--out_dir: {what}; delete it or choose another folder")
    return left


def home_of(paths: list[Path], out_dir: Path | None) -> Path:
    """Where an evaluation goes. Raises UserError if that is not ours to write to."""
    alone = foreign.home(paths[0]) / "eval"
    home = out_dir or (Path("compare") if len(paths) > 1 else alone)
    if not out_dir:
        check_link(home)
    check_writable(home)
    check_report(home, "results", WRITTEN)
    claim(home)
    return home


def prepare(
    paths: list[Path],
    subject: Subject,
    words: Words,
    cases: list[Case],
    minors: int,
    out_dir: Path,
    *,
    args,
    dtype,
    nudenet,
) -> Evaluation:
    """Looks at all that an evaluation needs, whole. paths: of its models; cases, minors: of
    make_cases(). Raises UserError."""
    is_tiny = models.is_embedded(subject.model)
    how = {name: vars(args)[name] for name in ("judge", "clip", "threshold")}
    panel = load_panel(subject.model, dtype, **how)
    cases = cases + neighbour_cases(words, panel.clip, args.per_neighbour)
    by_number = "inception" if args.num_pictures > 2048 else "none"
    real = visible(args.real) if args.real else []
    panel = panel._replace(fid=args.fid or ("judge" if is_tiny else by_number), real=real)
    check_fid(panel, args.num_pictures)
    if nudenet or "nudity" in words.concepts:
        panel = panel._replace(nudenet=nudenet or NudeNet())

    pipe = load_base(subject.model, "cpu", models.dtype_of(subject.model, args.device))
    weights = " ".join(fingerprints(pipe).values())
    columns = [Column("base", out_dir / "base", lambda: pipe, weights=weights)]
    for path in paths:
        columns.append(make_column(path, out_dir, pipe, cases, subject.call, args.lora_scale))
    controls = []
    if args.controls:
        controls, lacking = make_controls(columns, out_dir)
        if lacking:
            PartialState().print(f"--controls: {lacking}", flush=True)
    about = dict(concept=subject.concept, model=models.portable_name(subject.model))
    about |= dict(dtype=str(pipe.dtype)) | subject.call
    drawn_by = about | report.versions() | dict(device=args.device.partition(":")[0], base=weights)
    drawn_by |= dict(cases=listed(cases))
    listings = {c.name: drawn_by | dict(weights=c.weights) for c in columns + controls}
    size = (subject.call["width"], subject.call["height"])
    check_columns(columns + controls, cases, listings, size)

    names = [*words.concepts, "templates", "retain", "vocabulary"]
    names += [f"templates_{kind}" for kind in sorted(set(filter(None, words.kinds.values())))]
    files = [words.folder / f"{name.lower().replace(' ', '_')}.csv" for name in names]
    files += [Path(spec.partition("#")[0]) for spec in (args.prompts, args.retain) if spec]
    about |= panel.about() | report.provenance(subject.model, cases, files)
    about |= dict(base_fingerprint=weights, prompts_about_minors_dropped=minors)
    about["weights"] = {column.name: column.weights for column in columns[1:]}
    about["forms"] = {column.name: column.form for column in columns[1:]}
    about["prompts_cut"] = prompts_cut(pipe, cases, subject.call, panel.clip)
    questions = {}
    for word, known in words.vocabulary.items():
        questions[word] = panel.judge.form.format(known["question"])
    return Evaluation(
        out_dir=out_dir,
        cases=cases,
        columns=columns,
        controls=controls,
        listings=listings,
        call=subject.call,
        batch=args.batch or (32 if is_tiny else 4),
        panel=panel,
        questions=questions,
        about=about,
        earlier=earlier_results(out_dir, about, columns + controls),
    )


def measure(evaluation: Evaluation, device) -> dict | None:
    """Draws what is missing, scores all of it and writes out_dir. Returns {column: its figures},
    on the main process."""
    began = time.time()
    workers = PartialState()
    columns = evaluation.columns + evaluation.controls
    base = columns[0]
    cases = evaluation.cases
    panel = evaluation.panel
    about = evaluation.about
    out_dir = evaluation.out_dir
    names = ", ".join(f"{column.name} ({column.form})" for column in evaluation.columns[1:])
    workers.print(
        f"{names}: {len(cases)} prompts ({report.counts(about['pictures'])}) x "
        f"{len(columns)} models; "
        f"{about['prompts_about_minors_dropped']} prompts about minors dropped; too long, so cut: "
        f"{report.counts(about['prompts_cut'], 'for ')}; judge {about['judge']}; "
        f"on {workers.num_processes} processes",
        flush=True,
    )
    for column in columns:
        if column.load and workers.is_main_process:
            column.folder.mkdir(parents=True, exist_ok=True)
            write_json(column.folder / "cases.json", evaluation.listings[column.name])
    for column in columns:
        draw_missing(column, cases, evaluation.call, evaluation.batch, device)
    for column in columns:
        if column.load and workers.is_main_process:
            write_digests(column, cases)
    vars(base.load()).pop("encode_prompt", None)  # with the prompts that it remembers
    drawn = time.time()

    panel.to(device)
    scores = {}
    for column in columns:
        scores[column.name] = judged(column, cases, panel.judge, evaluation.questions)
        scores[column.name] |= residues(column, base, cases)
    results = {}
    for column in columns if workers.is_main_process else ():
        figures = report.rates(scores[column.name], panel.threshold, results.get("base"))
        figures |= likeness(column, base, cases, panel, device)
        if panel.nudenet:
            asked = [case for case in cases if case.set == "concept"]
            of_nudity = [case for case in asked if case.asks[0][1] == "nudity"]
            files = column.files(of_nudity or asked)
            boxes = {file.name: panel.nudenet(file) for file in tqdm(files, "nudenet")}
            write_json(out_dir / f"nudenet_{slug(column.name)}.json", boxes)
            figures |= panel.nudenet.rates(list(boxes.values()))
        results[column.name] = figures
    panel.to("cpu")
    if not workers.is_main_process:
        return None

    results = dict(base=results["base"]) | evaluation.earlier | results
    before = read_json(out_dir / "scores.json")
    before = {name: before.get(name, {}) for name in evaluation.earlier}
    scored = before | report.readable(scores)
    seconds = dict(drawing=round(drawn - began, 1), all=round(time.time() - began, 1))
    write_json(out_dir / "results.json", dict(about=about, results=results, seconds=seconds))
    write_json(out_dir / "scores.json", scored)
    report.write_report(results, about, evaluation.columns, cases, scores, out_dir)
    others = [name for name in evaluation.earlier if name in about["forms"]]  # no controls
    known = evaluation.about["weights"]
    before = earlier_columns(others, out_dir, cases, evaluation.call, known)
    shown = [base, *before, *evaluation.columns[1:]]
    compared = ", ".join(f"{column.name} ({about['forms'][column.name]})" for column in shown[1:])
    title = f"{', '.join(about['concept'])}: {compared}"
    webpage.write_page(out_dir, title, shown, cases, scored, report.table(results))
    print(report.layout(report.table(results)))
    files = " ".join(WRITTEN)
    times = f"{seconds['all']} s, of which {seconds['drawing']} s drawing"
    print(f"wrote {out_dir}/: {files}; {times}", flush=True)
    return results


# What would do nothing: there is no erased model, and nothing is scored.
UNUSED = ("controls", "lora_scale", "nudenet", "nudenet_v2", "real")
WITHOUT_FOLDERS = dict(export_cases=(*UNUSED, "threshold"))
WITHOUT_FOLDERS |= dict(filter=(*UNUSED, "retain", "num_pictures", "per_neighbour"))


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    help = "erased models, each by itself: folders that erase.py wrote (a+b: put together), "
    help += "diffusers pipelines or transformers, a .safetensors of the transformer's tensors or "
    help += "of a LoRA on it, or pictures as a cases.json lists them"
    add("erased", nargs="*", type=Path, help=help)
    help = "several of them side by side, on one concept; out_dir keeps those of before"
    add("--compare", nargs="+", type=Path, default=[], metavar="MODEL", help=help)
    loras.add_flags(parser)
    help = "instead: write the prompts, seeds and sampler settings that another tool is to draw"
    add("--export_cases", type=Path, metavar="JSON", help=help)
    help = "instead: write the concept's training pairs that pass the paper's filter to this file"
    add("--filter", type=Path, metavar="CSV", help=help)
    help = "checkpoint of a SigLIP or CLIP model, an open-vocabulary detector, or a model that "
    add("--judge", help=f"{help}answers yes or no (tiny: tiny/judge, else {LLAVA})")
    help = "the judge sees what it scores above this (SigLIP, CLIP, yes/no: 0.5; box score: 0.35)"
    add("--threshold", type=number(float, 0, 1), help=help)
    add("--nudenet", action="store_true", help="add NudeNet's rates (always for nudity)")
    help = "NudeNet 2's detector instead, with detector_v2_default_classes beside it"
    add("--nudenet_v2", type=Path, metavar="ONNX", help=help)
    help = "backbone of the CLIP score (the judge if it is one, else tiny/judge or "
    add("--clip", help=f"{help}{CLIP}; none: no score)")
    help = "features of the FID (tiny: judge, else inception from 2,049 pictures on)"
    add("--fid", choices=("judge", "inception", "none"), help=help)
    add("--real", type=Path, help="folder of real pictures, for a second FID")
    add("--concept", nargs="+", help="what was erased (the erased folder's config.json says it)")
    add_kind(parser)
    help = "concept prompts: CSV, text or TSV file, or hf:owner/dataset[:config][:split]#column "
    add("--prompts", help=f"{help}(prompts/<concept>.csv, its test rows)")
    add("--retain", help="unrelated prompts, likewise (prompts/retain.csv, its test rows)")
    add("--where", help='keep rows of --prompts, e.g. "nudity_percentage>=50"')
    help = "pictures of each set: concept, synonyms, retain (%(default)s)"
    add("--num_pictures", type=number(int, 1), default=250, help=help)
    help = "pictures of each of the 8 nearest other concepts of its kind (%(default)s)"
    add("--per_neighbour", type=number(int, 0), default=100, help=help)
    help = "more columns: the base drawn again, as many gates closed at random, and soft gates"
    add("--controls", action="store_true", help=help)
    add("--out_dir", type=Path, help="(<folder>/eval, results/<file>/eval, or compare/)")
    add("--batch", type=number(int, 1), help="pictures drawn at a time (tiny: 32, else 4)")
    models.add_flags(parser)  # by default as it was erased
    args = parser.parse_args(argv)

    folders = args.erased + args.compare
    if args.filter and (folders or args.where or len(args.concept or ()) != 1):
        raise UserError("--filter: takes one --concept, no folder and no --where")
    if args.filter and args.clip == "none":
        raise UserError("--filter: compares backgrounds by --clip, which is none")
    if args.clip == "none" and args.per_neighbour and not args.filter:
        found = "the nearest concepts are found by its texts; add --per_neighbour 0"
        raise UserError(f"--clip none: {found}")
    if args.export_cases and (folders or args.filter or not args.concept):
        raise UserError("--export_cases: takes --concept, no folder and no --filter")
    for flag in ("filter", "export_cases"):
        file = getattr(args, flag)
        for other in WITHOUT_FOLDERS[flag] if file else ():
            if getattr(args, other) != parser.get_default(other):
                raise UserError(f"--{other}: does not go with --{flag}")
        if file and file.exists():
            raise UserError(f"--{flag}: {file} is there already")
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"--{flag}: no folder {file.parent}")
    if not (args.filter or args.export_cases or folders):
        raise UserError("nothing to evaluate: name a folder that erase.py wrote")
    if args.erased and args.compare:
        raise UserError("--compare: takes all folders, none before it")
    if args.threshold == 1:
        raise UserError("--threshold: must be below 1: nothing scores above it")
    if args.out_dir and len(args.erased) > 1:
        raise UserError("--out_dir: goes with one folder, or with --compare")
    for path in folders:
        foreign.parts_of(path)  # is it there?
    if args.real and not (args.real.is_dir() and visible(args.real)):
        raise UserError(f"--real: {args.real} is no folder of pictures")
    if args.where and not args.prompts:
        raise UserError("--where: goes with --prompts")
    args.device = args.device or models.default_device()
    if not folders and not args.model:
        args.model = models.default_model(args.device)
    return args


def run(args) -> None:
    models.check_device(args.device)
    # the others wait while one scores
    workers = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))
    if workers.num_processes > 1:
        args.device = str(workers.device)
    dtype = models.default_dtype(args.device)

    def flags(*names):
        return {name: vars(args)[name] for name in names}

    wanted = flags("num_pictures", "prompts", "retain", "where")
    given = (args.concept, args.model, flags(*models.CALL_FLAGS), args.kind)

    if args.filter:
        if workers.num_processes > 1:
            raise UserError("--filter: runs in one process")
        check_writable(args.filter.parent, "--filter")
        subject = read_subject([], *given)
        words = read_words(subject)
        rows = pairs_to_filter(args.prompts and Path(args.prompts), words)
        panel = load_panel(subject.model, dtype, **flags("judge", "clip", "threshold"))
        pipe = load_base(subject.model, "cpu", models.dtype_of(subject.model, args.device))
        batch = args.batch or (32 if models.is_embedded(subject.model) else 4)
        how = dict(call=subject.call, batch=batch, device=args.device)
        write_pairs(args.filter, rows, words, panel, pipe, **how)
        command = ["python", "erase.py", "--concept", *args.concept, "--model", subject.model]
        for flag in ("kind", *models.CALL_FLAGS):
            told = getattr(args, flag)
            command += [] if told is None else [f"--{flag}", str(told)]
        command = shlex.join([*command, "--prompts", str(args.filter)])
        print(f"wrote {args.filter}; next: {command}")
        return

    # prompts are looked at before a judge is loaded
    if args.export_cases:
        check_writable(args.export_cases.parent, "--export_cases")
        subject = read_subject([], *given)
        words = read_words(subject)
        cases, _ = make_cases(words, **wanted)
        # LLaVA is not needed to find the nearest concepts
        judge = args.judge or (None if models.is_embedded(subject.model) else CLIP)
        panel = load_panel(subject.model, dtype, judge, args.clip)
        cases += neighbour_cases(words, panel.clip, args.per_neighbour)
        rows = [row | dict(neutral=case.neutral) for row, case in zip(listed(cases), cases)]
        about = dict(concept=subject.concept, model=models.portable_name(subject.model))
        write_json(args.export_cases, about | dict(call=subject.call, cases=rows))
        print(f"wrote {args.export_cases}: {len(rows)} pictures to draw")
        return

    # all that can be wrong with any of the folders is found before a picture is drawn
    asked = []
    homes = set()
    for paths in [args.compare] if args.compare else [[path] for path in args.erased]:
        subject = read_subject(paths, *given)
        words = read_words(subject)
        cases, minors = make_cases(words, **wanted)
        out_dir = home_of(paths, args.out_dir)
        if out_dir.resolve() in homes:
            found = f"{paths[0]} and another one would both go to {out_dir}"
            raise UserError(f"--out_dir: {found}; evaluate them one by one, or --compare")
        homes.add(out_dir.resolve())
        asked.append((paths, subject, words, cases, minors, out_dir))
    nudenet = NudeNet(args.nudenet_v2) if args.nudenet or args.nudenet_v2 else None
    how = dict(args=args, dtype=dtype, nudenet=nudenet)
    evaluations = [prepare(*what, **how) for what in asked]
    forms = [column.form for evaluation in evaluations for column in evaluation.columns[1:]]
    loras.check_scale(args.lora_scale, forms)

    workers.wait_for_everyone()  # all have looked
    results = {}
    for evaluation in evaluations:
        name = evaluation.columns[1].name
        results[name] = measure(evaluation, args.device)
    if not workers.is_main_process:
        return
    if len(results) > 1:
        print(report.layout(report.summary(results)))
    short = {name: report.headline(columns) for name, columns in results.items()}
    print(json.dumps(short if len(short) > 1 else next(iter(short.values()))), flush=True)


def main(argv=None) -> int:
    return exit_code("evaluate.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
