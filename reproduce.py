"""The tables of RESULTS.md, each by one command, from runs that it starts, keeps under results/ and
goes on with after a kill.

    python reproduce.py topics --concepts gun        # ours, its presets, other methods, the oracle
    python reproduce.py topics --model black-forest-labs/FLUX.1-schnell --concepts gun

A row is a variant of one concept over its seeds, mean (least-most). A run is made by erase.py or
baselines.py, scored by evaluate.py in one folder a concept, and for `attacks` attacked too.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import artefacts
import models
import promptfiles
import tables
from columns import slug
from safely import Parser, UserError, exit_code, number, visible, write_text
from tables import MADE_BY, MINUTES, TABLES, Run, planned

KIT = tables.hash_of_code()
TURNS = defaultdict(threading.Lock)  # by folder: commands write to it one after the other


def is_done(run: Run, line: list[str]) -> bool:
    """Whether what the command makes is there. Raises UserError for attacks on other prompts."""
    noted = artefacts.read_json(run.beside(".json")).get(line[0], {})
    if line[0] == "evaluate.py":
        scored = artefacts.read_json(run.home / "eval/results.json").get("results", {})
        return bool(noted) and str(run.folder) in scored
    if line[0] == "attacks.py":
        if noted.get("command", line) != line:
            found = f"{run.beside('.attacks')} is of: python {shlex.join(noted['command'])}"
            raise UserError(f"--num_prompts: {found}")
        return bool(noted) and (run.beside(".attacks") / "results.json").is_file()
    is_finished = (run.folder / "mask.safetensors").is_file()
    return is_finished or "seconds" in artefacts.read_config(run.folder)


def commands(table: str, run: Run, args) -> list[list[str]]:
    """What it takes, in order, without what is done."""
    about = ["--model", args.model, "--concept", *run.concepts]
    lines = []
    if run.make and not is_done(run, run.make):
        is_begun = run.folder.is_dir() and bool(visible(run.folder))
        for flag, maker in MADE_BY.items():
            if flag in run.make:
                file = run.make[run.make.index(flag) + 1]
                lines += [] if Path(file).is_file() else [["evaluate.py", maker, file, *about]]
        lines.append(run.make + ["--resume"] * is_begun)
    place = ["--out_dir", str(run.home / "eval")]
    wanted = [["evaluate.py", "--compare", str(run.folder), *place, *about]]
    if table == "attacks" and not (run.folder / "cases.json").is_file():  # weights
        place = [str(run.folder), "--out_dir", str(run.beside(".attacks"))]
        place += [] if run.make else ["--oracle", str(run.folder)]  # with targets of its own text
        wanted.append(["attacks.py", *place, *about, "--num_prompts", str(args.num_prompts)])
    if lines:  # a new model: what was measured of one before it is worth nothing
        return lines + wanted
    return [line for line in wanted if not is_done(run, line)]


def waited(process) -> tuple[int, float | None]:
    """(its exit status, its peak memory in GiB, where the system tells it)."""
    if not hasattr(os, "wait4"):  # Windows
        return process.wait(), None
    _, status, used = os.wait4(process.pid, 0)
    return status, round(used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 2)


def start(run: Run, line: list[str]) -> bool:
    """Runs a command to its end and notes what it took. False where it fails."""
    run.home.mkdir(parents=True, exist_ok=True)
    if line == run.make:
        for old in (run.home / "eval" / slug(str(run.folder)), run.beside(".attacks")):
            shutil.rmtree(old, ignore_errors=True)
        artefacts.write_json(run.beside(".json"), {})  # what was noted of the old one
    print(f"{time.strftime('%H:%M')} python {shlex.join(line)}\n", end="", flush=True)  # at once
    began = time.time()
    with open(run.beside(".log"), "a") as log:
        process = subprocess.Popen([sys.executable, *line], stdout=log, stderr=log)
        status, gib = waited(process)
    if status:
        print(f"      failed, see {log.name}", flush=True)
        return False
    if line[1] not in MADE_BY.values():
        took = dict(command=[word for word in line if word != "--resume"], gib=gib, kit=KIT)
        took |= {} if "--resume" in line else dict(seconds=round(time.time() - began))
        done = artefacts.read_json(run.beside(".json"))
        artefacts.write_json(run.beside(".json"), done | {line[0]: took})
    return True


def finish(run: Run, table: str, args) -> bool:
    """All that is missing of a run. False where a command fails."""
    for line in commands(table, run, args):
        with TURNS[run.home if line[0] == "evaluate.py" else run.folder]:
            is_there = line[1] in MADE_BY.values() and Path(line[2]).is_file()
            if not (is_there or start(run, line)):
                return False
    return True


def failures(runs: list[Run], table: str, args) -> int:
    """Finishes the runs, --jobs at once; how many could not be."""
    pool = ThreadPoolExecutor(args.jobs)
    try:
        return list(pool.map(lambda run: finish(run, table, args), runs)).count(False)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C starts no more


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=" ".join(TABLES))
    add("--list", action="store_true", help="what is there and what is missing; starts nothing")
    add("--model", default="tiny/flux", help="as in erase.py (%(default)s)")
    add("--concepts", nargs="+", help="(those of the table, see tables.py)")
    add("--seeds", nargs="+", type=number(int, 0), default=[0, 1, 2], help="(0 1 2)")
    add("--num_prompts", type=number(int, 1), default=20, help="that are attacked (%(default)s)")
    cores = os.cpu_count() if models.default_device() == "cpu" else 1
    add("--jobs", type=number(int, 1), default=cores, help="runs at once (%(default)s)")
    add("--out", type=Path, default=Path("results"), help="(results/<model>)")
    args = parser.parse_args(argv)
    wrong = [table for table in args.tables if table not in TABLES]
    if wrong or not (args.tables or args.list):
        what = f"no table {wrong[0]!r}" if wrong else "which?"
        raise UserError(f"TABLE: {what}; there are {', '.join(TABLES)}")
    args.model = models.portable_name(args.model)
    is_small = models.is_embedded(args.model)
    if "many" in args.tables and not is_small:
        raise UserError(f"TABLE: many is of concepts of the embedded models, not of {args.model}")
    if "many" in args.tables and args.concepts:
        raise UserError("--concepts: the table many has its own, see tables.py")
    args.tables = args.tables or [table for table in TABLES if table != "many" or is_small]
    args.out = args.out / slug(args.model).removeprefix("tiny_")
    return args


def run(args) -> None:
    if not args.list:
        models.inspect_model(args.model)
    known = promptfiles.known_words(models.prompt_folder(args.model))
    for name in args.concepts or ():
        if promptfiles.bare(name).lower() not in known:
            raise UserError(f"--concepts: {name!r} is not in the vocabulary of {args.model}")
    failed = 0
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # a second thread gains less than a second run
    for table in args.tables:
        rows = planned(table, args)
        runs = {run.folder: run for _, _, run in rows}.values()
        if args.list:
            missing = [line[0] for run in runs for line in commands(table, run, args)]
            hours = sum(MINUTES[script] for script in missing) / 60 / args.jobs
            print(f"{table:8} {len(runs)} runs; {len(missing)} commands missing, {hours:.1f} hours")
            continue
        composed = [run for run in runs if "--compose" in run.make]  # of other runs
        failed += failures([run for run in runs if run not in composed], table, args)
        failed += failures(composed, table, args)
        text = tables.table_of([(*row, tables.figures(run, table)) for *row, run in rows], table)
        scored = [run for run in runs if run.make and tables.figures(run, table)]
        kits = sorted({tables.made_with(run) for run in scored})
        if len(kits) > 1:
            text += f"\n\nMade with several versions of the code: {', '.join(kits)}"
        write_text(args.out / f"{table}.md", text + "\n")
        print(f"\n{text}\n\nwrote {args.out / table}.md", flush=True)
    if failed:
        raise UserError(f"{failed} runs failed; the same command goes on with them")


if __name__ == "__main__":
    sys.exit(exit_code("reproduce.py", lambda: run(parse_args())))
