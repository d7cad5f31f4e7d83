"""The flags of erase.py and their defaults: the paper's, and what measured best."""

import artefacts
import compose
import importmask
import lowmem
import models
import promptfiles
from safely import Parser, UserError, number
from sites import MODULES

# Flags by preset: the paper's table 6, and what measured best on tiny/flux; then kind and help.
PRESETS = dict(paper="paper (--preset tiny keeps far more other things: RESULTS.md)", tiny="tiny")
PRESETS["official"] = "official (the authors' code, whose values are not the paper's)"
RELAXATIONS = ("sigmoid", "hard_concrete", "straight_through")
NOT_NEGATIVE, COUNT, SHARE = number(float, 0), number(int, 1), number(float, 0, 1)
DEFAULTS = dict(
    gate=("hard_concrete", "straight_through", str, "relaxation of the gates"),
    temperature=(2 / 3, 2 / 3, number(float, 0.01, 1.25), "of hard_concrete"),
    noise=(1.0, 1.0, SHARE, "of hard_concrete: how much of its noise's range is drawn from"),
    lr_ffn=(0.5, 0.25, NOT_NEGATIVE, "learning rate of all gates but norm's"),
    lr_norm=(0.5, 0.25, NOT_NEGATIVE, "learning rate of the norm gates"),
    lr_decay=(0, 1, number(int, 0, 1), "1: the learning rates fall linearly to 0"),
    weight_decay=(0.01, 0.0, SHARE, "AdamW's, on the logits"),
    adam_eps=(1e-8, 1e-4, number(float, 1e-20), "AdamW's: gates with gradients far below it stay"),
    beta=(0.01, 3.0, NOT_NEGATIVE, "weight of preserve_loss"),
    batch=(4, 4, COUNT, "concept prompts a step"),
    retain_batch=(4, 8, COUNT, "retain prompts a step"),
    hard=(0.0, 0.75, SHARE, "share of a step's prompts drawn by their latest error"),
    max_closed=(1.0, 0.01, SHARE, "share of the gates that may close"),
    harm=(0.0, 1.0, NOT_NEGATIVE, "times beta: initial weight of what closing each gate does"),
)
# Where the authors' released code, as it is run, has other values than table 6.
OFFICIAL = dict(beta=0.1, temperature=0.83, noise=0.5, batch=2, retain_batch=2)
# differs from paper: what follows the mask, in the same columns.
HEALING = dict(
    heal=(0, 1, number(int, 0, 1), "1: then a LoRA, as the next six say"),
    heal_steps=(200, 200, number(int, 0), "optimiser steps of the LoRA"),
    heal_lr=(2e-3, 2e-3, NOT_NEGATIVE, "AdamW's learning rate there, which falls to 0"),
    heal_rank=(16, 16, COUNT, "the LoRA's rank"),
    reopen=(0, 0, SHARE, "before it: share of the closed gates to open, the most harmful ones"),
    refit=(0.01, 0.01, NOT_NEGATIVE, "strength of the ridge regression after it; 0: none"),
    refit_rank=(64, 64, COUNT, "the LoRA's rank after that"),
)
STEPS = dict(paper=400, official=400, tiny=200)  # of the mask
# What several concepts in one run get more of, of the preset tiny; a style, of heal_steps.
GROWING = dict(
    steps=lambda steps, concepts, styles: min(400, steps * concepts),
    max_closed=lambda share, concepts, styles: min(0.05, share * concepts),
    heal_steps=lambda steps, concepts, styles: round(steps * (2 if styles else 1) * concepts**0.5),
    refit_rank=lambda rank, concepts, styles: rank * concepts,
)
LEARNING = ("beta", "batch", "retain_batch", "hard")  # of the mask and of the LoRA


def shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def check_used(args, given: list[str]) -> None:
    """Raises UserError for a flag of DEFAULTS or HEALING that would change nothing."""
    other, used = "", (*DEFAULTS, *HEALING)
    if args.import_mask:
        other, used = "--import_mask", ()
    elif args.compose:
        other, used = "--compose", (*HEALING, *(LEARNING if args.heal_steps else ()))
    for name in given:
        if name not in used:
            raise UserError(f"--{name}: does not go with {other}")
        if name in HEALING and not args.heal:
            raise UserError(f"--{name}: changes nothing without --heal 1")


def parse_args(argv=None, text: str | None = None):
    """The flags of erase.py, with all defaults filled in. Exits with code 2 where one is wrong."""
    parser = Parser(text)
    add = parser.add_argument
    promptfiles.add_flags(parser)
    compose.add_flags(parser)
    importmask.add_flags(parser)
    models.add_flags(parser)
    add("--preset", choices=PRESETS, help="column of defaults (embedded models: tiny, else paper)")
    steps = ", ".join(f"{preset}: {count}" for preset, count in STEPS.items())
    add("--steps", type=COUNT, help=f"optimiser steps of the mask ({steps})")
    for name, (paper, tiny, kind, help) in (DEFAULTS | HEALING).items():
        choices = RELAXATIONS if name == "gate" else None
        columns = dict(paper=shown(paper), tiny=shown(tiny))
        columns |= {"official": shown(OFFICIAL[name])} if name in OFFICIAL else {}
        defaults = ", ".join(f"{preset}: {value}" for preset, value in columns.items())
        if len(set(columns.values())) == 1:
            defaults = columns["paper"]
        add(f"--{name}", type=kind, choices=choices, help=f"{help} ({defaults})")
    add("--modules", nargs="+", choices=MODULES, help="what gets gates (ffn norm)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0)
    lowmem.add_flags(parser)
    artefacts.add_flags(parser)
    add("--dry_run", action="store_true", help="print the configuration and the plan, and stop")
    args = parser.parse_args(argv)
    given = [name for name in DEFAULTS if getattr(args, name) is not None]
    given += [name for name in HEALING if getattr(args, name)]
    if args.compose:
        compose.fill(args)
    elif args.restore:
        parser.error("--restore: goes with --compose")
    elif not args.concept:
        parser.error("the following arguments are required: --concept")
    if args.import_mask:
        importmask.fill(args)
    args.modules = args.modules or ["ffn", "norm"]

    args.device = args.device or models.default_device()
    args.model, args.on = artefacts.base_of(args.model, args.device)
    is_tiny = models.is_embedded(args.model)
    args.preset = args.preset or ("tiny" if is_tiny else "paper")
    is_ours = args.preset == "tiny"
    values = {name: columns[is_ours] for name, columns in (DEFAULTS | HEALING).items()}
    values["steps"] = STEPS[args.preset]
    if args.preset == "official":
        values |= OFFICIAL
    vocabulary = promptfiles.known_words(models.prompt_folder(args.model))
    kinds = promptfiles.kinds_of(args.concept, args.kind, vocabulary)
    styles = [promptfiles.is_style(name, kinds[name], vocabulary) for name in args.concept]
    for name, value in values.items():
        if getattr(args, name) is None:
            grow = GROWING.get(name) if is_ours else None
            setattr(args, name, grow(value, len(styles), sum(styles)) if grow else value)
    if not (is_ours or args.compose):
        args.num_prompts = args.num_prompts or 20  # as in the paper
    args.heal = int(args.heal and (args.heal_steps > 0 or args.refit > 0))
    check_used(args, given)
    args.checkpoint = args.checkpoint or ("none" if is_tiny and not args.offload else "auto")
    args.out_dir = args.out_dir or artefacts.default_folder(args.concept)
    return args
