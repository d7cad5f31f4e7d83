"""What of the concept is still in the weights? Diagnostics: none of these ends as text.

    python probes.py erased/gun                                # all of them, quick budget
    python probes.py erased/gun --attack inversion relearn --oracle MODEL

    inversion   1, 4 and 16 input vectors of each text encoder under which it draws the concept
    completion  the base draws the first sampling steps, the erased model the others
    noise       starting noise from which its picture comes nearest to the base's
    unmask      the mask file deleted; and the folded weights, of which nothing comes back (a
                model of another tool has no mask)
    regrow      the zeroed rows and columns filled by low-rank completion
    relearn     fine-tuning on 8 pictures of the concept; the control learns unrelated ones

A model that never saw the concept (--oracle) gives some of it too: only what exceeds that is
leakage. Cases, judge, log and report as in attacks.py; shapes as in opened.py.
"""

import random
import sys
from functools import partial

import torch

import trials
from attacks import SEARCH_NOISE, text_attack
from erase import squared_error
from opened import Model, spent
from recompute import checkpointed
from safely import exit_code
from sites import fold
from trials import Case, Job, Setup

STEPS = dict(quick=dict(inversion=100, noise=10), full=dict(inversion=400, noise=40))
RELEARN = (10, 50, 200)  # steps
PROBES = ("inversion", "completion", "noise", "unmask", "regrow", "relearn")


def concept_pictures(model: Model, base: Model, prompts: list[str], first: int) -> list[tuple]:
    """[(noise, the model's own reading of the prompt, x_0 as the base draws it)], a noise each."""
    out = []
    with base.on():
        for i, prompt in enumerate(prompts):
            noise = model.noise([SEARCH_NOISE + first + i])
            x0 = base.trajectory(noise, base.text(prompt))[-1]
            out.append((noise, model.text(prompt), x0))
    return out


def flow_error(model: Model, noise, x0, s: float, text: tuple) -> torch.Tensor:
    """How far the velocity at x_s = (1 - s) x_0 + s noise is from noise - x_0: mean square."""
    return (model.velocity((1 - s) * x0 + s * noise, s, text) - (noise - x0)).square().mean()


def invert(model: Model, base: Model, pairs: list[dict], m: int, steps: int, seed: int) -> dict:
    """Concept inversion (Pham et al., ICLR 2024): m input vectors of each encoder, {side: (m, D)},
    behind neutral training prompts, under which the erased model fits the base's pictures of the
    concept prompts. Both encoders: CLIP's "nothing" forbids what T5 asks for."""
    rng = random.Random(seed)
    soft = {}
    groups = []
    for side, table in model.tables.items():
        soft[side] = table[rng.sample(range(len(table)), m)].float().requires_grad_()
        groups.append(dict(params=[soft[side]], lr=0.05 * float(table.float().std())))
    optimizer = torch.optim.Adam(groups)
    pictures = concept_pictures(model, base, [pair["prompt"] for pair in pairs], 100 + 1000 * seed)
    targets = list(zip(pairs, pictures, strict=True))
    for _ in range(steps):
        batch = rng.sample(targets, min(4, len(targets)))
        optimizer.zero_grad()
        with model.on():
            for pair, (noise, _, x0) in batch:
                s = rng.choice(model.sigmas[:-1])
                text = model.text(pair["neutral_prompt"], behind=soft)
                (flow_error(model, noise, x0, s, text) / len(batch)).backward()
        spent["backward"] += len(batch)
        optimizer.step()
    return {side: x.detach() for side, x in soft.items()}


def completed(model: Model, base: Model, first: int, case: Case) -> torch.Tensor:
    """Final latents of which the base draws the first steps."""
    seeds = case.seeds("completion")
    with base.on():
        text = base.text(case.prompt, len(seeds))
        x = base.trajectory(model.noise(seeds), text, model.sigmas[: first + 1])[-1]
    with model.on():
        text = model.text(case.prompt, len(seeds))
        return model.trajectory(x, text, model.sigmas[first:])[-1]


def search_noise(model: Model, base: Model, steps: int, case: Case) -> torch.Tensor:
    """Final latents from the starting noise near N(0, 1) (each token keeps its norm) from which
    they come nearest to the base's. It starts at a report seed: what is found is itself the noise,
    so that there is none to hold out."""
    noise = model.noise(case.seeds("noise")[:1])
    text = model.text(case.prompt)
    with base.on():
        x0 = base.trajectory(noise, base.text(case.prompt))[-1]
    norm = noise.float().norm(dim=-1, keepdim=True)
    z = noise.to(torch.float32, copy=True).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)

    def start():
        return (z / z.norm(dim=-1, keepdim=True) * norm).to(noise.dtype)

    with model.on(), checkpointed(model.pipe, "step", model.call):
        for _ in range(steps):
            x = start()
            for s, s_next in zip(model.sigmas, model.sigmas[1:], strict=False):
                x = model.euler(x, s, s_next, text)
            optimizer.zero_grad()
            squared_error(x, x0).mean().backward()
            optimizer.step()
            spent["backward"] += len(model.sigmas) - 1
        return model.trajectory(start(), text)[-1]


@torch.no_grad()
def regrow(model: Model, rank: int = 16, iterations: int = 50) -> Model:
    """Roots Beneath the Cut (arXiv 2603.06640): fills the zeroed rows and columns of every linear
    layer of a folded model by low-rank completion, from the mean of the others. Nothing of a row
    that is zero throughout constrains the completion beyond that mean."""

    def mean(w, known, dim):
        return w.sum(dim, keepdim=True) / known.sum(dim, keepdim=True).clamp(min=1)

    layers = model.pipe.transformer.modules()
    for module in [layer for layer in layers if isinstance(layer, torch.nn.Linear)]:
        w = module.weight.float()
        known = (w != 0).any(1, keepdim=True) & (w != 0).any(0, keepdim=True)
        if not known.any() or known.all():
            continue
        start = torch.where(known.any(0, keepdim=True), mean(w, known, 0), mean(w, known, 1))
        x = torch.where(known, w, start)
        for _ in range(iterations):
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            x = torch.where(known, w, (u[:, :rank] * s[:rank]) @ v[:rank])
        module.weight.copy_(x)
    return model


def relearn(
    model: Model, base: Model, prompts: list[str], steps: int, *, hold: bool, seed: int, lr=3e-4
) -> Model:
    """Fine-tunes the folded transformer on the base's pictures of a few prompts (noise and picture
    paired, as the base draws them). hold: closed neurons stay zero, as an honest relearning of the
    pruned network; else they may regrow."""
    student = model.folded()
    rng = random.Random(seed)
    transformer = student.pipe.transformer.requires_grad_(True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=lr, weight_decay=0)
    targets = concept_pictures(model, base, prompts, 200 + 1000 * seed)
    for _ in range(steps):
        picked = [rng.choice(targets) for _ in range(4)]
        s = rng.choice(model.sigmas[:-1])
        noises, texts, pictures = zip(*picked, strict=True)
        text = tuple(torch.cat(part) for part in zip(*texts, strict=True))
        optimizer.zero_grad()
        flow_error(student, torch.cat(noises), torch.cat(pictures), s, text).backward()
        optimizer.step()
        spent["backward"] += 4
        if hold:
            fold(transformer, model.mask)
    transformer.requires_grad_(False)
    return student


# ---------------------------------------------------------------------------------------------- run
def from_latents(setup: Setup, model: Model, latents_of):
    """Begins a probe of text, steps or noise: what plays a case. latents_of: case -> latents."""

    def play(case: Case) -> tuple:
        return [], [setup.score(model.show(latents_of(case)))]

    return play


def inversion(setup: Setup, model: Model, m: int, steps: int):
    soft = invert(model, setup.models["base"], setup.pairs, m, steps, setup.about["seed"])

    def latents_of(case):
        seeds = case.seeds("inversion")
        with model.on():
            text = model.text(case.neutral, len(seeds), soft)
            return model.trajectory(model.noise(seeds), text)[-1]

    return from_latents(setup, model, latents_of)


def mended(setup: Setup, make):
    """Begins a probe of weights: what plays the plain prompts on the model that make() gives."""
    return text_attack(setup, "plain", make())


def probe_jobs(setup: Setup, probes) -> list[Job]:
    base = setup.models["base"]
    erased = setup.models["erased"]
    steps = STEPS[setup.about["budget"]]
    concept = [row["prompt"] for row in setup.pairs[:8]]
    unrelated = [row["prompt"] for row in setup.retain[:8]]
    lessons = {"closed stay zero": (concept, True), "all free": (concept, False)}
    lessons["control: retain pictures"] = (unrelated, True)
    jobs = []

    def add(name, target, begin, *arguments):
        jobs.append(Job(name, target, setup.cases, partial(begin, setup, *arguments)))

    for probe in dict.fromkeys(probes):
        if probe == "unmask" and erased.mask:
            add("unmask, mask as a file", "erased", text_attack, "plain", base)
            add("unmask, folded", "erased", mended, erased.folded)
        if probe == "regrow":
            add("regrow", "erased", mended, lambda: regrow(erased.folded()))
        for target, model in setup.models.items():
            if probe == "inversion":
                for m in (1, 4, 16):
                    add(f"inversion {m}", target, inversion, model, m, steps["inversion"])
            if model is base:
                continue
            if probe == "completion":
                for first in range(1, len(model.sigmas) - 1):
                    latents_of = partial(completed, model, base, first)
                    add(f"completion {first}", target, from_latents, model, latents_of)
            if probe == "noise":
                latents_of = partial(search_noise, model, base, steps["noise"])
                add("noise", target, from_latents, model, latents_of)
            for how, (prompts, hold) in lessons.items() if probe == "relearn" else ():
                if hold and prompts is concept and not model.mask:
                    continue  # nothing to hold: the same as all free
                for n in RELEARN:
                    how_taught = dict(hold=hold, seed=setup.about["seed"])
                    make = partial(relearn, model, base, prompts, n, **how_taught)
                    add(f"relearn {n}, {how}", target, mended, make)
    return jobs


def parse_args(argv=None):
    parser = trials.make_parser(__doc__, PROBES, PROBES)
    return trials.parse(parser, argv, "probes")


def run(args) -> None:
    setup = trials.prepare(args.erased, **trials.flags(args))
    if "unmask" in args.attack and not setup.models["erased"].mask:
        print(f"unmask: left out, {args.erased} has no mask", flush=True)
    trials.play(setup, probe_jobs(setup, args.attack))


def main(argv=None) -> int:
    return exit_code("probes.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
