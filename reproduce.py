"""The tables of RESULTS.md, each by one command, from runs that it starts, keeps under results/ and
goes on with after a kill.

    python reproduce.py topics --concepts gun        # ours, its presets, other methods, the oracle
    python reproduce.py topics --model black-forest-labs/FLUX.1-schnell --concepts gun

A row is a variant of one concept over its seeds, mean (least-most). A run is made by erase.py or
baselines.py, scored by evaluate.py in one folder a concept, and for `attacks` attacked too.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import artefacts
import models
import promptfiles
import tables
from safely import Parser, UserError, exit_code, number, write_text
from tables import AT_ONCE, MADE_BY, MANY, MINUTES, ORACLE, SEEDLESS, TABLES

TURNS = defaultdict(threading.Lock)  # by folder: commands write to it one after the other


class Run(NamedTuple):
    """One erased model."""

    home: Path  # of all runs for its concepts, with eval/
    folder: Path
    make: list[str]  # the command that makes it
    concepts: tuple[str, ...]

    def beside(self, suffix: str) -> Path:
        return self.home / f"{self.folder.name}{suffix}"


def make_run(flags: str, concepts: tuple, seed: int, args) -> Run:
    short = "_".join(concepts) if len(concepts) < 4 else f"{len(concepts)}_concepts"
    home = args.out / short.replace(" ", "_")
    if flags == ORACLE:
        return Run(home, models.HERE / f"tiny/work_without_{short}/model/flux", [], concepts)
    words = flags.partition("{home}")[0].replace("--", "").split()
    name = "_".join(words).removeprefix("method_") or "ours"
    script = "baselines.py" if words[:1] == ["method"] else "erase.py"
    seed = 0 if script == "baselines.py" and words[1] in SEEDLESS else seed
    line = [script, "--concept", *concepts, *[word.format(home=home) for word in flags.split()]]
    line += ["--seed", str(seed), "--model", args.model, "--out_dir", str(home / f"{name}_{seed}")]
    return Run(home, home / f"{name}_{seed}", line, concepts)


def many(seed: int, args) -> list[tuple]:
    """1, 3, 6 and 12 concepts: in one run of each method, and composed of folders of one each."""
    found = []
    for count in (1, 3, 6, 12):
        concepts = MANY[:count]
        for variant, flags in AT_ONCE.items():
            found.append((f"{count}, {variant}", MANY[0], make_run(flags, concepts, seed, args)))
        if count > 1:
            parts = [make_run("", (name,), seed, args) for name in concepts]
            found += [(None, MANY[0], part) for part in parts]
            whole = make_run("", concepts, seed, args)
            folder = whole.home / f"composed_{seed}"
            line = ["erase.py", "--out_dir", str(folder), "--compose"]
            line += [str(part.folder) for part in parts]
            found.append((f"{count}, composed", MANY[0], whole._replace(folder=folder, make=line)))
    return found


def planned(table: str, args) -> list[tuple]:
    """[(variant, or None for what another one is made of, concept, Run)]."""
    found = []
    for seed in args.seeds:
        found += many(seed, args) if table == "many" else []
        for concept in args.concepts or tables.concepts_of(table, models.is_embedded(args.model)):
            for variant, flags in TABLES[table].items():
                found.append((variant, concept, make_run(flags, (concept,), seed, args)))
    rows = {(row[0], row[-1].folder): row for row in found}  # what has no seed is there once
    return [row for row in rows.values() if row[-1].make or row[-1].folder.is_dir()]


def commands(table: str, run: Run, args) -> list[list[str]]:
    """What it takes, in order, without what is done."""
    about = ["--model", args.model, "--concept", *run.concepts]
    lines = []
    by_erase = (run.folder / "mask.safetensors").is_file()
    if run.make and not by_erase and "seconds" not in artefacts.read_config(run.folder):
        is_begun = run.folder.is_dir() and any(run.folder.iterdir())
        for flag, maker in MADE_BY.items():
            if flag in run.make:
                file = run.make[run.make.index(flag) + 1]
                lines += [] if Path(file).is_file() else [["evaluate.py", maker, file, *about]]
        lines.append(run.make + ["--resume"] * is_begun)
    place = ["--out_dir", str(run.home / "eval")]
    lines.append(["evaluate.py", "--compare", str(run.folder), *place, *about])
    if table == "attacks" and not (run.folder / "cases.json").is_file():  # weights
        place = [str(run.folder), "--out_dir", str(run.beside(".attacks"))]
        lines.append(["attacks.py", *place, *about, "--num_prompts", str(args.num_prompts)])
    done = artefacts.read_json(run.beside(".json"))
    return [line for line in lines if line[0] not in done or line[1] in MADE_BY.values()]


def start(run: Run, line: list[str]) -> bool:
    """Runs a command to its end and notes what it took. False where it fails."""
    run.home.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M')} python {shlex.join(line)}\n", end="", flush=True)  # at once
    began = time.time()
    with open(run.beside(".log"), "a") as log:
        process = subprocess.Popen([sys.executable, *line], stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        print(f"      failed, see {log.name}", flush=True)
        return False
    if line[1] not in MADE_BY.values():
        took = dict(seconds=round(time.time() - began), gib=round(used.ru_maxrss / 2**20, 2))
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
    models.inspect_model(args.model)
    known = promptfiles.known_words(models.prompt_folder(args.model))
    for name in args.concepts or ():
        if promptfiles.bare(name).lower() not in known:
            raise UserError(f"--concepts: {name!r} is not in the vocabulary of {args.model}")
    args.out = args.out / Path(args.model).name
    return args


def run(args) -> None:
    failed = 0
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # a second thread gains less than a second run
    for table in args.tables or TABLES:
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
        text = tables.table_of([(*row, tables.figures(run)) for *row, run in rows], table)
        write_text(args.out / f"{table}.md", text + "\n")
        print(f"\n{text}\n\nwrote {args.out / table}.md", flush=True)
    if failed:
        raise UserError(f"{failed} runs failed; the same command goes on with them")


if __name__ == "__main__":
    sys.exit(exit_code("reproduce.py", lambda: run(parse_args())))
