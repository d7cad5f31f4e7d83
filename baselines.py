"""Other people's erasure methods on the same FLUX.1, prompt files and seeds (methods.py has them).

    python baselines.py --method esd --concept gun --out_dir baselines/esd_gun
    python baselines.py --method esd --concept gun --steps 150 --batch_size 8 --retain 1
    python evaluate.py --export_cases cases.json --concept gun
    python baselines.py --method sld --concept gun --cases cases.json --out_dir baselines/sld_gun

Defaults are each method's official settings; --retain, which no paper has, is ours. evaluate.py and
attacks.py take what comes out: edited.safetensors, the changed weights alone, or a LoRA,
pytorch_lora_weights.safetensors. Methods that act while sampling give pictures for evaluate.py.
config.json has all flags, seconds and peak memory. Training takes one pass with gradients in memory
and, for each number learnt, 16 bytes.
"""

import itertools
import json
import math
import re
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import models  # first: it keeps transformers quiet

# isort: split
import torch
from diffusers import FluxPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import artefacts
import methods
import promptfiles
from opened import Model
from safely import (
    Parser,
    UserError,
    check_regular,
    claim,
    exit_code,
    first_line,
    number,
    visible,
    write_atomically,
)

try:
    import resource
except ImportError:  # Windows: without the memory's peak
    resource = None

LAYERS = dict(  # what is trained, by the names of linear layers
    attention=r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",  # ESD's esd-x
    kv=r".*\.(to_[kv]|add_[kv]_proj)",  # esd-x-strict; CA
    text_qk=r"transformer_blocks\..*\.add_[qk]_proj",  # of the text, in double blocks
    double_qk=r"transformer_blocks\..*\.(to_[qk]|add_[qk]_proj)",
)
TRAINED = dict(batch_size=1, eta=1.0, retain=0.0, weight_decay=0.0)
# Each method's flags and official values.
METHODS = dict(
    uce=dict(lam=0.5, retain=0.0),
    uce_context=dict(lam=0.5, retain=1.0),
    esd=TRAINED | dict(steps=1400, lr=1e-4, layers="attention", anchor="empty"),
    ca=dict(steps=100, lr=1e-5, batch_size=8, weight_decay=0.01, layers="kv", retain=0.0),
    eap=TRAINED | dict(steps=2000, lr=1e-5, layers="attention", anchor="empty"),
    eraseanything=TRAINED
    | dict(steps=200, lr=1e-3, rank=8, weight_decay=1e-5, layers="text_qk", anchor="empty"),
    gem=TRAINED | dict(steps=26, lr=1e-3, rank=16, weight_decay=0.01, layers="double_qk"),
    sld=dict(eta=1.0, batch_size=16),
    negative=dict(eta=1.0, batch_size=16),
    flowedit=dict(steps=28, batch_size=16),
)
PICTURES = ("sld", "negative", "flowedit")  # what they give
UNREAD = dict.fromkeys(("uce", *PICTURES), ("neutral", "prompts", "num_prompts"))
FLAGS = dict(
    steps=(number(int, 1), "optimiser steps; flowedit: its sampling steps"),
    lr=(number(float, 0), "learning rate"),
    batch_size=(number(int, 1), "prompts a step; pictures drawn at a time"),
    eta=(number(float, 0), "strength of what pushes off the concept"),
    retain=(number(float, 0), "weight of what holds the retain prompts (ours)"),
    weight_decay=(number(float, 0, 1), "AdamW's; 0 is Adam"),
    layers=(str, "layers that learn", LAYERS),
    anchor=(str, "where the concept goes: the empty or the neutral prompt", ("empty", "neutral")),
    rank=(number(int, 1), "the LoRA's rank"),
    lam=(number(float, 1e-9), "lambda, weight of the old weights"),
)


def fresh_leaves(transformer, flags) -> dict:
    """The weights and biases of the layers, in fp32, or a LoRA on them that changes nothing yet."""
    generator = torch.Generator().manual_seed(flags.seed)
    leaves = {}
    for name, layer in transformer.named_modules():
        if not (isinstance(layer, torch.nn.Linear) and re.fullmatch(LAYERS[flags.layers], name)):
            continue
        if flags.rank:
            a = torch.randn(flags.rank, layer.in_features, generator=generator)
            b = torch.zeros(layer.out_features, flags.rank)
            leaves[f"{name}.lora_A.weight"] = a / layer.in_features**0.5
            leaves[f"{name}.lora_B.weight"] = b
        else:
            leaves |= {f"{name}.{key}": p.float().clone() for key, p in layer.named_parameters()}
    device = transformer.device
    return {name: x.detach().to(device).requires_grad_() for name, x in leaves.items()}


def train(lab: methods.Lab, file: Path) -> None:
    """Learns the leaves by AdamW; goes on from `file`, where every --save_every steps its state
    goes. Raises RuntimeError for a loss that is not finite."""
    flags = lab.flags
    groups = [dict(params=list(lab.leaves.values())), dict(params=[lab.adversary], lr=1e-3)]
    optimizer = torch.optim.AdamW(groups, lr=flags.lr, weight_decay=flags.weight_decay)
    learnt = lab.leaves | dict(adversary=lab.adversary)
    first = load_state(file, learnt, optimizer) if flags.resume else 0
    for step in (bar := tqdm(range(first, flags.steps), flags.method, flags.steps, initial=first)):
        optimizer.zero_grad()
        total = 0.0
        losses = getattr(methods, flags.method)(lab, step)
        if flags.retain:
            losses = itertools.chain(losses, methods.kept(lab, step))
        for loss in losses:
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise RuntimeError(f"step {step}: the loss is {total}; try a smaller --lr")
        optimizer.step()
        bar.set_postfix_str(f"loss {total:.4f}")
        if (step + 1) % flags.save_every == 0:
            save_state(file, step + 1, learnt, optimizer)


def save_state(file: Path, step: int, learnt: dict, optimizer) -> None:
    tensors = {}
    for name, leaf in learnt.items():
        state = optimizer.state[leaf] | dict(leaf=leaf.detach())
        tensors |= {f"{key} {name}": x.contiguous() for key, x in state.items()}
    write_atomically(file, lambda path: save_file(tensors, path, dict(step=str(step))))


def load_state(file: Path, learnt: dict, optimizer) -> int:
    """The step to go on from, 0 without a file. Raises UserError for a damaged one."""
    if not file.exists():
        return 0
    check_regular(file, "--resume")
    try:
        with safe_open(file, "pt", device=str(next(iter(learnt.values())).device)) as f:
            for name, leaf in learnt.items():
                leaf.data.copy_(f.get_tensor(f"leaf {name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key} {name}" in f.keys():
                        optimizer.state[leaf][key] = f.get_tensor(f"{key} {name}")
            return int(f.metadata()["step"])
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {file} is damaged ({first_line(error)})") from None


def draw(lab: methods.Lab, cases: list, out_dir: Path) -> None:
    """The pictures that are not there yet, in whole batches, so that each has the same bits."""
    method = getattr(methods, lab.flags.method)
    size = lab.flags.batch_size
    for start in tqdm(range(0, len(cases), size), lab.flags.method):
        part = cases[start : start + size]
        files = [out_dir / case["file"] for case in part]
        if all(file.exists() for file in files):
            continue
        with torch.no_grad():
            pictures = lab.model.show(method(lab, part))
        for file, picture in zip(files, pictures, strict=True):
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, lambda path: picture.save(path, format="png"))


def read_cases(file: Path, concepts: list, model: str) -> dict:
    """What `evaluate.py --export_cases` wrote. Raises UserError unless it is of these."""
    check_regular(file, "--cases")
    listing = artefacts.read_json(file)
    rows = listing.get("cases")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--cases: {file} is no listing of evaluate.py --export_cases")
    for row in rows:
        row = row if isinstance(row, dict) else {}
        is_named = re.fullmatch(r"\w+/\w+\.png", str(row.get("file")))
        is_whole = type(row.get("seed")) is int and isinstance(row.get("prompt"), str)
        if not (is_named and is_whole):
            raise UserError(f"--cases: {file} has a case without file, prompt or seed: {row}")
        if not isinstance(row.setdefault("neutral", None), str | None):
            raise UserError(f"--cases: {file} has a case whose neutral is no text: {row}")
    models.check_call(listing.get("call"), f"--cases: {file}: call")
    wanted = dict(concept=concepts, model=models.portable_name(models.address(model)[0]))
    for key, value in wanted.items():
        found = listing.get(key)
        if (found.partition("@")[0] if key == "model" and found else found) != value:
            raise UserError(f"--cases: {file} is of {key} {found}, not {value}")
    return listing


def open_folder(out_dir: Path, config: dict, resume: bool) -> None:
    """Claims a new or empty folder, or that of the same unfinished run. Raises UserError."""
    artefacts.check_writable(out_dir)
    if out_dir.is_dir() and visible(out_dir) and not resume:
        raise UserError(f"--out_dir: {out_dir} is not empty; choose another, or --resume its run")
    if resume:
        before = artefacts.read_config(out_dir)
        if "flags" not in before or "seconds" in before:
            raise UserError(f"--resume: no unfinished run in {out_dir}")
        of_run = ("call", "rows", "versions")
        known = before["flags"] | {key: before.get(key) for key in of_run}
        for key, value in (config["flags"] | {key: config[key] for key in of_run}).items():
            found = known.get(key)
            if found != value and key == "rows":
                raise UserError("--resume: the prompt files have changed since the run began")
            if found != value:
                raise UserError(f"--resume: {key} was {found}, now {value}; repeat the command")
    claim(out_dir)


def parse_args(argv=None):
    """The flags, the method's defaults filled in. Raises UserError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="whose")
    add("--concept", nargs="+", required=True, help="what to erase, as in erase.py")
    promptfiles.add_kind(parser)
    add("--neutral", help="what templates have instead of the concept, as in erase.py")
    add("--prompts", type=Path, help="CSV of prompt pairs, as in erase.py")
    add("--num_prompts", type=number(int, 1), help="training pairs per concept, as in erase.py")
    add("--cases", type=Path, metavar="JSON", help=f"of {', '.join(PICTURES)}: what to draw")
    for name, (kind, help, *choices) in FLAGS.items():
        known = [f"{method} {own[name]}" for method, own in METHODS.items() if name in own]
        choices = choices[0] if choices else None
        add(f"--{name}", type=kind, choices=choices, help=f"{help} ({', '.join(known)})")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0)
    add("--save_every", type=number(int, 1), default=50, help="steps between states (%(default)s)")
    add("--resume", action="store_true", help="go on with the killed run of the same command")
    add("--out_dir", type=Path, help="(baselines/<method>_<concept>)")
    add("--dry_run", action="store_true", help="print the configuration, and stop")
    models.add_flags(parser)
    args = parser.parse_args(argv)
    own = METHODS[args.method]
    for name in FLAGS:
        if name not in own and getattr(args, name) is not None:
            raise UserError(f"--{name}: {args.method} has none")
        if getattr(args, name) is None:
            setattr(args, name, own.get(name))
    if (args.method in PICTURES) != bool(args.cases):
        what = "is for" if args.cases else "what evaluate.py --export_cases writes, needed by"
        raise UserError(f"--cases: {what} {', '.join(PICTURES)}")
    for name in UNREAD.get(args.method, ()):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: {args.method} does not read it")
    if args.anchor == "empty" and args.neutral is not None:
        raise UserError(f"--neutral: {args.method} reads it with --anchor neutral alone")
    given = [flag for flag in models.CALL_FLAGS if getattr(args, flag) is not None]
    if args.cases and given:
        raise UserError(f"--{given[0]}: does not go with --cases, which says it")
    args.device = args.device or models.default_device()
    args.model = args.model or models.default_model(args.device)
    name = artefacts.default_folder(args.concept).name
    args.out_dir = args.out_dir or Path("baselines") / f"{args.method}_{name}"
    return args


def run(args) -> None:
    began = time.time()
    models.check_device(args.device)
    folder = models.prompt_folder(args.model)
    names = ("concept", "kind", "neutral", "prompts", "num_prompts")
    rows = promptfiles.training_rows(folder, **{name: vars(args)[name] for name in names})
    args.model = artefacts.pinned_model(args.model, args.out_dir, args.resume)
    kind = models.pipeline_class(args.model)
    if kind is not FluxPipeline:
        raise UserError(
            f"--model: {args.model} is a {kind.__name__}; baselines need a FluxPipeline"
        )
    given = {name: vars(args)[name] for name in models.CALL_FLAGS}
    call = models.sampler_call(args.model, kind, **given)
    listing = read_cases(args.cases, args.concept, args.model) if args.cases else {}
    call |= listing.get("call", {})
    if call.get("true_cfg_scale", 1) > 1:
        flag = "--cases" if args.cases else "--true_cfg_scale"
        raise UserError(f"{flag}: baselines are trained and drawn without true_cfg_scale")
    left_out = (*artefacts.NOT_RECORDED, *models.CALL_FLAGS)
    flags = {key: value for key, value in vars(args).items() if key not in left_out}
    flags = {key: str(x) if isinstance(x, Path) else x for key, x in flags.items()}
    flags["model"] = models.portable_name(args.model)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    # concept stays inside: at the top it would say that erase.py wrote the folder
    model, revision = models.address(flags["model"])
    config = dict(baseline=args.method, model=model, revision=revision, flags=flags, call=call)
    config |= dict(rows=promptfiles.digest(rows), versions=versions)
    print(f"{args.method}: {len(rows.pairs)} concept pairs, {len(rows.retain)} retain prompts")
    if args.dry_run:
        print(json.dumps(config, indent=1))
        return
    open_folder(args.out_dir, config, args.resume)
    drawn = artefacts.read_json(args.out_dir / "cases.json")
    if drawn and drawn != listing:
        raise UserError(f"--resume: {args.out_dir} has pictures of other cases than {args.cases}")
    artefacts.write_json(args.out_dir / "config.json", config)

    pipe = models.load_pipeline(args.model, args.device)
    models.remember_prompts(pipe)
    lab = make_lab(Model(pipe, {}, call), args, rows, folder)
    if args.cases:
        artefacts.write_json(args.out_dir / "cases.json", listing)
        draw(lab, listing["cases"], args.out_dir)
    else:
        state = args.out_dir / "state.safetensors"
        train(lab, state) if args.steps else getattr(methods, args.method)(lab)
        save(lab, args.out_dir)
        state.unlink(missing_ok=True)  # evaluate.py takes a folder with one file
    seconds = round(time.time() - began, 1)
    used = dict(seconds=None if args.resume else seconds)  # of a resumed run nobody counted all
    if resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, of macOS bytes
        used["peak_ram_gib"] = round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)
    if torch.device(args.device).type == "cuda":
        used["peak_vram_gib"] = round(torch.cuda.max_memory_allocated(args.device) / 2**30, 2)
    artefacts.write_json(args.out_dir / "config.json", config | used)
    evaluation = ["python", "evaluate.py", "--compare", str(args.out_dir), "--concept"]
    evaluation += [*args.concept, "--model", flags["model"]]
    for name in ("kind", *models.CALL_FLAGS):
        if vars(args)[name] is not None:
            evaluation += [f"--{name}", str(vars(args)[name])]
    print(f"wrote {args.out_dir}/: {artefacts.listing(args.out_dir)}; {used}")
    print(f"next: {shlex.join(evaluation)}")


def make_lab(model: Model, args, rows, folder: Path) -> methods.Lab:
    vocabulary = promptfiles.known_words(folder)
    kinds = promptfiles.kinds_of(args.concept, args.kind, vocabulary)
    kinds = {name: promptfiles.kind_of(name, kinds[name], vocabulary) for name in args.concept}
    words = {}
    for word, about in vocabulary.items():
        if not promptfiles.names_any(args.concept, word):
            words[word] = about
    leaves = fresh_leaves(model.pipe.transformer, args) if args.layers else {}
    adversary = torch.zeros(len(words), device=model.device, requires_grad=True)
    pairs = promptfiles.as_pairs(rows.pairs)
    retain = [row["prompt"] for row in rows.retain]
    return methods.Lab(model, args, pairs, retain, kinds, words, leaves, adversary)


def save(lab: methods.Lab, out_dir: Path) -> None:
    """edited.safetensors, in the model's dtype, or the LoRA in diffusers' names, fp32."""
    name, prefix, dtype = "edited.safetensors", "", lab.model.pipe.transformer.dtype
    if lab.flags.rank:
        name, prefix, dtype = "pytorch_lora_weights.safetensors", "transformer.", torch.float32
    tensors = {}
    for key, leaf in lab.leaves.items():
        tensors[prefix + key] = leaf.detach().to("cpu", dtype).contiguous()
    write_atomically(out_dir / name, lambda path: save_file(tensors, path))


def main(argv=None) -> int:
    return exit_code("baselines.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
