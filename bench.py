"""What erasing costs, by costs.py. Prints tables; the last line is one JSON object.

    python bench.py --out bench/tiny_cpu.json              # tiny/flux on a CPU, in minutes
    python bench.py --full --out bench/h100.json           # FLUX.1-schnell's size with random
                                                           # weights, on a GPU; again: goes on
    python bench.py --fold --out bench/fold.json           # folding and saving at that size, on
                                                           # any CPU with 45 GiB of disk
    python bench.py --quantized --out bench/quantized.json # gate gradients with few-bit weights
    python bench.py --plans --out bench/plans.json         # real models by their configurations
    python bench.py --table bench/*.json                   # such files as Markdown

forward_equivalents: seconds of an optimiser step's forward and backward over those of its forward
alone, gated and without gradients, on the same pictures just before; the median of such ratios.
"""

import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import models  # first: it keeps transformers quiet

# isort: split
import diffusers
import torch

import artefacts
import erase
import fullsize
import lowmem
import opened
import pictures
import promptfiles
import realmodels
from costs import (
    PASSES,
    PROMPT,
    clock,
    growth,
    markdown,
    measure,
    show,
)
from safely import Parser, UserError, check_regular, exit_code, number


def read_results(file: Path, flag: str) -> dict:
    """A file that this script wrote. Raises UserError."""
    check_regular(file, flag)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results["hardware"], results["versions"]["torch"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{flag}: {file} is no results file of bench.py") from None
    return results


def table(file: Path) -> str:
    """One results file as Markdown."""
    results = read_results(file, "--table")
    title = f"`{file}`: {results['hardware']}, torch {results['versions']['torch']}"
    parts = ("forms", "growth", "full", "loops", "fold", "quantized", "plans")
    tables = [markdown(results[part]) for part in parts if results.get(part)]
    return "\n\n".join([title, *tables]) + "\n"


# --------------------------------------------------------------------------------------- tiny/flux
def bench_tiny(repeats: int) -> dict:
    """The five forms side by side, growth with steps and pictures, loops of the other scripts."""
    pipe = models.load_pipeline(models.TINY, "cpu")
    out = dict(loops=show("evaluation and attacks", bench_loops(pipe)))
    erase.remember_prompts(pipe)
    call = models.CALLS["tiny/flux"]
    rows = [measure(pipe, form, 8, call, repeats=repeats) for form in PASSES]
    out["forms"] = show("one optimiser step, 8 pictures, 4 sampling steps", rows)
    rows = [growth(pipe, form, 8, call) for form in ("step", "both")]
    out["growth"] = show("bytes alive: a sampling step leaves its latents, nothing else", rows)
    rows = []
    for form, steps in itertools.product(("step", "block", "none"), (1, 4, 8, 16, 28)):
        rows.append(measure(pipe, form, 4, call | dict(num_inference_steps=steps), repeats=3))
    out["steps"] = show("growth with sampling steps, 4 pictures", rows)
    rows = [measure(pipe, "step", batch, call, repeats=3) for batch in (1, 2, 4, 8, 16)]
    out["batches"] = show("growth with pictures, 4 sampling steps", rows)
    return out


def bench_loops(pipe, count: int = 32, texts: int = 64) -> list[dict]:
    """Pictures a second of evaluate.py, texts encoded a second in the searches of attacks.py."""
    call = models.CALLS["tiny/flux"]
    model = opened.Model(pipe, {}, call)
    vectors = model.rows("t5", [random.choices(range(1000), k=8) for _ in range(texts)])

    def draw():
        pictures.draw(pipe, [PROMPT] * count, range(count), batch=32, **call)

    @torch.no_grad()
    def encode():
        model.embed("t5", vectors)

    drawing, encoding = map(statistics.median, clock(3, draw, encode))
    return [
        dict(loop="evaluate.py, pictures drawn", per_second=round(count / drawing, 1)),
        dict(loop="attacks.py, T5 texts", per_second=round(texts / encoding, 1)),
    ]


def gate_gradients(pipe, cases, seeds, call: dict, batch: int = 16) -> torch.Tensor:
    """(N, G) gradient of each case's error in gates that are all open."""
    sites = erase.gate_sites(pipe.transformer)
    total = sum(site.units for site in sites.values())
    gates = torch.ones(len(cases), total, requires_grad=True)  # a row a picture
    for start in range(0, len(cases), batch):
        part = slice(start, start + batch)
        rows = erase.split(gates[part], sites)
        weights = torch.ones(len(cases[part]))
        erase.case_errors(pipe, cases[part], seeds[part], rows, weights, call=call)
    return gates.grad


def bench_quantized(count: int = 64) -> dict:
    """Cosine of erase_loss's gradient in the gates, at the start of training, with other frozen
    weights to that with the stored fp32 ones: of the sum over all pictures, and of each picture by
    itself, the median. Base outputs are each model's own, as in training."""
    folder = models.prompt_folder(models.TINY)
    pairs = promptfiles.as_pairs(promptfiles.concept_pairs("gun", folder))
    rng = random.Random(0)
    cases = rng.choices(pairs, k=count)
    seeds = [erase.TRAIN_NOISE + rng.randrange(2**20) for _ in cases]
    gradients = {}
    for kind in ("none", "bf16", *lowmem.LIBRARIES):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        pipe = models.load_pipeline(models.TINY, "cpu", dtype)
        erase.remember_prompts(pipe)
        lowmem.quantize(pipe.transformer, kind, "cpu")
        gradients[kind] = gate_gradients(pipe, cases, seeds, models.CALLS["tiny/flux"])
    stored = gradients.pop("none")
    rows = []
    for kind, found in gradients.items():
        library = lowmem.LIBRARIES.get(kind)
        each = torch.cosine_similarity(stored, found, 1)
        of_sum = torch.cosine_similarity(stored.sum(0), found.sum(0), 0)
        row = dict(weights=kind, library=f"{library} {version(library)}" if library else "-")
        row |= dict(pictures=count, cosine_of_sum=round(of_sum.item(), 4))
        rows.append(row | dict(median_cosine=round(statistics.median(each.tolist()), 4)))
    return dict(quantized=show("gate gradients with other frozen weights, tiny/flux", rows))


# -------------------------------------------------------------------------------------------- main
def where_it_ran(full: bool) -> dict:
    """What a results file says of its hardware and libraries."""
    hardware = torch.cuda.get_device_name() if full else platform.processor() or "CPU"
    info = Path("/proc/cpuinfo")
    if not full and info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        hardware = names[0].split(":")[1].strip() if names else hardware
    if not full:
        hardware += f", {torch.get_num_threads()} threads"
    versions = {module.__name__: module.__version__ for module in (torch, diffusers)}
    return dict(hardware=hardware, versions=versions)


def parse_args(argv=None):
    parser = Parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    help = "FLUX.1-schnell's size with random weights; needs a GPU"
    what.add_argument("--full", action="store_true", help=help)
    help = "fold and save random weights of that size: seconds and peak memory"
    what.add_argument("--fold", action="store_true", help=help)
    help = "gate gradients with quantised frozen weights, beside the stored ones'"
    what.add_argument("--quantized", action="store_true", help=help)
    help = "gates, memory and operations of README's models, from their configurations"
    what.add_argument("--plans", action="store_true", help=help)
    help = "print tables from such files, and measure nothing"
    what.add_argument("--table", nargs="+", type=Path, default=[], metavar="FILE", help=help)
    add = parser.add_argument
    of_full = "of --full (%(default)s)"
    add("--forms", nargs="+", choices=PASSES, default=list(PASSES)[:-1], help=of_full)
    kinds = ["none", *lowmem.LIBRARIES]
    add("--quantize", nargs="+", choices=kinds, default=kinds, help=of_full)
    add("--compile", action="store_true", help="of --full, as erase.py --compile")
    pixels = number(int, 16, 8192, 16)
    help = "of --full, pixels a side (%(default)s)"
    add("--sizes", nargs="+", type=pixels, default=[512, 1024], help=help)
    help = "of --full, pictures at a time (%(default)s)"
    add("--micro_batch", type=number(int, 1), default=1, help=help)
    help = "of --full, GiB that may be allocated, as on a smaller card (all)"
    add("--cap_gib", type=number(float, 0), default=0, help=help)
    help = "of --full, seconds after which no new mode begins; run again to go on (%(default)s)"
    add("--limit", type=number(float, 0), default=480, help=help)
    help = "timed runs of each form, the median counts (%(default)s)"
    add("--repeats", type=number(int, 1), default=5, help=help)
    add("--out", type=Path, help="write the results here too, e.g. bench/h100.json")
    return parser.parse_args(argv)


def run(args) -> None:
    if args.out:
        check_regular(args.out, "--out")
        artefacts.check_writable(args.out.parent, "--out")
    if args.full and not torch.cuda.is_available():
        raise UserError("--full: needs a CUDA GPU, none is here")
    if args.compile and not args.full:
        raise UserError("--compile: goes with --full")
    for kind in args.quantize if args.full or args.quantized else ():
        flags = dict(checkpoint="auto", offload=False, compile=args.compile)
        lowmem.check_combination(quantize=kind, **flags)
    if args.table:
        print("\n".join(table(file) for file in args.table))
        return
    before = read_results(args.out, "--out") if args.out and args.out.exists() else {}
    asked = [part for part in ("full", "fold", "quantized", "plans") if vars(args)[part]]
    part = asked[0] if asked else "forms"
    if before and part not in before:
        raise UserError(f"--out: {args.out} holds other results, not {part}; choose another file")
    results = where_it_ran(args.full)
    if args.full:
        if args.cap_gib:
            total = torch.cuda.get_device_properties(0).total_memory
            if args.cap_gib * 2**30 > total:
                raise UserError(f"--cap_gib: the card has {total / 2**30:.1f}")
            torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / total)
        common = dict(compile=args.compile, micro_batch=args.micro_batch, cap_gib=args.cap_gib)
        modes = [
            dict(quantize=kind, size=size, form=form, **common)
            for kind, size, form in itertools.product(args.quantize, args.sizes, args.forms)
        ]
        rows = before.get("full", []) if results.items() <= before.items() else []
        limits = dict(repeats=args.repeats, limit=args.limit)
        results |= fullsize.bench_full(rows, modes, device="cuda", **limits)
    elif args.fold:
        results |= fullsize.bench_fold()
    elif args.quantized:
        results |= bench_quantized()
    elif args.plans:
        with tempfile.TemporaryDirectory() as folder:
            rows = realmodels.plans(Path(folder))
        results |= dict(plans=show("real models, by their configurations alone", rows))
    else:
        results |= bench_tiny(args.repeats)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        artefacts.write_json(args.out, results)
    print(json.dumps(results))


def main(argv=None) -> int:
    return exit_code("bench.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
