"""Attacks that end as text, optimised against the erased model in front of them.

    python attacks.py erased/gun                  # all of them, with controls, quick budget
    python attacks.py erased/gun --budget full    # 20 prompts, long searches
    python attacks.py erased/gun --attack replay --prompts prompts/gun.csv
    python attacks.py esd.safetensors --concept gun    # another tool's weights: see foreign.py

A success is a picture in which the judge sees the concept. No attack ever sees the judge: it
optimises distances of text vectors or of velocities, on noise of its own, and is scored on the
prompts' evaluation seeds, its strings encoded anew by the stock pipeline. The headline is the union
over all attacks. What is still in the weights, probes.py measures. Shapes: as in opened.py.
"""

import functools
import math
import random
import sys
from dataclasses import replace

import torch

import trials
from opened import Model, spent
from safely import UserError, exit_code
from trials import UNION, Case, Job, Setup

# How long searches take: (generations, population) of ring_a_bell, else (steps, candidates a step)
EFFORT = dict(
    quick=dict(ring_a_bell=(100, 100), mma=(40, 64), p4d=(16, 32), unlearn_diff=(16, 32)),
    full=dict(ring_a_bell=(150, 100), mma=(60, 96), p4d=(24, 48), unlearn_diff=(24, 48)),
)
TOKENS, PREFIX = 8, 3  # searched tokens a side: alone, and in front of a prompt
SEARCH_NOISE = 2**41  # far from evaluation and training seeds


# ----------------------------------------------------------------------------------------- searches
def genetic_search(model: Model, side: str, wanted, generations, size, rng, *, history=None) -> str:
    """Ring-A-Bell (Tsai et al., ICLR 2024, alg. 1): the K tokens that read most like wanted (R, D).

    The better half survives, so that the best distance, appended to history, never rises; crossover
    at one point, one token in every second child mutated. differs from paper: nearest rows by
    cosine, not all 77 x 768 numbers of CLIP, most of which FLUX does not read.
    """
    vocabulary = model.vocabularies[side]

    def ranked(people):
        distances = model.mismatch(side, model.rows(side, people), wanted).tolist()
        return list(zip(distances, people, strict=True))

    scored = sorted(ranked([vocabulary.random(rng, TOKENS) for _ in range(size)]))
    for _ in range(generations):
        elite = [ids for _, ids in scored[: size // 2]]
        children = []
        while len(children) < size - len(elite):
            mother = rng.choice(elite)
            father = rng.choice(elite)
            cut = rng.randrange(1, TOKENS)
            child = mother[:cut] + father[cut:]
            if rng.random() < 0.5:
                child[rng.randrange(TOKENS)] = rng.choice(vocabulary.allowed)
            if vocabulary.valid(child):
                children.append(child)
        scored = sorted(scored[: size // 2] + ranked(children))
        if history is not None:
            history.append(scored[0][0])
    return model.decode(side, scored[0][1])


def steepest(model: Model, ids: dict, loss, most: int = 32) -> dict:
    """{side: (K, most) places in `allowed`}, at each token those of steepest descent."""
    before = spent["network"]
    rows = {side: model.rows(side, [ids[side]]).requires_grad_() for side in ids}
    gradients = torch.autograd.grad(loss(rows).sum(), list(rows.values()))
    spent["backward"] += max(1, spent["network"] - before)
    options = {}
    for side, gradient in zip(rows, gradients, strict=True):
        slopes = gradient[0] @ model.vocabularies[side].table.float().T  # (K, V)
        best = slopes.topk(min(most, slopes.shape[1]), largest=False)
        options[side] = best.indices.tolist()
    return options


def gradient_search(model: Model, ids: dict, loss, effort, rng, *, use_gradient=True, history=None):
    """Greedy coordinate gradient, the search of MMA-Diffusion (Yang et al., CVPR 2024, sec. 3.2),
    from {side: token ids} to {side: string}.

    loss: {side: embeddings (N, K, D)} -> (N,). effort: (steps, candidates a step). Candidates
    differ in one token, at a random place, from the steepest 32 (use_gradient=False, the control:
    from all). The best is taken even if it is worse; the best ever seen is returned, and its losses
    appended to history.
    """
    steps, candidates = effort
    allowed = {side: model.vocabularies[side].allowed for side in ids}
    options = {side: [range(len(allowed[side]))] * len(ids[side]) for side in ids}
    best = ids
    best_loss = math.inf
    for _ in range(steps):
        if use_gradient:
            options = steepest(model, ids, loss)
        tried = []
        for _ in range(6 * candidates):  # many swaps do not survive retokenisation
            side = rng.choice(list(ids))
            place = rng.randrange(len(ids[side]))
            swapped = list(ids[side])
            swapped[place] = allowed[side][rng.choice(options[side][place])]
            if model.vocabularies[side].valid(swapped):
                tried.append(ids | {side: swapped})
            if len(tried) == candidates:
                break
        if tried:
            rows = {side: model.rows(side, [new[side] for new in tried]) for side in ids}
            losses = loss(rows)
            ids = tried[losses.argmin()]
            if losses.min().item() < best_loss:
                best = ids
                best_loss = losses.min().item()
        if history is not None:
            history.append(best_loss)
    return {side: model.decode(side, found) for side, found in best.items()}


def ring_a_bell(model: Model, base: Model, case, effort, rng) -> dict:
    """Ring-A-Bell's target, E(prompt) + eta c with eta = 1 and c the concept's direction, both by
    the base's encoders: edited ones may know neither."""
    found = {}
    for side in model.sides:
        wanted = base.read(side, case.prompt) + base.directions[side]
        found[side] = genetic_search(model, side, wanted, *effort, rng)
    return found


def mma(model: Model, base: Model, case, effort, rng) -> dict:
    """MMA-Diffusion, text modality (Yang et al., CVPR 2024, eq. 2): from random tokens to the
    embedding that the base's encoders give the concept prompt, under a ban list."""
    found = {}
    for side in model.sides:
        wanted = base.read(side, case.prompt)

        def loss(rows, side=side, wanted=wanted):
            return model.mismatch(side, rows[side], wanted)

        start = {side: model.vocabularies[side].random(rng, TOKENS)}
        found |= gradient_search(model, start, loss, effort, rng)
    return found


def velocity_error(model: Model, text: tuple, states, velocities, sigmas) -> torch.Tensor:
    """(N,) mean square of v(x_s, s, text_n) - velocity over the states (J, T, C) of each sigma."""
    n = len(text[0])
    errors = []
    for x, wanted, s in zip(states, velocities, sigmas, strict=True):
        each = tuple(part.repeat_interleave(len(x), 0) for part in text)
        found = model.velocity(x.repeat(n, 1, 1), s, each)  # (N J, T, C)
        difference = found.float() - wanted.repeat(n, 1, 1)
        errors.append(difference.square().view(n, -1).mean(1))
    return torch.stack(errors).mean(0)


def p4d(model: Model, base: Model, case, effort, rng) -> dict:
    """Prompting4Debugging (Chin et al., ICML 2024, eq. 3-5): tokens under which the erased model's
    velocity is the base's for the concept prompt, on the base's own trajectory.

    It starts from random tokens in front of the neutral prompt: a style needs places of its own.
    differs from paper: hard tokens by gradient_search; soft tokens projected to the nearest (PEZ)
    seldom survive retokenisation.
    """
    sigmas = model.searched
    with base.on():
        text = base.text(case.prompt, 2)
        states = base.trajectory(model.noise([SEARCH_NOISE, SEARCH_NOISE + 1]), text)[:-1:2]
        wanted = [base.velocity(x, s, text) for x, s in zip(states, sigmas, strict=True)]

    def loss(rows):
        return velocity_error(model, model.conditioning(rows), states, wanted, sigmas)

    start = {}
    for side, vocabulary in model.vocabularies.items():
        prefix = model.decode(side, vocabulary.random(rng, PREFIX))
        start[side] = model.ids(side, f"{prefix} {case.neutral}")
    with model.on():
        return gradient_search(model, start, loss, effort, rng)


def unlearn_diff(model: Model, base: Model, case, effort, rng) -> dict:
    """UnlearnDiffAtk (Zhang et al., ECCV 2024, eq. 6): tokens in front of the prompt under which
    the erased model fits pictures of the concept, v(x_s) = noise - x_0. No base network in the
    loop: it drew the pictures, once. differs from paper: hard tokens by gradient_search, since
    relaxed one-hots seldom survive retokenisation; a prefix for each encoder.
    """
    sigmas = model.searched
    noise = model.noise([SEARCH_NOISE, SEARCH_NOISE + 1])
    with base.on():
        x0 = base.trajectory(noise, base.text(case.prompt, 2))[-1]
    states = [(1 - s) * x0 + s * noise for s in sigmas]
    wanted = [noise - x0] * len(sigmas)

    def loss(rows):
        behind = {}
        for side, row in rows.items():
            rest = model.content(side, case.context)[:, : model.room[side] - PREFIX]
            behind[side] = torch.cat([row, rest.expand(len(row), -1, -1)], 1)
        return velocity_error(model, model.conditioning(behind), states, wanted, sigmas)

    start = {side: model.vocabularies[side].random(rng, PREFIX) for side in model.sides}
    with model.on():
        found = gradient_search(model, start, loss, effort, rng)
    return {side: f"{text} {case.context}" for side, text in found.items()}


# ---------------------------------------------------------------------------------------------- run
SEARCHES = dict(ring_a_bell=ring_a_bell, mma=mma, p4d=p4d, unlearn_diff=unlearn_diff)
ENCODER = ("ring_a_bell", "mma")  # see no transformer: they find the same for base and erased


def find_shots(setup: Setup, attack: str, model: Model, case: Case) -> list[dict]:
    """The shots that an attack ends in."""
    prompt = case.prompt
    rng = random.Random(f"{setup.about['seed']} {attack} {case.name}")
    if attack == "random tokens":
        ids = {side: model.vocabularies[side].random(rng, TOKENS) for side in model.sides}
        return [{side: model.decode(side, ids[side]) for side in model.sides}]
    if attack == "synonyms":
        return [model.shot(text) for text in case.synonyms]
    if attack == "split":
        return [model.shot(case.neutral) | {side: prompt} for side in reversed(model.sides)]
    if attack == "knobs":
        settings = [dict(num_inference_steps=n) for n in (1, 2, 8)]
        length = model.call["max_sequence_length"]
        for n in (length // 2, length * 2):
            if n <= model.tokenizers[model.sides[-1]].model_max_length:
                settings.append(dict(max_sequence_length=n))
        return [model.shot(prompt) | some for some in settings]
    if attack in SEARCHES:
        for record in setup.records if attack in ENCODER else ():
            other = setup.models.get(record["target"])
            is_same = other and other.pipe.text_encoder is model.pipe.text_encoder
            if is_same and (record["attack"], record["case"]) == (attack, case.name):
                return record["shots"]
        effort = EFFORT[setup.about["budget"]][attack]
        has_own = attack in ENCODER and model is setup.models.get("oracle")
        base = model if has_own else setup.models["base"]  # its encoders are others altogether
        return [SEARCHES[attack](model, base, case, effort, rng)]
    return [model.shot(prompt)]  # plain, seeds, replay, and on mended weights


def text_attack(setup: Setup, attack: str, model: Model):
    """Begins it: what plays a case."""

    def play(case: Case) -> tuple:
        shots = find_shots(setup, attack, model, case)
        seeds = case.seeds(attack)
        with model.on():
            return shots, [setup.score(model.draw(seeds=seeds, **shot)) for shot in shots]

    return play


def text_jobs(setup: Setup, attacks) -> list[Job]:
    jobs = []

    def add(attack, target, cases):
        begin = functools.partial(text_attack, setup, attack, setup.models[target])
        jobs.append(Job(attack, target, cases, begin))

    for target in setup.models:
        add("random tokens", target, setup.cases)
    for attack in dict.fromkeys(attacks):
        cases = setup.replayed if attack == "replay" else setup.cases
        if attack == "synonyms":
            cases = [case for case in cases if case.synonyms]
        if attack == "split" and len(setup.models["base"].sides) < 2:
            continue  # one encoder: nothing to split
        for target in setup.others:
            add(attack, target, cases)
        if attack in ("plain", "replay", *ENCODER):
            add(attack, "base", cases)
        elif attack in SEARCHES:  # they work on the base, from where nothing names the concept
            few = cases[: max(3, len(cases) // 2)]
            add(attack, "base", [replace(case, context=case.neutral) for case in few])
    return jobs


def parse_args(argv=None):
    parser = trials.make_parser(__doc__, (*UNION, "replay"), UNION)
    help = "prompts of the attack replay, found on other models: what evaluate.py --prompts takes"
    parser.add_argument("--prompts", help=help)
    parser.add_argument("--where", help="keep rows of --prompts")
    args = trials.parse(parser, argv, "attacks")
    if args.where and not args.prompts:
        raise UserError("--where: goes with --prompts")
    if "replay" in args.attack and not args.prompts:
        raise UserError("--attack replay: needs --prompts")
    if args.prompts and "replay" not in args.attack:
        raise UserError("--prompts: goes with --attack replay")
    return args


def run(args) -> None:
    replayed = dict(prompts=args.prompts, where=args.where)
    setup = trials.prepare(args.erased, **trials.flags(args), **replayed)
    trials.play(setup, text_jobs(setup, args.attack))


def main(argv=None) -> int:
    return exit_code("attacks.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
