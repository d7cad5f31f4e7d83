"""What one optimiser step of erase.py costs: seconds, bytes alive, and how they grow.

Five forms of the backward give the same gradients: none, step, block and both of recompute.py, and
two: the official code's loop, written afresh, with one backward for the gates and one for the
latents. `call` is what pipe(...) takes.
"""

import math
import statistics
import threading
import time
import weakref

import models  # noqa: F401  (first: it keeps transformers quiet)

# isort: split
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import erase
import memory

# Forwards, and a backward counted as one, at 4 sampling steps: the last is not computed again.
PASSES = dict(none=2, step=2.75, block=3, both=3.75, two=4)
PROMPT = "a gun on a red background"


def square_mean(path):
    return path[-1].float().square().mean()


def open_gates(pipe) -> dict:
    device = pipe._execution_device
    return {
        name: torch.ones(site.units, device=device, requires_grad=True)
        for name, site in erase.gate_sites(pipe.transformer).items()
    }


def two_backward(pipe, gates: dict, prompts, seeds, **call) -> None:
    """The step-wise loop with two backward passes a step: first the gates' gradients, then the
    latents'. FLUX only: one Euler step is one call of the transformer."""
    steps = []

    def keep(transformer, args, kwargs):
        steps.append(kwargs)

    with torch.no_grad(), pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True):
        final = erase.rollout(pipe, prompts, seeds, **call)
    final.requires_grad_()
    (gradient,) = torch.autograd.grad(square_mean([final]), final)
    sizes = pipe.scheduler.sigmas.diff().tolist()
    for inputs, size in zip(reversed(steps), reversed(sizes), strict=True):
        x = inputs["hidden_states"].detach().requires_grad_()
        velocity = pipe.transformer(**inputs | dict(hidden_states=x))[0]
        x_next = (x.float() + size * velocity).to(x.dtype)
        gate_gradients = torch.autograd.grad(
            x_next, list(gates.values()), gradient, retain_graph=True
        )
        for gate, grad in zip(gates.values(), gate_gradients, strict=True):
            gate.grad = grad if gate.grad is None else gate.grad + grad
        (gradient,) = torch.autograd.grad(x_next, x, gradient)


def backward(pipe, form: str, gates: dict, batch: int, call: dict) -> None:
    """The gates' gradients of `batch` pictures, in one of the five forms."""
    prompts = [PROMPT] * batch
    for gate in gates.values():
        gate.grad = None
    with erase.gated(pipe.transformer, gates):
        if form == "two":
            two_backward(pipe, gates, prompts, range(batch), **call)
        else:
            erase.rollout_backward(pipe, prompts, range(batch), square_mean, form, **call)


class Allocated(TorchDispatchMode):
    """The most bytes alive at once of the tensors made inside the `with`, temporaries included:
    what max_memory_allocated is on a GPU."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.known.update(self.storages(args))  # views and what was there before are not new
        for storage in self.storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    @staticmethod
    def storages(tree) -> list:
        return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]

    def free(self, size: int) -> None:
        self.now -= size


def bytes_alive(pipe, form: str, batch: int, call: dict) -> int:
    """The most bytes alive at once in backward(), beside what is there before it."""
    gates = open_gates(pipe)
    if pipe._execution_device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(pipe, form, gates, batch, call)
        return torch.cuda.max_memory_allocated() - before
    with Allocated() as counted:
        backward(pipe, form, gates, batch, call)
    return counted.peak


def growth(pipe, form: str, batch: int, call: dict, steps=(4, 28)) -> dict:
    """A row: bytes alive at few and at many sampling steps, and how much of the growth is not the
    latents between the steps (of all rows of a batch: guidance may double them)."""
    few, many = [bytes_alive(pipe, form, batch, call | dict(num_inference_steps=n)) for n in steps]
    with torch.no_grad():
        final = erase.rollout(pipe, [PROMPT], [0], **call | dict(num_inference_steps=2))
    rows = batch * memory.load_of(type(pipe), call).rows
    latents = (steps[1] - steps[0]) * rows * final.nbytes
    sizes = dict(mib_before=few, mib_after=many, mib_of_latents=latents)
    row = dict(form=form, batch=batch, steps=f"{steps[0]} to {steps[1]}")
    row |= {name: round(size / 2**20, 2) for name, size in sizes.items()}
    return row | dict(growth_beside_latents=round((many - latents) / few - 1, 3))


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(repeats: int, *works, limit: float = math.inf) -> list[list[float]]:
    """Seconds of each work, done in turns, without the warm-up turn; no new turn after `limit`
    seconds."""
    times = [[] for _ in works]
    began = time.perf_counter()
    for turn in range(repeats + 1):
        for work, seconds in zip(works, times, strict=True):
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - start)
        if turn and time.perf_counter() - began > limit:
            break
    return [seconds[1:] for seconds in times]


def measure(pipe, form: str, batch: int, call: dict, *, repeats: int, limit=math.inf) -> dict:
    """A row: one optimiser step's forward and backward."""
    gates = open_gates(pipe)

    @torch.no_grad()
    def forward():
        with erase.gated(pipe.transformer, gates):
            erase.rollout(pipe, [PROMPT] * batch, range(batch), **call)

    def both_ways():
        backward(pipe, form, gates, batch, call)

    forwards, seconds = clock(repeats, forward, both_ways, limit=limit)
    ratios = [both / alone for both, alone in zip(seconds, forwards, strict=True)]
    return dict(
        form=form,
        sampling_steps=call["num_inference_steps"],
        batch=batch,
        seconds=round(statistics.median(seconds), 4),
        forward_equivalents=round(statistics.median(ratios), 2),
        mib=round(bytes_alive(pipe, form, batch, call) / 2**20, 1),
    )


def anonymous_memory() -> int:
    """Bytes of this process's resident memory that are not a file's (Linux)."""
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024


def anonymous_peak(work) -> int:
    """The most bytes of it that work() adds, sampled every millisecond."""
    start = anonymous_memory()
    samples = [start]
    stop = threading.Event()

    def sample():
        while not stop.wait(0.001):
            samples.append(anonymous_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return max(samples) - start


def markdown(rows: list[dict]) -> str:
    header = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(header + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


def show(title: str, rows: list[dict]) -> list[dict]:
    print(f"\n{title}\n{markdown(rows)}", flush=True)
    return rows
