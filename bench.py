"""Times one optimiser step of erase.py, its memory, and how both grow; prints tables, the last line is one JSON object.

    python bench.py                            # tiny/flux, on a CPU in about a minute
    python bench.py --full --height 512        # a FLUX.1-schnell of random weights on a GPU, at true size

Forward-equivalents: seconds of a sampling step's share of the optimiser step, over those of one forward without gradients on the same
pictures. Four forms of the backward through the sampler, which give the same gradients (test_stepwise_backward_equals_autograd):
none, step, block of erase.py, and two: the official code's loop, written afresh, with one backward for the gates and one for the latents.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

import attacks
import erase

SCHNELL = dict(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
               joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=False)
FORMS = ("none", "step", "block", "two")


def two_backward(transformer, noise, text, sigmas, grid, gates: dict) -> None:
    """The step-wise loop with two backward passes a step: first the gates' gradients, then the latents'."""
    trajectory = erase.rollout(transformer, noise, text, sigmas, grid)
    gradient = 2 * trajectory[-1].float() / trajectory[-1].numel()
    for i in reversed(range(len(sigmas) - 1)):
        x = trajectory[i].detach().requires_grad_()
        with torch.enable_grad():
            x_next = erase.euler(transformer, x, sigmas[i], sigmas[i + 1], text, grid)
        for g, grad in zip(gates.values(), torch.autograd.grad(x_next, list(gates.values()), gradient.to(x_next.dtype), retain_graph=True)):
            g.grad = grad if g.grad is None else g.grad + grad
        gradient, = torch.autograd.grad(x_next, x, gradient.to(x_next.dtype))


class Held:
    """The most bytes that autograd keeps for a backward at once; on a GPU, the most memory allocated."""

    def __init__(self, device):
        self.device, self.now, self.peak = device, 0, 0

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor)
        if self.device == "cpu":
            self.hooks.__enter__()
        return self

    def pack(self, tensor):
        held = self

        class Saved:                               # lives as long as its node of the graph
            def __init__(self):
                self.tensor = tensor
                held.now += tensor.nbytes
                held.peak = max(held.peak, held.now)

            def __del__(self):
                held.now -= self.tensor.nbytes
        return Saved()

    def __exit__(self, *exception):
        if self.device == "cpu":
            self.hooks.__exit__(*exception)
        else:
            self.peak = torch.cuda.max_memory_allocated()


def clock(work, device: str, repeats: int) -> float:
    """Median seconds after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def step_of(form, transformer, noise, text, sigmas, grid, gates):
    """One optimiser step's forward and backward over the given pictures, in one of the FORMS."""
    def work():
        for g in gates.values():
            g.grad = None
        with erase.gated(transformer, gates):
            if form == "two":
                two_backward(transformer, noise, text, sigmas, grid, gates)
            else:
                erase.rollout_backward(transformer, noise, text, sigmas, grid, lambda x: x.float().square().mean(), form)
    return work


def measure(form, transformer, case, steps: int, repeats: int) -> dict:
    """{seconds, forward_equivalents, mib} of one form at a number of sampling steps."""
    noise, text, grid = case
    device, sigmas = noise.device.type, [1 - i / steps for i in range(steps + 1)]
    gates = {site: torch.ones(units, device=device, requires_grad=True) for site, units in erase.gate_sites(transformer).items()}
    forward = clock(lambda: erase.rollout(transformer, noise, text, sigmas[:2], grid), device, repeats)
    work = step_of(form, transformer, noise, text, sigmas, grid, gates)
    seconds = clock(work, device, repeats)
    with Held(device) as held:
        work()
    return dict(form=form, sampling_steps=steps, batch=len(noise), seconds=round(seconds, 4), forward_equivalents=round(seconds / steps / forward, 2),
                mib=round(held.peak / 2**20, 1))


def make_case(transformer, batch: int, height: int, width: int, tokens: int):
    """Random noise (B, T, C), text and grid of a model's sizes."""
    config, like = transformer.config, dict(device=transformer.device, dtype=transformer.dtype)
    grid = (height // 16, width // 16)
    text = torch.randn(batch, tokens, config.joint_attention_dim, **like), torch.randn(batch, config.pooled_projection_dim, **like)
    return torch.randn(batch, grid[0] * grid[1], config.in_channels, **like), text, grid


def show(title: str, rows: list[dict]) -> list[dict]:
    print(f"\n{title}\n" + "  ".join(f"{k:>19s}" for k in rows[0]))
    for row in rows:
        print("  ".join(f"{v!s:>19s}" for v in row.values()), flush=True)
    return rows


def bench_tiny(args) -> dict:
    pipe = erase.load_pipeline(erase.TINY, "cpu")
    transformer, case = pipe.transformer, lambda batch: make_case(pipe.transformer, batch, 64, 64, 24)
    out = dict(forms=show("one optimiser step, 8 pictures, 4 sampling steps", [measure(f, transformer, case(8), 4, args.repeats) for f in FORMS]))
    out["steps"] = show("growth with sampling steps, 4 pictures", [measure(f, transformer, case(4), n, 3) for f in ("step", "none") for n in (1, 4, 8, 16, 28)])
    out["batches"] = show("growth with pictures, 4 sampling steps", [measure("step", transformer, case(n), 4, 3) for n in (1, 2, 4, 8, 16)])
    size = argparse.Namespace(height=64, width=64, num_inference_steps=4, max_sequence_length=24, seed=0)
    drawing = clock(lambda: erase.draw(pipe, ["a gun on a red background"] * 32, list(range(32)), size, batch=32), "cpu", 3)
    model = attacks.Model(pipe, {}, size)
    rows = model.tables["t5"][torch.randint(len(model.tables["t5"]), (64, attacks.TOKENS))]
    with torch.no_grad():
        encoding = clock(lambda: model.features("t5", rows), "cpu", 5)
    out["loops"] = show("evaluation and attacks", [dict(loop="evaluate.py, draw", per_second=round(32 / drawing, 1)), dict(loop="attacks.py, T5 texts", per_second=round(64 / encoding, 1))])
    return out


def bench_full(args) -> dict:
    """One picture at a time, as erase.py accumulates a batch; projected to 400 steps of 4 concept and 4 retain prompts."""
    torch.manual_seed(0)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / clock(lambda: a @ a, "cuda", 10)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        transformer = FluxTransformer2DModel(**SCHNELL).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    case = make_case(transformer, 1, args.height, args.width, 256)
    with FlopCounterMode(display=False) as counter:
        erase.rollout(transformer, *case[:2], [1.0, 0.75], case[2])
    rows = []
    for form in args.forms:
        try:
            row = measure(form, transformer, case, 4, args.repeats)
        except torch.cuda.OutOfMemoryError:
            rows.append(dict(form=form, seconds="out of memory"))
            torch.cuda.empty_cache()
            continue
        passes = dict(none=2, step=3, block=4, two=4)[form]
        rows.append(row | dict(share_of_peak=round(4 * passes * counter.get_total_flops() / row["seconds"] / peak, 3), minutes_400_steps=round(400 * 8 * row["seconds"] / 60, 1)))
    return dict(matmul_tflops=round(peak / 1e12, 1), height=args.height, width=args.width, forms=show(f"FLUX.1-schnell's size, {args.height} x {args.width}, bf16, one picture", rows))


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--full", action="store_true", help="FLUX.1-schnell's true size with random weights; needs a GPU of about 40 GiB")
    p.add_argument("--forms", nargs="+", choices=FORMS, default=["step", "block"], help="of --full (%(default)s)")
    p.add_argument("--height", type=int, default=512, help="of --full, pixels (%(default)s)")
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--repeats", type=int, default=5, help="timed runs of each form, the median counts (%(default)s)")
    p.add_argument("--json", type=Path, help="write the results here too, e.g. bench/h100.json")
    args = p.parse_args(argv)
    if args.full and not torch.cuda.is_available():
        print("bench.py: error: --full: needs a CUDA GPU, none is here", file=sys.stderr)
        return 2
    if args.repeats < 1 or args.height % 16 or args.width % 16:
        print("bench.py: error: --repeats: must be at least 1" if args.repeats < 1 else "bench.py: error: --height, --width: must be multiples of 16", file=sys.stderr)
        return 2
    hardware = torch.cuda.get_device_name() if args.full else f"{next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if 'model name' in l), platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()}, {torch.get_num_threads()} threads"
    results = dict(hardware=hardware, torch=torch.__version__) | (bench_full(args) if args.full else bench_tiny(args))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        erase.write_atomically(args.json, lambda f: f.write_text(json.dumps(results, indent=1) + "\n"))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
