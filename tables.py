"""What the tables of RESULTS.md are made of, and their form: reproduce.py carries them out."""

import hashlib
import statistics
from pathlib import Path
from typing import NamedTuple

import artefacts
import models
from costs import markdown

TOPICS = dict(tiny=("gun", "vampire", "sketch"), real=("gun", "Superman", "Van Gogh"))
MANY = ("gun", "vampire", "sketch", "knife", "bomb", "zombie", "pill", "cigarette", "superhero")
MANY += ("mermaid", "mosaic", "neon")
EVERY = (*MANY, "sepia")
ORACLE = "oracle"  # a model that never saw the concept, where tiny/train.py --without made one
# {variant: flags of erase.py, of baselines.py, or ORACLE}; the same flags are the same run.
OURS = {"ours": "", "ours, no mask": "--max_closed 0 --steps 1"}
OURS |= {"ours, mask alone": "--heal 0 --max_closed 0.05"}
PAPER = {"preset paper": "--preset paper --steps 100"}
SEEDLESS = ("uce", "uce_context", "sld", "negative", "flowedit")  # the same whatever --seed
OFFICIAL = ("uce", "uce_context", "esd", "ca", "eap", "eraseanything", "gem")
BASELINES = {name: f"--method {name}" for name in OFFICIAL}
# with the settings that suit the small models: RESULTS.md, "Baselines: settings"
BEST = {
    "uce, tuned": "--method uce --retain 1",
    "esd, tuned": "--method esd --steps 300 --batch_size 8 --retain 10 --anchor neutral",
    "ca, tuned": "--method ca --steps 300 --lr 5e-4 --retain 3",
    "eap, tuned": "--method eap --steps 300 --batch_size 4 --lr 1e-4 --retain 10 --anchor neutral",
    "eraseanything, tuned": "--method eraseanything --batch_size 8 --retain 3 --lr 3e-3 "
    "--anchor neutral --eta 0",
    "gem, tuned": "--method gem --batch_size 8 --retain 10000 --steps 80",
}
# Files that a run takes, and evaluate.py's flag that makes them.
MADE_BY = {"--cases": "--export_cases", "--prompts": "--filter"}
PICTURES = {
    "sld": "--method sld --cases {home}/cases.json",
    "negative": "--method negative --cases {home}/cases.json",
    "flowedit": "--method flowedit --steps 8 --cases {home}/cases.json",
}
# Several concepts at once: ours, the best closed form and the best trained one of the table topics.
AT_ONCE = {"one run": "", "uce_context": BASELINES["uce_context"], "esd, tuned": BEST["esd, tuned"]}
TABLES = dict(
    concepts={"ours": ""},
    topics=OURS | PAPER | BEST | BASELINES | PICTURES | {"oracle": ORACLE},
    attacks=OURS | {"uce_context": BASELINES["uce_context"]} | BEST | {"oracle": ORACLE},
    beta={"beta 3": ""} | {f"beta {b}": f"--beta {b}" for b in (0.3, 1, 10)},
    steps={"200 steps": ""} | {f"{n} steps": f"--steps {n}" for n in (50, 100, 400)},
    filter={"all pairs": "", "the paper's filter": "--prompts {home}/filtered.csv"},
    prompts={"all pairs": ""} | {f"{n} pairs": f"--num_prompts {n}" for n in (1, 8, 16, 20)},
    modules={"ffn norm": ""} | {m: f"--modules {m}" for m in ("ffn", "norm", "kv", "heads", "mlp")},
    gates={"1 %": ""} | {f"{n} %": f"--max_closed {n / 100}" for n in (0.2, 0.5, 2, 5)},
    many={},  # many()
)
COLUMNS = ("acc", "synonyms", "residue, median", "residue, 95th percentile", "others, of base")
COLUMNS += (
    "worst neighbour, of base",
    "ssim",
    "fid to base",
    "harmonic mean",
    "closed",
    "seconds",
    "gib",
)
ATTACKS = ("union", "plain", "seeds", "synonyms", "split", "knobs", "ring_a_bell", "mma", "p4d")
ATTACKS += ("unlearn_diff",)
MINUTES = {"erase.py": 5, "baselines.py": 3, "evaluate.py": 2, "attacks.py": 10}  # of one core


def spread(values: list) -> str:
    """Mean and, where there is one, range."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean, least, most = (f"{f(values):.3g}" for f in (statistics.mean, min, max))
    return mean if least == most else f"{mean} ({least}-{most})"


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
        name = Path(args.model).name
        return Run(home, models.HERE / f"tiny/work_without_{short}/model/{name}", [], concepts)
    words = flags.partition("{home}")[0].replace("--", "").split()
    name = "_".join(words).removeprefix("method_") or "ours"
    script = "baselines.py" if words[:1] == ["method"] else "erase.py"
    if script == "erase.py" and not models.is_embedded(args.model) and "preset" not in words:
        flags = f"--preset tiny {flags}"  # the default there is paper
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
        for concept in args.concepts or concepts_of(table, models.is_embedded(args.model)):
            for variant, flags in TABLES[table].items():
                found.append((variant, concept, make_run(flags, (concept,), seed, args)))
    rows = {(row[0], row[-1].folder): row for row in found}  # what has no seed is there once
    return [row for row in rows.values() if row[-1].make or row[-1].folder.is_dir()]


def hash_of_code() -> str:
    """Of the kit's scripts, short: what a run is noted with."""
    code = b"".join(file.read_bytes() for file in sorted(models.HERE.glob("*.py")))
    return hashlib.sha256(code).hexdigest()[:8]


def made_with(run: Run) -> str:
    """The hash_of_code() of a run, as far as it is known."""
    return artefacts.read_json(run.beside(".json")).get(run.make[0], {}).get("kit", "unknown")


def attacked(run: Run) -> dict:
    """{attack: its ASR@k on a run}, their union too; {} until it is attacked."""
    results = artefacts.read_json(run.beside(".attacks") / "results.json")
    found = {}
    name = "erased" if run.make else "oracle"
    if results:
        found["union"] = results["union_text_asr"].get(name, {}).get("rate")
    for attack, by_model in results.get("attacks", {}).items():
        found[attack] = by_model[name] and by_model[name]["asr_k"]["rate"]
    return found


def figures(run: Run, table: str) -> dict:
    """{column: number} of a run; {} until it is scored."""
    if table == "attacks":
        return attacked(run)
    results = artefacts.read_json(run.home / "eval/results.json").get("results", {})
    found = results.get(str(run.folder), {}).items()
    found = {key: x.get("rate") if isinstance(x, dict) else x for key, x in found}
    took = artefacts.read_json(run.beside(".json"))
    return found | took.get(run.make[0], {}) if found and run.make else found


def concepts_of(table: str, is_small: bool) -> tuple:
    """Those that a table is of unless --concepts says."""
    if table == "concepts" and is_small:
        return EVERY
    return TOPICS["tiny" if is_small else "real"]


def table_of(found: list[tuple], table: str) -> str:
    """Markdown of [(variant, concept, figures)]: a row a concept and variant, over its runs."""
    columns = ATTACKS if table == "attacks" else COLUMNS
    groups = {}
    for variant, concept, figures in found:
        if variant and figures:
            groups.setdefault((concept, variant), []).append(figures)
    rows = []
    for (concept, variant), runs in groups.items():
        cells = {column: spread([run.get(column) for run in runs]) for column in columns}
        rows.append(dict(concept=concept, variant=variant, runs=len(runs)) | cells)
    return markdown(rows) if rows else "no run is scored"
