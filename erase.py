"""Minimalist Concept Erasure (MCE, ICML 2025, arXiv 2507.13386): a concept leaves a text-to-image
model by switching few of its neurons off.

Every neuron of some layers gets a gate in {0, 1}. With F(gates, noise, prompt) the final latents of
the whole sampler, gradient descent on the gates' logits minimises

      E |F(gates, noise, prompt) - F(open, noise, neutral prompt)|^2   erase_loss: with the concept
    + beta E |F(gates, noise, prompt) - F(open, noise, prompt)|^2      preserve_loss: without it
    + beta x what closing each gate alone would do (harm_of_closing), a term that fades out

end to end through all sampling steps. Then a LoRA learns the same (heal.py), from the latents
after every step, and is fitted again to harm nothing else (refit.py). It is added to the weights,
then those of closed neurons are zeroed: a plain state dict. The sampler is the pipeline's own
__call__: this file knows nothing of a model's schedule, guidance or latents. "differs from paper"
marks what is ours, such as the third term and the LoRA.

A site is a layer at which gates multiply. Shapes: B pictures, U units (neurons) of a site, G gates
of all sites in a row, N cases; latents are (B, ...), a path is a list of them, one a step.

    python erase.py --concept gun
"""

import json
import math
import random
import sys
import time
from functools import partial

import models  # first: it keeps transformers quiet

# isort: split
import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm import tqdm

import artefacts
import compose
import heal
import importmask
import lowmem
import pictures
import promptfiles
import recompute
from artefacts import load_erased, load_mask  # noqa: F401 (for who imports this file)
from flags import DEFAULTS, LEARNING, PRESETS, parse_args
from models import remember_prompts
from refit import Teacher, pictures_of, refit
from safely import UserError, exit_code
from sites import MODULES, absent, fold, gate_sites, gated, reopened  # noqa: F401

# Logits before training. There every relaxation is exactly 1, but for hard_concrete's noise.
START = dict(sigmoid=4.0, hard_concrete=3.0, straight_through=3.0)


def sigmoid(logit):
    """The plainest relaxation, scaled so that it is 1 at its start value."""
    return (logit.sigmoid() / torch.tensor(START["sigmoid"]).sigmoid()).clamp(max=1)


def hard_concrete(logit, uniform=None, temperature=2 / 3, low=-0.1, high=1.1):
    """Louizos et al. 2018, eq. 10-12: a stretched, clamped sigmoid with logistic noise."""
    noise = 0.0 if uniform is None else uniform.log() - (-uniform).log1p()
    stretched = ((logit + noise) / temperature).sigmoid() * (high - low) + low
    return stretched.clamp(0, 1)


def straight_through(logit, threshold=0.0):
    """0 or 1 forwards, the gradient of a sigmoid backwards. differs from paper: training and
    deployment see the same gates."""
    soft = logit.sigmoid()
    return (logit > threshold).float() + (soft - soft.detach())  # the bracket is exactly 0


def relax(logits, gate: str, threshold: float, uniform=None, temperature=2 / 3) -> torch.Tensor:
    """Gates (G,) in [0, 1] from logits (G,) by the relaxation `gate`, one of START. Only
    straight_through heeds the threshold, only hard_concrete the noise uniform (G,) and the
    temperature."""
    if gate == "sigmoid":
        return sigmoid(logits)
    if gate == "hard_concrete":
        return hard_concrete(logits, uniform, temperature)
    return straight_through(logits, threshold)


def closing_threshold(logits, max_closed: float) -> float:
    """Gates close whose logit is at or below it: 0, or lower where more than the share max_closed
    would close. differs from paper: gates that want to close compete for few places."""
    places = int(max_closed * len(logits))
    return min(0.0, logits.detach().kthvalue(places).values.item()) if places else -math.inf


def split(flat, sites: dict) -> dict:
    """(G,) or (B, G) -> {site: (U,) or (B, U)}."""
    sizes = [site.units for site in sites.values()]
    return dict(zip(sites, flat.split(sizes, dim=-1), strict=True))


def rollout_path(pipe, prompts, seeds, **call) -> list:
    """Latents (B, ...) after each step of the pipeline's own sampler, with gradients unless under
    no_grad. prompts, seeds: B of each; a seed means the same noise on every device and in any
    batch. call: what pipe(...) takes, such as height, num_inference_steps, guidance_scale."""
    path = []

    def keep(pipe, step, timestep, tensors):
        path.append(tensors["latents"])
        return {}

    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    sample = type(pipe).__call__.__wrapped__  # without its torch.no_grad()
    call |= dict(prompt=list(prompts), output_type="latent", callback_on_step_end=keep)
    sample(pipe, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call)
    return path


def rollout(pipe, prompts, seeds, **call) -> torch.Tensor:
    """Final latents (B, ...)."""
    return rollout_path(pipe, prompts, seeds, **call)[-1]


def rollout_backward(pipe, prompts, seeds, loss_of_path, checkpoint="step", **call):
    """Adds the gradient of loss_of_path(path) to all that the rollout hangs on; what is computed
    again for it, `checkpoint` says. Returns (loss, path), detached."""
    with recompute.checkpointed(pipe, checkpoint, call):
        path = rollout_path(pipe, prompts, seeds, **call)
        loss = loss_of_path(path)
        loss.backward()
    return loss.detach(), [latents.detach() for latents in path]


# Noise seeds of training, and of the figures after it: far from any evaluation seed.
TRAIN_NOISE = 2**40
HELD_OUT_NOISE = 2**40 + 2**21


def squared_error(latents, target) -> torch.Tensor:
    """(B,) the paper's squared norm, as a mean over a picture's latents (B, ...)."""
    return (latents.float() - target.float()).square().flatten(1).mean(1)


def final_error(path, target) -> torch.Tensor:
    """(B,) squared errors of the final latents, those that are decoded."""
    return squared_error(path[-1], target[-1])


def case_errors(
    pipe, cases, seeds, gates, weights, lora=None, *, call, error_of=final_error, micro_batch=16,
    checkpoint="step",
):  # fmt: skip
    """(N,) errors on N cases (prompt, base prompt): error_of the path of the model with these gates
    and, if any, this LoRA for the one, and the base's for the other, from the same noise. Unless
    under no_grad, the gradient of their sum, weighted by weights (N,), is added to that of the
    gates or the LoRA. call: the sampler's arguments."""
    errors = []
    for start in range(0, len(cases), micro_batch):
        part = slice(start, start + micro_batch)
        prompts, base_prompts = zip(*cases[part], strict=True)
        with torch.no_grad():
            target = rollout_path(pipe, base_prompts, seeds[part], **call)

        def loss(path):
            return error_of(path, target) @ weights[part].to(pipe._execution_device)

        with heal.adapted(pipe.transformer, lora or {}), gated(pipe.transformer, gates):
            if torch.is_grad_enabled():
                _, path = rollout_backward(pipe, prompts, seeds[part], loss, checkpoint, **call)
            else:
                path = rollout_path(pipe, prompts, seeds[part], **call)
        errors.append(error_of(path, target))
    return torch.cat(errors)


def processes() -> tuple[int, int]:
    """(index, number) of the processes that torchrun started, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def harm_of_closing(
    pipe, prompts, sites, *, call, draws=960, micro_batch=16, checkpoint="step", seed=0
):
    """{site: (U,)} h_i = E |dF/dgate_i|^2, a mean over latents and `draws` retain pictures.
    differs from paper: preserve_loss has no gradient where all gates are open, so erase_loss alone
    would choose which close first. Near there preserve_loss is, but for products of two gates,
    sum_i h_i (1 - gate_i)^2, of gates of 0 and 1 the same without the square, as train() takes it.
    With J = dF/dgates, h = E (J^T v)^2 for v ~ N(0, 1) (Hutchinson's estimate)."""
    rank, count = processes()
    rng = random.Random(f"{seed} harm")
    chosen = rng.choices(prompts, k=draws)
    seeds = [TRAIN_NOISE + rng.randrange(2**20) for _ in chosen]
    total = sum(site.units for site in sites.values())
    harm = torch.zeros(total, device=pipe._execution_device)
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    chosen, seeds = chosen[rank::count], seeds[rank::count]  # each process has its share
    for start in tqdm(range(0, len(chosen), micro_batch), "harm", disable=rank > 0):
        part = slice(start, start + micro_batch)

        def projection(path):  # v picture by picture, those of other processes drawn too
            final = path[-1]
            v = torch.stack([[normal(x.shape) for _ in range(count)][rank] for x in final])
            return (final.float() * v.to(final.device)).sum() / final[0].numel() ** 0.5

        # each picture has its own gates, so that one backward gives every picture's gradient
        gates = torch.ones(len(chosen[part]), total, device=harm.device, requires_grad=True)
        with gated(pipe.transformer, split(gates, sites)):
            rollout_backward(pipe, chosen[part], seeds[part], projection, checkpoint, **call)
        harm += gates.grad.square().sum(0) / draws
    if count > 1:
        dist.all_reduce(harm)
    return split(harm.cpu(), sites)


def choose(rng, indices: range, size: int, hard: float, latest) -> list[int]:
    """`size` of the indices: the share `hard` in proportion to the latest errors there (those never
    seen, whose error is infinite, like the worst), the rest evenly."""
    errors = latest[indices.start : indices.stop]
    worst = max([1e-6, *errors[errors.isfinite()].tolist()])
    weights = (errors.clamp(max=worst) + 1e-6).tolist()
    count = round(hard * size)
    return rng.choices(indices, weights, k=count) + rng.choices(indices, k=size - count)


def learner(pipe, pairs, retain, *, beta, batch, retain_batch, hard, **how):
    """(learn, latest): a function that adds one step's gradient and returns its losses, and each
    case's error when it was last seen, (N,), infinite before. Raises RuntimeError if not finite.
    how: call, error_of, micro_batch, checkpoint of case_errors."""
    cases = [*pairs, *zip(retain, retain, strict=True)]  # (prompt, what the base draws for it)
    latest = torch.full((len(cases),), math.inf)
    weights = torch.tensor([1 / batch] * batch + [beta / retain_batch] * retain_batch)
    rank, count = processes()
    mine = slice(rank, None, count)  # each process has its share of a step's pictures

    def learn(key: str, leaf, gates, lora=None) -> dict:
        """`key`, which ends with the step, decides which prompts from which noise; the gradient
        comes to `leaf`, of which the gates or the LoRA are made."""
        rng = random.Random(key)
        chosen = choose(rng, range(len(pairs)), batch, hard, latest)
        chosen += choose(rng, range(len(pairs), len(cases)), retain_batch, hard, latest)
        seeds = [TRAIN_NOISE + rng.randrange(2**20) for _ in chosen]
        part = [cases[i] for i in chosen][mine]
        errors = torch.zeros(len(chosen), device=leaf.device)
        errors[mine] = case_errors(pipe, part, seeds[mine], gates, weights[mine], lora, **how)
        if count > 1:
            dist.all_reduce(errors)
            dist.all_reduce(leaf.grad)
        latest[chosen] = errors.cpu()
        erase_loss = errors[:batch].mean().item()
        preserve_loss = errors[batch:].mean().item()
        loss = erase_loss + beta * preserve_loss
        if not (math.isfinite(loss) and leaf.grad.isfinite().all()):
            advice = "or a gradient is not finite; try a smaller learning rate"
            raise RuntimeError(f"step {key.split()[-1]}: the loss is {loss} {advice}")
        return dict(erase_loss=erase_loss, preserve_loss=preserve_loss, loss=loss)

    return learn, latest


def train(
    pipe, pairs, retain, *, call, modules, steps, gate, lr_ffn, lr_norm, lr_decay, weight_decay,
    adam_eps, beta, batch, retain_batch, hard, max_closed, harm, temperature=2 / 3, noise=1.0,
    harm_draws=960, micro_batch=16, checkpoint="step", seed=0, first_step=0, state=None,
    on_step=None,
):  # fmt: skip
    """Learns the gates of pipe.transformer. Returns the mask, {site: (U,) of 0 and 1}.

    pipe: frozen, each part by requires_grad_(False), as the sampler runs with gradients.
    pairs: [(prompt, neutral prompt)]; retain: [prompt]; call: the sampler's arguments; others as in
    DEFAULTS and the flags. After each step on_step(metrics, state) is called, with a dict of floats
    and one of tensors; first_step and state go on from there. Raises RuntimeError if not finite.
    """
    sites = gate_sites(pipe.transformer, modules)
    norm = gate_sites(pipe.transformer, ("norm",))
    units = torch.tensor([site.units for site in sites.values()])
    rates = torch.tensor([float(lr_norm if name in norm else lr_ffn) for name in sites])
    rates = rates.repeat_interleave(units)
    logits = torch.full_like(rates, START[gate], requires_grad=True)
    optimizer = torch.optim.AdamW([logits], lr=1.0, weight_decay=weight_decay, eps=adam_eps)
    how = dict(call=call, micro_batch=micro_batch, checkpoint=checkpoint)
    drawn = dict(beta=beta, batch=batch, retain_batch=retain_batch, hard=hard)
    learn, latest = learner(pipe, pairs, retain, **drawn, **how)
    if state:
        latest.copy_(state["latest"])
        logits.data.copy_(state["logits"])
        optimizer.state[logits] = {name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    threshold = closing_threshold(logits, max_closed)
    harm_of = torch.zeros_like(rates)
    if harm and first_step < steps:
        draws = min(harm_draws, steps * retain_batch)  # no longer than the training itself
        found = harm_of_closing(pipe, retain, sites, draws=draws, seed=seed, **how)
        harm_of = torch.cat(list(found.values()))

    is_quiet = processes()[0] > 0
    bar = tqdm(range(first_step, steps), "erase", steps, initial=first_step, disable=is_quiet)
    for step in bar:
        began = time.time()
        # gates from logits, with one draw of noise for all pictures of the step
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        uniform = torch.rand(len(logits), generator=generator) * noise + (1 - noise) / 2
        relaxed = relax(logits, gate, threshold, uniform.clamp(1e-6, 1 - 1e-6), temperature)
        gates = relaxed.detach().to(pipe._execution_device).requires_grad_()
        losses = learn(f"{seed} {step}", gates, split(gates, sites))

        # on to the logits; harm, which the logged loss leaves out, fades until 70 % of the steps
        foresight = beta * harm * max(0.0, 1 - step / (0.7 * steps))
        optimizer.zero_grad()
        relaxed.backward(gates.grad.cpu() - foresight * harm_of)  # d/dgate of h (1 - gate) is -h
        before = logits.detach().clone()
        optimizer.step()  # AdamW's step is linear in its rate: of rate 1, each gate takes its own
        logits.data.copy_(before.lerp(logits.data, rates * (1 - lr_decay * step / steps)))
        if gate == "sigmoid":  # flat above its start, where a logit would stay for ever
            logits.data.clamp_(max=START[gate])
        threshold = closing_threshold(logits, max_closed)

        closed = (logits <= threshold).float().mean().item()
        seconds = round(time.time() - began, 3)
        metrics = dict(step=step) | losses | dict(closed=closed, sec_per_step=seconds)
        text = "erase {erase_loss:.4f}, preserve {preserve_loss:.4f}, {closed:.1%} closed"
        bar.set_postfix_str(text.format(**metrics))
        if on_step:
            on_step(metrics, dict(latest=latest, logits=logits.detach(), **optimizer.state[logits]))
    return split((logits.detach() > threshold).float(), sites)


def run(args) -> None:
    began = time.time()
    workers = PartialState(cpu=args.device == "cpu")
    is_first = workers.is_main_process
    if workers.num_processes > 1:
        args.device = str(workers.device)

    def flags(names):
        return {name: vars(args)[name] for name in names}

    # all that can be wrong is found before a weight is loaded
    models.check_device(args.device)
    for flag, size in flags(("batch", "retain_batch")).items():
        if size % workers.num_processes:
            found = f"{size} prompts cannot be split evenly over {workers.num_processes} processes"
            raise UserError(f"--{flag}: {found}")
    rows = compose.training_rows(args, models.prompt_folder(args.model))
    args.model = artefacts.pinned_model(args.model, args.out_dir, args.resume)
    kind, meta, others, call = models.inspect_model(args.model, **flags(models.CALL_FLAGS))
    sites = gate_sites(meta, args.modules)
    imported = importmask.read(args.import_mask, meta) if args.import_mask else None
    learnt = {}
    if args.heal:
        size = heal.size_of(meta, args.heal_rank)
        fitted = pictures_of(rows.pairs, rows.retain) if args.refit else 0
        learnt = dict(lora=heal.lora_layers(meta), lora_size=size, refitted=fitted)
    of_plan = flags(lowmem.FLAGS) | learnt
    chosen, plan = lowmem.plan(meta, others, kind, sites, call, args.device, **of_plan)
    vars(args).update(chosen)
    config = artefacts.run_config(vars(args), call, rows)
    total = sum(site.units for site in sites.values())
    workers.print(
        f"model: {args.on or config['model']} ({kind.__name__}); preset {PRESETS[args.preset]}; "
        f"{total:,} gates in {len(sites)} layers{absent(meta, args.modules)}; {len(rows.pairs)} "
        f"concept pairs, {len(rows.retain)} retain prompts\n{plan}",
        flush=True,
    )
    if args.dry_run:
        workers.print(json.dumps(config, indent=1))
        return
    artefacts.check_folder(args.out_dir, config, args.resume, meta, others)
    cases = len(rows.pairs) + len(rows.retain)
    first_step, state = artefacts.read_state(args.out_dir, "logits", total, cases, args.steps)
    healed = 0, {}
    if args.heal and first_step == args.steps:
        steps = args.heal_steps, args.steps
        healed = artefacts.read_state(args.out_dir, "lora", size, cases, *steps)

    dtype = models.default_dtype(args.device, meta)
    pipe, base, below = artefacts.load_base(args.model, args.on, dtype)  # below: in its weights
    added, teachers = imported or artefacts.Erasure(), []
    if args.compose:
        added, teachers = compose.teachers(args, pipe)
    workers.wait_for_everyone()  # all have looked at out_dir
    log = artefacts.open_folder(args.out_dir, config, first_step + healed[0]) if is_first else None

    # the text encoders encode all there is, and leave before the transformer comes
    held_out = rows.held_out()
    retain = [row["prompt"] for row in rows.retain]
    pairs = promptfiles.as_pairs(rows.pairs)
    tests = promptfiles.as_pairs(held_out["concept prompts"])
    tests += [(row["prompt"], row["prompt"]) for row in held_out["other prompts"]]
    texts = [text for pair in pairs + tests for text in pair] + retain
    remember_prompts(pipe)
    models.encode_all(pipe, args.device, texts, call)
    lowmem.place(pipe, args.device, args.quantize, args.offload, args.compile)

    learning = flags((*LEARNING, "micro_batch", "checkpoint")) | dict(call=call)
    of_mask = flags((*DEFAULTS, "modules", "steps", "seed"))
    of_mask |= dict(first_step=first_step, state=state, on_step=log)
    mask = train(pipe, pairs, retain, **of_mask | learning)
    ours = artefacts.joined(artefacts.Erasure(mask, args.modules), added)
    if args.heal and args.reopen:
        closable = gate_sites(pipe.transformer, ours.modules)
        how = dict(call=call, micro_batch=args.micro_batch, checkpoint=args.checkpoint)
        harm = harm_of_closing(pipe, retain, closable, seed=args.seed, **how)
        ours = ours._replace(mask=reopened(ours.mask, harm, args.reopen))
    erasure = artefacts.joined(ours, below)
    mask = erasure.mask

    # the LoRA. differs from paper
    masked = partial(gated, pipe.transformer, mask)
    of_fit = dict(strength=args.refit, rank=args.refit_rank, seed=args.seed)
    of_fit |= dict(retain=retain, batch=args.micro_batch)
    fit = partial(refit, pipe.transformer, partial(rollout, pipe, **call), masked, **of_fit)
    is_fitted = args.heal and args.refit and (is_first or args.heal_steps)
    lora = fit(teachers) if is_fitted and teachers else {}
    if args.heal and args.heal_steps:
        learn, latest = learner(pipe, pairs, retain, error_of=heal.path_error, **learning)
        of_lora = dict(steps=args.heal_steps, lr=args.heal_lr, rank=args.heal_rank, seed=args.seed)
        lora = heal.tune(pipe, lora, partial(learn, gates=mask), latest, *healed, log, **of_lora)
    if not is_first:
        return
    if is_fitted and (args.heal_steps or not teachers):  # else it comes from a fit already
        lora = fit([Teacher([prompt for prompt, _ in pairs], masked, lora)])

    # what it did, on prompts and noises that training never had; folding it only rounds
    errors = {}
    sheet = []
    noises = range(HELD_OUT_NOISE, HELD_OUT_NOISE + len(tests))
    how = dict(call=call, micro_batch=args.micro_batch)
    for name, gates, change in (("before", {}, {}), ("erased", mask, lora)):
        with torch.no_grad():
            errors[name] = case_errors(pipe, tests, noises, gates, None, change, **how)
        with heal.adapted(pipe.transformer, change), gated(pipe.transformer, gates):
            sheet += pictures.draw_rows(pipe, name, held_out, call, args.micro_batch)
    pictures.save_preview(args.out_dir / "preview.png", sorted(sheet, key=lambda row: row[0]))
    pictures.save_curves(args.out_dir / "curves.png", artefacts.read_metrics(args.out_dir))
    line = pictures.summary(mask, errors, held_out, time.time() - began, args.device)
    of_run = dict(pairs=len(pairs), retain=len(retain), held_out=len(tests), heal=args.heal)
    pictures.save_card(args.out_dir, line, base, config | of_run)
    erasure = erasure._replace(lora=heal.joined(erasure.lora, lora))
    artefacts.save(args.out_dir, config, args.model, kind, base, erasure)  # finished
    left = pictures.not_erased(errors, held_out)
    print(f"{line}\n{artefacts.last_words(args.out_dir, args.steps, args.heal, left)}")


def main(argv=None) -> int:
    return exit_code("erase.py", lambda: run(parse_args(argv, __doc__)))


if __name__ == "__main__":
    sys.exit(main())
