"""Times one optimiser step of erase.py, its memory, and how both grow; prints tables, the last line is one JSON object.

    python bench.py --out bench/tiny_cpu.json              # tiny/flux, on a CPU in about two minutes
    python bench.py --full --out bench/h100.json           # FLUX.1-schnell's true size, random weights, on a GPU; run it again to go on
    python bench.py --fold --out bench/fold.json           # folding and saving at that size, on any CPU with 45 GiB of disk
    python bench.py --quantized --out bench/quantized.json # gate gradients with 8 and 4 bit weights, tiny/flux on a CPU
    python bench.py --table bench/*.json                   # README's cost tables from such files

Forward-equivalents: seconds of the optimiser step for one sampling step, over those of one gated forward without gradients on the same pictures
timed just before; the median of such ratios. Five forms of the backward through the sampler, which give the same gradients (test_stepwise_backward_equals_autograd): none, step,
block, both of erase.py, and two: the official code's loop, written afresh, with one backward for the gates and one for the latents.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import weakref
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import attacks
import erase

SCHNELL = dict(
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=False,
)
MATMUL = 8192  # its bf16 product is the peak that --full compares with
PASSES = dict(
    none=2, step=3, block=3, both=4, two=4
)  # a forward each, and a backward counted as one


def two_backward(transformer, noise, text, sigmas, grid, gates: dict) -> None:
    """The step-wise loop with two backward passes a step: first the gates' gradients, then the latents'."""
    trajectory = erase.rollout(transformer, noise, text, sigmas, grid)
    gradient = 2 * trajectory[-1].float() / trajectory[-1].numel()
    for i in reversed(range(len(sigmas) - 1)):
        x = trajectory[i].detach().requires_grad_()
        with torch.enable_grad():
            x_next = erase.euler(transformer, x, sigmas[i], sigmas[i + 1], text, grid)
        for g, grad in zip(
            gates.values(),
            torch.autograd.grad(
                x_next, list(gates.values()), gradient.to(x_next.dtype), retain_graph=True
            ),
        ):
            g.grad = grad if g.grad is None else g.grad + grad
        (gradient,) = torch.autograd.grad(x_next, x, gradient.to(x_next.dtype))


class Allocated(TorchDispatchMode):
    """The most bytes alive at once of the tensors made inside the `with`, temporaries included: what max_memory_allocated is on a GPU."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storages = lambda tree: [
            t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)
        ]
        self.known.update(storages(args))  # views and what was there before are not new
        for storage in storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.now -= size


def clock(device: str, repeats: int, *works, limit: float = 1e9) -> list[list[float]]:
    """Seconds of each work, done in turns, without the warm-up turn; no new turn after `limit` seconds."""
    times, began, wait = (
        [[] for _ in works],
        time.perf_counter(),
        torch.cuda.synchronize if device == "cuda" else lambda: None,
    )
    for turn in range(repeats + 1):
        for work, seconds in zip(works, times):
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - start)
        if turn and time.perf_counter() - began > limit:
            break
    return [seconds[1:] for seconds in times]


def measure(form, transformer, case, steps: int, repeats: int, limit: float = 1e9) -> dict:
    """{seconds, forward_equivalents, mib} of one optimiser step's forward and backward over the case's pictures, in one of the five forms."""
    noise, text, grid = case
    device, sigmas = noise.device.type, [1 - i / steps for i in range(steps + 1)]
    gates = {
        site: torch.ones(units, device=device, requires_grad=True)
        for site, units in erase.gate_sites(transformer).items()
    }

    def forward():
        with erase.gated(transformer, gates):
            erase.rollout(transformer, noise, text, sigmas[:2], grid)

    def work():
        for g in gates.values():
            g.grad = None
        with erase.gated(transformer, gates):
            if form == "two":
                two_backward(transformer, noise, text, sigmas, grid, gates)
            else:
                erase.rollout_backward(
                    transformer,
                    noise,
                    text,
                    sigmas,
                    grid,
                    lambda x: x.float().square().mean(),
                    form,
                )

    singles, seconds = clock(device, repeats, forward, work, limit=limit)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        peak = torch.cuda.max_memory_allocated()  # weights included
    else:
        with Allocated() as memory:
            work()
        peak = memory.peak
    return dict(
        form=form,
        sampling_steps=steps,
        batch=len(noise),
        seconds=round(statistics.median(seconds), 4),
        forward_equivalents=round(
            statistics.median(s / steps / f for f, s in zip(singles, seconds)), 2
        ),
        mib=round(peak / 2**20, 1),
    )


def make_case(transformer, batch: int, height: int, width: int, tokens: int):
    """Random noise (B, T, C), text and grid of a model's sizes."""
    config, like = transformer.config, dict(device=transformer.device, dtype=transformer.dtype)
    grid = (height // 16, width // 16)
    text = (
        torch.randn(batch, tokens, config.joint_attention_dim, **like),
        torch.randn(batch, config.pooled_projection_dim, **like),
    )
    return torch.randn(batch, grid[0] * grid[1], config.in_channels, **like), text, grid


def markdown(rows: list[dict]) -> str:
    return "\n".join(
        ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    )


def show(title: str, rows: list[dict]) -> list[dict]:
    print(f"\n{title}\n{markdown(rows)}", flush=True)
    return rows


def bench_tiny(args) -> dict:
    """The five forms side by side, growth with steps and pictures, and the loops of evaluate.py and attacks.py, on tiny/flux."""
    pipe = erase.load_pipeline(erase.TINY, "cpu")
    transformer, case = (
        pipe.transformer,
        lambda batch: make_case(pipe.transformer, batch, 64, 64, 24),
    )
    out = dict(
        forms=show(
            "one optimiser step, 8 pictures, 4 sampling steps",
            [measure(f, transformer, case(8), 4, args.repeats) for f in PASSES],
        )
    )
    out["steps"] = show(
        "growth with sampling steps, 4 pictures",
        [
            measure(f, transformer, case(4), n, 3)
            for f in ("step", "block", "none")
            for n in (1, 4, 8, 16, 28)
        ],
    )
    out["batches"] = show(
        "growth with pictures, 4 sampling steps",
        [measure("step", transformer, case(n), 4, 3) for n in (1, 2, 4, 8, 16)],
    )
    return out | dict(loops=show("evaluation and attacks", bench_loops(pipe)))


def bench_loops(pipe, pictures: int = 32, texts: int = 64) -> list[dict]:
    """Pictures a second of evaluate.py, and encoded candidates a second of attacks.py's searches."""
    size = argparse.Namespace(
        height=64, width=64, num_inference_steps=4, max_sequence_length=24, seed=0
    )
    model = attacks.Model(pipe, {}, size)
    rows = model.tables["t5"][torch.randint(len(model.tables["t5"]), (texts, attacks.TOKENS))]
    drawing = lambda: erase.draw(
        pipe, ["a gun on a red background"] * pictures, list(range(pictures)), size, batch=32
    )
    with torch.no_grad():
        drawing, encoding = map(
            statistics.median, clock("cpu", 3, drawing, lambda: model.embed("t5", rows))
        )
    return [
        dict(loop="evaluate.py, pictures drawn", per_second=round(pictures / drawing, 1)),
        dict(loop="attacks.py, T5 texts", per_second=round(texts / encoding, 1)),
    ]


def forward_flops(size: int) -> int:
    """Floating-point operations of one forward for one picture at FLUX.1-schnell's size, counted on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**SCHNELL)
    noise, text, grid = make_case(transformer, 1, size, size, 256)
    with FlopCounterMode(display=False) as counter:
        erase.rollout(transformer, noise, text, [1.0, 0.75], grid)
    return counter.get_total_flops()


def random_schnell(device: str) -> FluxTransformer2DModel:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = FluxTransformer2DModel(**SCHNELL).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return transformer


def bench_full(args, rows: list[dict], device: str = "cuda") -> dict:
    """One row a mode: FLUX.1-schnell's size, args.micro_batch pictures at a time, projected to steps of 4 concept and 4 retain prompts. Rows that
    are there already are kept; after args.limit seconds no new mode begins."""
    began, left, made = time.perf_counter(), [], None
    if args.cap_gib:
        torch.cuda.set_per_process_memory_fraction(
            args.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    a = torch.randn(MATMUL, MATMUL, device=device, dtype=torch.bfloat16)
    tflops = 2 * MATMUL**3 / statistics.median(clock(device, 10, lambda: a @ a)[0]) / 1e12
    for mode in [
        dict(
            quantize=q,
            compile=args.compile,
            size=s,
            form=f,
            micro_batch=args.micro_batch,
            cap_gib=args.cap_gib,
        )
        for q in args.quantize
        for s in args.sizes
        for f in args.forms
    ]:
        if any(mode.items() <= row.items() for row in rows):
            continue
        if time.perf_counter() - began > args.limit:
            left.append(mode)
            continue
        try:
            if made != mode["quantize"]:
                transformer, made = None, None
                torch.cuda.empty_cache()
                transformer = random_schnell(
                    device if mode["quantize"] == "none" else "cpu"
                )  # quantised on the way to the GPU, as by erase.py
                transformer = erase.quantized(transformer, mode["quantize"], device).to(device)
                if args.compile:
                    erase.compile_blocks(transformer)
                made = mode["quantize"]
            torch.cuda.empty_cache()
            row = measure(
                mode["form"],
                transformer,
                make_case(transformer, args.micro_batch, mode["size"], mode["size"], 256),
                4,
                args.repeats,
                args.limit - (time.perf_counter() - began),
            )
        except torch.cuda.OutOfMemoryError:
            rows.append(
                mode
                | dict.fromkeys(
                    ("sec_per_step", "share_of_peak", "peak_gib", "minutes_400_steps"),
                    "out of memory",
                )
            )
            continue
        step = row["seconds"] * 8 / args.micro_batch
        share = 8 * 4 * PASSES[mode["form"]] * forward_flops(mode["size"]) / step / (tflops * 1e12)
        rows.append(
            mode
            | dict(
                sec_per_step=round(step, 2),
                share_of_peak=round(share, 3),
                peak_gib=round(row["mib"] / 1024, 1),
                minutes_400_steps=round(400 * step / 60, 1),
            )
        )
    return dict(
        matmul_tflops=round(tflops, 1),
        full=show("FLUX.1-schnell's size, 4 sampling steps, 8 pictures a step", rows),
        not_measured=left,
    )


def anonymous_peak(work) -> int:
    """The most bytes of anonymous resident memory that work() adds to this process (Linux), sampled every millisecond; mapped files are not in it."""
    read = lambda: next(
        int(line.split()[1]) * 1024
        for line in open("/proc/self/status")
        if line.startswith("RssAnon")
    )
    samples, stop, start = [0], threading.Event(), read()

    def sample():
        while not stop.wait(0.001):
            samples.append(read() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        stop.set(), thread.join()
    return max(samples)


def write_random(state: dict, folder: Path, max_shard_size: str = "10GB") -> None:
    """A transformer folder of random bytes for a bf16 state dict on the meta device, in diffusers' shards, one tensor in memory at a time."""
    plan = split_torch_state_dict_into_shards(
        state,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        header, end = {}, 0
        for name in names:
            header[name] = dict(
                dtype="BF16",
                shape=list(state[name].shape),
                data_offsets=[end, end := end + state[name].nbytes],
            )
        header = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                f.write(os.urandom(state[name].nbytes))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename))
    )


def bench_fold(args) -> dict:
    """erase.save_folded on a transformer of FLUX.1-schnell's size with every 20th gate closed, in a temporary folder that goes whatever happens."""
    transformer, where = random_schnell("meta"), tempfile.gettempdir()
    size, free = sum(p.nbytes for p in transformer.parameters()), shutil.disk_usage(where).free
    if free < 2.02 * size:
        raise erase.UserError(
            f"--fold: {where} has {free / 2**30:.1f} GiB free, {2.02 * size / 2**30:.1f} needed; TMPDIR names another disk"
        )
    mask = {
        site: (torch.arange(units) % 20 > 0).float()
        for site, units in erase.gate_sites(transformer).items()
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an ordinary kill cleans up too
    with tempfile.TemporaryDirectory(prefix="bench_fold_") as folder:
        base, out = Path(folder) / "base/transformer", Path(folder) / "out"
        base.mkdir(parents=True)
        transformer.save_config(base)
        write_random(transformer.state_dict(), base)
        start = time.perf_counter()
        peak = anonymous_peak(lambda: erase.save_folded(str(base.parent), transformer, mask, out))
        row = dict(
            stored_gib=round(size / 2**30, 1),
            files=len(list(out.glob("*.safetensors"))),
            seconds=round(time.perf_counter() - start, 1),
            peak_mib_beside_mapped_files=round(peak / 2**20, 1),
        )
    return dict(fold=show("folding and saving FLUX.1-schnell's size, bf16", [row]))


def bench_quantized(args) -> dict:
    """Cosine of the erase_loss's gradient in the gates, at the start of training, with other frozen weights to that with the stored fp32 ones: of the sum over
    all pictures, and of each picture by itself, the median. Base outputs are each model's own, as in training."""
    args, rows, stored = erase.parse_args(["--concept", "gun", "--model", erase.TINY]), [], None
    for kind in ("none", "bf16", *erase.LIBRARIES):
        pipe, gradients = (
            erase.load_pipeline(erase.TINY, "cpu", torch.bfloat16 if kind == "bf16" else None),
            [],
        )
        cases = erase.Cases(pipe, erase.concept_pairs("gun", args), [], args)
        erase.quantized(pipe.transformer, kind, "cpu")
        for case in cases.sample(random.Random(0), 64, 0):
            gates = {
                site: torch.ones(units, requires_grad=True)
                for site, units in erase.gate_sites(pipe.transformer).items()
            }
            cases.errors(gates, [case], 1, backward=True)
            gradients.append(torch.cat([g.grad for g in gates.values()]))
        gradients = torch.stack([*gradients, sum(gradients)])  # (64 + 1, gates)
        stored = gradients if stored is None else stored
        *cosines, of_sum = torch.nn.functional.cosine_similarity(stored, gradients, 1).tolist()
        library = erase.LIBRARIES.get(kind)
        rows.append(
            dict(
                weights=kind,
                library=f"{library} {version(library)}" if library else "-",
                pictures=len(cosines),
                cosine_of_sum=round(of_sum, 4),
                median_cosine=round(statistics.median(cosines), 4),
            )
        )
    return dict(quantized=show("gate gradients with other frozen weights, tiny/flux", rows[1:]))


def table(file: Path) -> str:
    """README's cost tables of one results file, as Markdown."""
    results = json.loads(file.read_text())
    parts = [
        markdown(results[part])
        for part in ("forms", "full", "loops", "fold", "quantized")
        if results.get(part)
    ]
    return (
        "\n\n".join(
            [f"`{file}`: {results['hardware']}, torch {results['versions']['torch']}", *parts]
        )
        + "\n"
    )


def run(args) -> None:
    missing = [
        q
        for q in args.quantize
        if (args.full or args.quantized) and q != "none" and not erase.find_spec(erase.LIBRARIES[q])
    ]
    for wrong, line in (
        (min(args.repeats, args.micro_batch) < 1, "--repeats, --micro_batch: must be at least 1"),
        (any(s < 16 or s % 16 for s in args.sizes), "--sizes: must be multiples of 16"),
        (args.full and not torch.cuda.is_available(), "--full: needs a CUDA GPU, none is here"),
        (
            missing,
            f"--quantize: {' '.join(missing)} needs a library that is not here: pip install {' '.join(erase.LIBRARIES[q] for q in missing)}",
        ),
        (
            args.full and args.compile and "fp8" in args.quantize,
            "--compile: does not go with fp8; choose --quantize none nf4",
        ),
        (args.compile and not args.full, "--compile: goes with --full"),
        (
            not all(f.is_file() for f in args.table),
            f"--table: cannot read {' '.join(map(str, args.table))}",
        ),
    ):
        if wrong:
            raise erase.UserError(line)
    if args.table:
        return print("\n".join(map(table, args.table)))
    cpu = (
        next(
            (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line),
            "CPU",
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    about = dict(
        hardware=torch.cuda.get_device_name()
        if args.full
        else f"{cpu}, {torch.get_num_threads()} threads",
        versions={m.__name__: m.__version__ for m in (torch, diffusers)},
    )
    if args.full:
        before = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
        results = about | bench_full(
            args, before.get("full", []) if about.items() <= before.items() else []
        )
    else:
        results = about | (
            bench_fold if args.fold else bench_quantized if args.quantized else bench_tiny
        )(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        erase.write_atomically(
            args.out, lambda f: f.write_text(json.dumps(results, indent=1) + "\n")
        )
    print(json.dumps(results))


def main(argv=None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--full",
        action="store_true",
        help="FLUX.1-schnell's true size with random weights; needs a GPU",
    )
    what.add_argument(
        "--fold",
        action="store_true",
        help="fold and save random weights of that size: seconds and peak memory",
    )
    what.add_argument(
        "--quantized",
        action="store_true",
        help="gate gradients with quantised frozen weights, beside the stored ones'",
    )
    what.add_argument(
        "--table",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="print README's tables from such files, and measure nothing",
    )
    p.add_argument(
        "--forms",
        nargs="+",
        choices=PASSES,
        default=list(PASSES)[:-1],
        help="of --full (%(default)s)",
    )
    p.add_argument(
        "--quantize",
        nargs="+",
        choices=("none", *erase.LIBRARIES),
        default=["none", *erase.LIBRARIES],
        help="of --full (%(default)s)",
    )
    p.add_argument("--compile", action="store_true", help="of --full, as erase.py --compile")
    p.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[512, 1024],
        help="of --full, pixels a side (%(default)s)",
    )
    p.add_argument(
        "--micro_batch", type=int, default=1, help="of --full, pictures at a time (%(default)s)"
    )
    p.add_argument(
        "--cap_gib",
        type=float,
        default=0,
        help="of --full, GiB that may be allocated, as on a smaller card; more is out of memory (all)",
    )
    p.add_argument(
        "--limit",
        type=float,
        default=480,
        help="of --full, seconds after which no new mode begins; the same command goes on (%(default)s)",
    )
    p.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="timed runs of each form, the median counts (%(default)s)",
    )
    p.add_argument("--out", type=Path, help="write the results here too, e.g. bench/h100.json")
    args = p.parse_args(argv)
    return erase.exit_code("bench.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
