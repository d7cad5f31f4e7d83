"""erase.py and what it stands on. Oracles: plain autograd and finite differences, weights zeroed by
hand, uninterrupted runs. Every other family: test_families.py."""

import ast
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import diffusers
import httpx2
import huggingface_hub.errors as hub_errors
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import artefacts
import cases
import erase
import families
import models
import pictures
import promptfiles
import report
from artefacts import listing, load_mask, read_metrics
from cases import read_subject
from columns import soft_gates
from conftest import FEW_RETAIN, PLACE, QUICK, TWO_PROCESSES, command, run
from costs import anonymous_peak
from safely import UserError, write_text
from sites import MODULES, gate_sites
from tables import MANY

CALL = models.CALLS["tiny/flux"]
SETTINGS = {flag: columns[1] for flag, columns in erase.DEFAULTS.items()}  # the preset "tiny"
SETTINGS |= dict(modules=("ffn", "norm"), checkpoint="none")
SMALL = CALL | dict(height=32, width=32, num_inference_steps=2)
RETAIN = ["an apple on a red background", "a dog"]
FILES = "README.md config.json curves.png mask.safetensors metrics.jsonl preview.png "
FILES += "state.safetensors transformer"
TINY_PROMPTS = models.HERE / "prompts/tiny"
HEADER = "case_number,prompt,neutral_prompt,evaluation_seed,split\n"


def final(pipe, call, gates=None):
    with torch.no_grad(), erase.gated(pipe.transformer, gates or {}):
        return erase.rollout(pipe, RETAIN, [1, 2], **call)


def random_mask(transformer, modules=MODULES):
    generator = torch.Generator().manual_seed(2)
    mask = {}
    for name, site in gate_sites(transformer, modules).items():
        mask[name] = (torch.rand(site.units, generator=generator) > 0.3).float()
    return mask


def losses_in(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


@pytest.mark.parametrize("gate", erase.START)
def test_relaxations(gate):
    """At its start a gate is 1 to the last bit, but with their noise a fifth of the hard-concrete
    ones are less; these but the zeros, and all of other kinds, get a gradient; gates lie in [0, 1]
    and rise with the logit; one near 0 gets a gradient."""
    start = torch.full((100_000,), erase.START[gate], requires_grad=True)
    assert (erase.relax(start, gate, 0.0) == 1).all()
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    noisy = erase.relax(start, gate, 0.0, uniform.clamp(1e-6, 1 - 1e-6))
    noisy.sum().backward()
    share = (start.grad != 0).float().mean()
    less = (noisy < 1).float().mean()
    assert 0.19 < less < 0.205 if gate == "hard_concrete" else less == 0
    assert 0.15 < share < 0.22 if gate == "hard_concrete" else share == 1
    logits = torch.linspace(-6, 6, 25).requires_grad_()
    gates = erase.relax(logits, gate, 0.0, torch.full((25,), 0.5))
    gates.sum().backward()
    assert 0 <= gates.min() and gates.max() <= 1
    assert (gates.diff() >= 0).all() and logits.grad[12] > 0


def test_which_gates_close_and_which_cases_come():
    """The lowest logits close, never above 0 and never more than the share; training's forward
    gates are just these. With hard 1, cases are drawn in proportion to their latest error, those
    never seen like the worst; with 0, evenly."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for max_closed in (0, 0.03, 0.5, 1):
        threshold = erase.closing_threshold(logits, max_closed)
        gates = erase.relax(logits, "straight_through", threshold)
        wanted = min(int(max_closed * 1000), int((logits <= 0).sum()))
        assert (gates == 0).sum() == wanted and not gates[logits.argsort()[:wanted]].any()
    latest = torch.tensor([1.0, 0, 0, 0, 0.5, 0.5, 0, math.inf])
    counts = []
    for hard in (1.0, 0.0):
        drawn = erase.choose(random.Random(0), range(4), 600, hard, latest)
        drawn += erase.choose(random.Random(0), range(4, 8), 600, hard, latest)
        counts.append(torch.bincount(torch.tensor(drawn), minlength=8).tolist())
    found, even = counts
    assert found[0] > 590 and found[6] < 10 and all(150 < found[i] < 250 for i in (4, 5, 7)), found
    assert all(100 < count < 200 for count in even), even


def test_harm_is_what_closing_a_gate_a_little_does(pipe, monkeypatch):
    """The estimated harm of the gates that matter most, of every kind, is that of finite
    differences of the final latents, within a quarter."""
    monkeypatch.setattr(random.Random, "randrange", lambda *limits: 0)  # one noise for all
    sites = gate_sites(pipe.transformer, MODULES)
    harm = erase.harm_of_closing(pipe, RETAIN[:1], sites, call=SMALL, draws=320)
    case = [(RETAIN[0], RETAIN[0])]
    for module in MODULES:
        name = next(iter(gate_sites(pipe.transformer, (module,))))
        gates = torch.ones(sites[name].units)
        gates[harm[name].argmax()] -= 0.02
        how = dict(gates={name: gates}, weights=None, call=SMALL)
        with torch.no_grad():
            exact = erase.case_errors(pipe, case, [erase.TRAIN_NOISE], **how).item() / 0.02**2
        assert abs(harm[name].max().item() / exact - 1) < 0.25, (name, harm[name].max(), exact)


def test_processes_share_the_draws_of_harm(pipe, monkeypatch):
    """What two or three processes find of 5 draws adds up to what one finds, each drawing only its
    share of the pictures."""
    sites = gate_sites(pipe.transformer)
    drawn = []
    rollout_path = erase.rollout_path

    def counted(pipe, prompts, *args, **call):
        drawn.append(len(prompts))
        return rollout_path(pipe, prompts, *args, **call)

    def harm(rank, count):
        monkeypatch.setattr(erase, "processes", lambda: (rank, count))
        found = erase.harm_of_closing(pipe, RETAIN, sites, call=SMALL, draws=5, micro_batch=2)
        return torch.cat(list(found.values()))

    monkeypatch.setattr(erase, "rollout_path", counted)
    monkeypatch.setattr(erase.dist, "all_reduce", lambda harm: None)
    one = harm(0, 1)
    for count in (2, 3):
        drawn.clear()
        assert torch.allclose(sum(harm(rank, count) for rank in range(count)), one, rtol=1e-3)
        assert sum(drawn) == 5


def test_hooks_and_fold_by_hand():
    """Whatever is raised inside `gated`, also by gates that do not fit, the base is back. A folded
    FFN neuron keeps no incoming row, bias or outgoing column, an open one all three; likewise an
    output of AdaLN. Closing all norm gates of a block equals a zero norm1_context.linear."""
    pipe, call = families.flux_dev()
    transformer = pipe.transformer
    base = final(pipe, call)
    mask = random_mask(transformer, ("ffn", "norm"))
    with pytest.raises(ZeroDivisionError), erase.gated(transformer, random_mask(transformer)):
        1 / 0
    for foreign in ("transformer_blocks.1.ff.net.2", "no.such.layer"):
        with pytest.raises(ValueError, match=f"{foreign}: 3 gates do not fit"):
            final(pipe, call, mask | {foreign: torch.ones(3)})
    assert torch.equal(final(pipe, call), base)

    erase.fold(transformer, mask)
    for name, gates in mask.items():
        layer = transformer.get_submodule(name)
        sides = []
        if ".ff" in name:
            sides = [layer.weight.T]
            layer = transformer.get_submodule(name.removesuffix("2") + "0.proj")
        for weight in (*sides, layer.weight, layer.bias[:, None]):
            assert torch.equal(weight.any(1).float(), gates), name

    linear = transformer.transformer_blocks[0].norm1_context.linear
    closed = {"transformer_blocks.0.norm1_context.linear": torch.zeros(linear.out_features)}
    hooked = final(pipe, call, closed)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(final(pipe, call), hooked)


def test_where_a_style_enters(pipe):
    """Why --modules kv: with the text's keys and values of the first block alone taken from the
    neutral prompt, most of what a style does is gone, and nothing of a gun."""
    attention = [block.attn for block in pipe.transformer.transformer_blocks]
    layers = [(attn.add_k_proj, attn.add_v_proj) for attn in attention]

    def swap(layer, inputs, output):
        return output[:16].repeat(2, 1, 1)

    stays = {}  # the share of the error to the neutral picture that stays, for each block
    for concept in ("sepia", "sketch", "neon", "mosaic", "gun"):
        rows = promptfiles.read_rows(TINY_PROMPTS / f"{concept}.csv", "")
        rows = promptfiles.of_split(rows, "test")[:16]
        prompts = [row[column] for column in ("neutral_prompt", "prompt") for row in rows]
        seeds = [row["evaluation_seed"] for row in rows] * 2
        errors = []
        for swapped in ((), *layers):
            with torch.no_grad(), ExitStack() as hooks:
                for layer in swapped:
                    hooks.enter_context(layer.register_forward_hook(swap))
                latents = erase.rollout(pipe, prompts, seeds, **CALL)
            errors.append(erase.squared_error(latents[16:], latents[:16]).sum().item())
        stays[concept] = [round(error / errors[0], 2) for error in errors[1:]]
    print(stays)
    assert stays.pop("gun")[0] > 0.9
    assert all(first < 0.65 and min(others) > 0.85 for first, *others in stays.values()), stays


def test_sampler_arguments_and_prompts():
    """The model's own card and over it the flags; what its pipeline does not take and what is
    missing is refused by name. A text encoder sees each prompt once, and then it may go."""
    flux, klein = diffusers.FluxPipeline, diffusers.Flux2KleinPipeline
    assert models.sampler_call("tiny/flux", flux, height=32)["height"] == 32
    assert models.sampler_call(models.SCHNELL, flux)["width"] == 512
    with pytest.raises(UserError, match="--true_cfg_scale: Flux2KleinPipeline takes none"):
        models.sampler_call("a/b", klein, true_cfg_scale=2.0)
    with pytest.raises(UserError, match="--height: needed, for a/b is not in models.py's table"):
        models.sampler_call("a/b", flux, num_inference_steps=4, width=64)
    pipe, call = families.flux_dev()
    models.remember_prompts(pipe)
    seen = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: seen.append(1))
    models.encode_all(pipe, "cpu", [*RETAIN, *RETAIN], call)
    assert len(seen) == 2 and pipe.text_encoder is None and pipe.text_encoder_2 is None
    assert final(pipe, call).isfinite().all()
    with pytest.raises(Exception, match="NoneType"):
        erase.rollout(pipe, ["a new one"], [1], **call)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache with two commits of a/b, which main moves between: hub(commit)."""
    cache = tmp_path / "hub"
    repository = cache / "models--a--b"
    for commit in HUB_COMMITS:
        shutil.copytree(models.TINY, repository / "snapshots" / commit, copy_function=os.symlink)
    file = repository / "snapshots" / HUB_COMMITS[1] / SAVED
    weights = {name: weight * 1.01 for name, weight in load_file(file).items()}
    file.unlink()
    save_file(weights, file)
    (repository / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return lambda commit: (repository / "refs/main").write_text(commit)


HUB_COMMITS = ("0" * 40, "1" * 40)
SAVED = "transformer/diffusion_pytorch_model.safetensors"


def test_revision_is_found_once(hub, tmp_path, capsys):
    """A run on a hub's model keeps the commit that main is at its start, when main moves: what it
    wrote, a resumed run and an evaluation are of it; id@revision asks for one."""
    hub(HUB_COMMITS[0])
    out = tmp_path / "out"
    files = dict(prompts="0,a gun,nothing,1,train", retain="0,a cat,,1,train")
    for name, row in files.items():
        (tmp_path / name).write_text(f"{HEADER}{row}\n")
    line = f"--model a/b --prompts {tmp_path}/prompts --retain {tmp_path}/retain --device cpu"
    line += " --concept gun --preset tiny --steps 1 --batch 1 --retain_batch 1 --harm 0 --heal 0"
    line += " --lr_ffn 9"
    line += f" --out_dir {out}"
    line = [*line.split(), *[f"--{name}={value}" for name, value in SMALL.items()]]
    assert erase.main(line) == 0
    hub(HUB_COMMITS[1])
    config = json.loads((out / "config.json").read_text())
    assert (config["model"], config["revision"]) == ("a/b", HUB_COMMITS[0])
    loaded = erase.load_erased(out, "cpu")
    old, new = (models.load_pipeline(f"a/b@{commit}", "cpu") for commit in HUB_COMMITS)
    mask = erase.load_mask(out / "mask.safetensors", old)
    assert torch.equal(final(loaded, SMALL), final(old, SMALL, mask))
    assert not torch.equal(final(old, SMALL), final(new, SMALL))
    subject = cases.read_subject([out], None, None, {})
    assert subject.model == f"a/b@{HUB_COMMITS[0]}"
    assert report.provenance(subject.model, [], [])["model_revision"] == HUB_COMMITS[0]
    written = load_file(out / SAVED)
    (out / "mask.safetensors").unlink()
    assert erase.main([*line, "--resume"]) == 0
    again = load_file(out / SAVED)
    assert all(torch.equal(again[name], written[name]) for name in written)
    assert models.pinned("a/b") == models.pinned("a/b@main") == f"a/b@{HUB_COMMITS[1]}"
    (out / "mask.safetensors").unlink()
    line[1] = f"a/b@{HUB_COMMITS[1]}"
    capsys.readouterr()
    assert erase.main([*line, "--resume"]) == 2
    assert "--resume: --revision was 000" in capsys.readouterr().err


def hub_error(kind, status):
    request = httpx2.Request("GET", "https://huggingface.co/a/c")
    return kind("no", response=httpx2.Response(status, request=request))


HUB_ERRORS = [
    (hub_error(hub_errors.GatedRepoError, 401), "gated: accept its licence on https://hugg"),
    (hub_error(hub_errors.HfHubHTTPError, 403), "is gated: .*/a/c, then `hf auth login`"),
    (hub_error(hub_errors.RepositoryNotFoundError, 404), "is no folder, and not on the hub or"),
    (hub_error(hub_errors.HfHubHTTPError, 401), "private; if private, first `hf auth login`"),
    (hub_error(hub_errors.RevisionNotFoundError, 404), "has no revision v9 on the hub"),
    (hub_error(hub_errors.RemoteEntryNotFoundError, 404), "is not a diffusers pipeline: wrapped"),
    (hub_error(hub_errors.HfHubHTTPError, 500), "hub's cache, and the hub is not reached"),
    (httpx2.ConnectError("no network"), "hub's cache, and the hub is not reached"),
    (hub_errors.OfflineModeIsEnabled(), "hub's cache, and the hub is not reached"),
    (None, "hub's cache, and the hub is not reached"),  # huggingface_hub's own
]


@pytest.mark.parametrize("error, message", HUB_ERRORS)
def test_hub_errors(error, message, tmp_path, capsys, monkeypatch):
    """What keeps a hub's model from loading is said in a line, exit code 2, also from under the
    errors that diffusers makes of it."""

    def fails(*_, **__):
        try:
            raise error
        except Exception:
            raise OSError("wrapped")  # with __context__

    if error:
        monkeypatch.setattr(models, "hf_hub_download", fails)
        monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", fails)
    line = f"--model a/c@v9 --concept gun --device cpu --out_dir {tmp_path}/out"
    assert erase.main(line.split()) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and len(printed.splitlines()) == 1, printed
    with pytest.raises(UserError, match=message):
        models.load_pipeline("a/c@v9", "cpu")


SITE = "transformer_blocks.0.ff.net.2"
FOREIGN_MASKS = [
    (dict(format="npz"), {}, "its format is npz, not"),
    (dict(base="012"), {}, "its metadata have no base"),
    (dict(base=dict(vae="0")), {}, "other base weights .text_encoder, text_encoder_2, tr"),
    (dict(closed="0 of 9"), {}, "gates are closed, not 0 of 9"),
    (dict(modules=["ffn"]), {}, "its gates are not those of ffn"),
    (dict(modules=["ffn", "norm", "kv"]), {}, "its gates are not those of ffn and norm and kv"),
    ({}, dict(x=torch.ones(3).byte()), "its gates are not those of ffn and norm"),
    ({}, {SITE: torch.ones(3).byte()}, "its gates are not those of ffn and norm"),
    ({}, {SITE: torch.full((128,), 2).byte()}, f"{SITE} is not a list of 0 and 1"),
    ({}, {SITE: torch.ones(128)}, f"{SITE} is not a list of 0 and 1"),
]


def test_masks(tmp_path):
    """A mask loads as it was saved, also on the same weights in bf16; one that is foreign, torn, of
    another kind or not there is refused by what is wrong with it."""
    pipe = families.flux_dev()[0]
    transformer = pipe.transformer
    path = tmp_path / "mask.safetensors"
    base = artefacts.fingerprints(pipe)
    mask = random_mask(transformer, ("ffn", "norm"))
    about = dict(base=base, modules=["ffn", "norm"], format=artefacts.MASK_FORMAT)
    about |= dict(closed=artefacts.closed_of(mask))
    tensors = {site: gate.byte() for site, gate in mask.items()}
    for said, gates, message in FOREIGN_MASKS:
        save_file(tensors | gates, path, dict(mask=json.dumps(about | said)))
        with pytest.raises(UserError, match=message):
            erase.load_mask(path, pipe)
    artefacts.save_mask(path, mask, base, ["ffn", "norm"], ["knife"])
    artefacts.write_json(
        tmp_path / "config.json",
        dict(concept=["gun"], modules=["ffn"], model="x", call=models.CALLS["tiny/flux"]),
    )
    with pytest.raises(UserError, match="is of knife, its config.json of gun"):
        artefacts.load_erasure(tmp_path, pipe)
    with pytest.raises(UserError, match="load_erased: names no folder"):
        artefacts.load_erased("cpu")
    (tmp_path / "torn").write_bytes(path.read_bytes()[:200])
    (tmp_path / "text").write_text("{}")
    for name in ("torn", "text", "none"):
        with pytest.raises(UserError, match=f"{name}: not a readable safetensors file"):
            erase.load_mask(tmp_path / name, pipe)
    mask = random_mask(transformer)
    artefacts.save_mask(path, mask, base, MODULES)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = erase.load_mask(path, pipe.to(dtype))
        assert loaded.keys() == mask.keys()
        assert all(torch.equal(loaded[site], mask[site]) for site in mask)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        next(pipe.components[part].parameters()).flatten()[0] += 1
        with pytest.raises(UserError, match=f"made for other base weights \\({part}"):
            erase.load_mask(path, pipe)
        artefacts.save_mask(path, mask, artefacts.fingerprints(pipe), MODULES)


ATTENTION = "encoder.block.0.layer.0.SelfAttention.q.weight"
DAMAGED_PARTS = [  # of tiny/flux: one of its weights, how many rows are left of it, the message
    ("text_encoder", "final_layer_norm.bias", 0, "text_encoder has no weights for final_layer"),
    ("text_encoder_2", "shared.weight", 0, "text_encoder_2 has no weights for encoder.embed"),
    ("text_encoder_2", ATTENTION, 0, f"has no weights for {ATTENTION}"),
    ("text_encoder_2", ATTENTION, 5, rf"{ATTENTION} of \(5, 128\), not \(128, 128\)"),
    ("vae", "decoder.conv_in.bias", 0, "has no weights for decoder.conv_in.bias"),
    ("vae", "decoder.conv_in.bias", 5, "does not load.* shape"),
    ("transformer", "x_embedder.bias", 0, "has no weights for x_embedder.bias"),
    ("transformer", "x_embedder.bias", 5, "does not load.* shape"),
]


@pytest.mark.parametrize("part, key, rows, message", DAMAGED_PARTS)
def test_a_model_without_all_its_weights_is_refused(part, key, rows, message, tmp_path):
    """In one line that names the weight, of whatever part; nothing is drawn at random."""
    shutil.copytree(models.TINY, tmp_path / "flux")
    (path,) = (tmp_path / "flux" / part).glob("*.safetensors")
    weights = load_file(path)
    weight = weights.pop(key)
    if rows:
        weights[key] = weight[:rows].clone()
    save_file(weights, path, dict(format="pt"))
    with pytest.raises(UserError, match=message):
        models.load_pipeline(str(tmp_path / "flux"), "cpu")


FOREIGN_CONFIGS = [
    (dict(concept="gun"), "concept is not a list of names"),
    (dict(concept=[]), "concept is not a list of names"),
    (dict(concept=["gun", ""]), "concept: is empty"),
    (dict(concept=[3]), "concept: is empty"),
    (dict(concept=["../../etc/passwd"]), "concept: '../../etc/passwd' has a slash"),
    (dict(concept=["a\0"]), r"concept: 'a\\x00' has characters that cannot be printed"),
    (dict(modules=["ffn", "all"]), "modules: 'all' is none of ffn, norm, kv"),
    (dict(modules="ffn"), "modules is not a list of names"),
    (dict(model=None), "model is None"),
    (dict(model="a\0b"), "model is 'a"),
    (dict(call=[]), "call is not a JSON object"),
    (dict(call=CALL | dict(seed=1)), "call has 'seed', which is no flag of the sampler"),
    (dict(call=CALL | dict(width=60)), "call: width: must be between 16 and 8,192 and a mul"),
    (dict(call=CALL | dict(width="64")), "call: width is '64'"),
    (
        dict(call=CALL | dict(guidance_scale=math.nan)),
        "call: guidance_scale: must be between 0 and 1,0",
    ),
    (dict(call=CALL | dict(num_inference_steps=True)), "call: num_inference_steps is True"),
    (dict(call=CALL | dict(negative_prompt=1)), "call: negative_prompt is 1"),
]


@pytest.mark.parametrize("changes, message", FOREIGN_CONFIGS)
def test_foreign_configurations_are_refused(changes, message, tmp_path, monkeypatch):
    """By file and key, before a weight is loaded, when an erased folder is loaded or scored."""
    monkeypatch.setattr(models, "load_pipeline", None)
    good = dict(concept=["gun"], modules=["ffn"], model="tiny/flux", call=CALL)
    (tmp_path / "config.json").write_text(json.dumps(good | changes))
    (tmp_path / "mask.safetensors").write_text("")
    for load in (erase.load_erased, lambda folder: cases.read_subject([folder], None, None, {})):
        with pytest.raises(UserError, match=f"config.json: {message}"):
            load(tmp_path)


@pytest.mark.parametrize("dtype, shard", [(torch.float32, "5GB"), (torch.bfloat16, "20KB")])
def test_saving_folds_the_stored_files(dtype, shard, tmp_path):
    """The saved folder is the base folded in memory, bit for bit, in the stored dtype, sharded or
    not; it replaces what a killed run left, and takes along no other file of the base's."""
    pipe = families.flux_dev()[0]
    transformer = pipe.transformer.to(dtype)
    mask = random_mask(transformer)
    base, out = tmp_path / "base/transformer", tmp_path / "out/transformer"
    pipe.save_pretrained(base.parent, max_shard_size=shard)
    (base / "diffusion_pytorch_model.bin").write_text("unfolded")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert (len(before) > 5) == (shard != "5GB")
    out.mkdir(parents=True)
    (out / "old.safetensors").write_text("")
    artefacts.save_folded(str(base.parent), type(pipe), mask, out)
    erase.fold(transformer, mask)
    saved = load_file(out / "diffusion_pytorch_model.safetensors")
    assert len(saved) == len(transformer.state_dict())
    for name, weight in transformer.state_dict().items():
        assert torch.equal(saved[name], weight) and saved[name].dtype == dtype, name
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    assert listing(out) == "config.json diffusion_pytorch_model.safetensors"
    assert listing(out.parent) == "transformer"


def test_other_forms_of_saving(tmp_path):
    """--save pipeline: stock diffusers opens the whole folder and draws what load_erased draws,
    also with links in the base's folder, as in the hub's cache. --save single: the folded weights
    under diffusers' names in one file. --save mask: nothing."""
    pipe, call = families.flux_dev()
    base, kind = tmp_path / "base", type(pipe)
    pipe.save_pretrained(base)
    weights = base / "text_encoder/model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    mask = random_mask(pipe.transformer, ("ffn",))
    about = (artefacts.fingerprints(pipe), ["ffn"])
    config = dict(model=str(base), concept=["gun"], modules=["ffn"], call=SMALL)
    for form in ("pipeline", "single", "mask"):
        out = tmp_path / form
        out.mkdir()
        artefacts.save_weights(form, str(base), kind, mask, out)
        artefacts.write_json(out / "config.json", config)
        artefacts.save_mask(out / "mask.safetensors", mask, *about)
    assert listing(tmp_path / "mask") == "config.json mask.safetensors"
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    found = erase.load_erased(tmp_path / "mask", "cpu")
    assert torch.equal(final(opened, call), final(found, call))
    assert not torch.equal(final(opened, call), final(pipe, call))
    assert not any(file.is_symlink() for file in (tmp_path / "pipeline").rglob("*"))
    assert listing(tmp_path / "single") == "config.json mask.safetensors transformer.safetensors"
    single = load_file(tmp_path / "single/transformer.safetensors")
    wanted = found.transformer.state_dict()
    assert single.keys() == wanted.keys()
    assert all(torch.equal(single[name], weight) for name, weight in wanted.items())


GB = 10**9
ROOM = [  # free bytes of cache and out_dir, whether on one disk, --save, of the LoRA, message
    ((30 * GB, 30 * GB), False, "full", 0, None),
    ((19 * GB, 90 * GB), False, "mask", 0, "--model: 17.70 GiB free, 18.63 needed; HF_HOME"),
    ((30 * GB, 5 * GB), False, "full", 0, "--out_dir: .* 9.38 needed; --save mask needs little"),
    ((30 * GB, 20 * GB), False, "pipeline", 0, "--out_dir: .* 19.62 needed"),
    ((30 * GB, 30 * GB), True, "full", 0, "--out_dir: .* 28.00 needed"),
    ((30 * GB, 30 * GB), True, "mask", 0, None),
    ((30 * GB, 3 * GB), False, "mask", 4 * GB, "--out_dir: 2.79 GiB free, 3.79 needed"),
]


@pytest.mark.parametrize("free, one_disk, form, of_lora, message", ROOM)
def test_room_on_the_disks(free, one_disk, form, of_lora, message, hub, tmp_path, monkeypatch):
    """For what --save writes and for what the hub has yet to send, which is what diffusers reads:
    no variants, no single files, nothing that is in the cache."""
    hub(HUB_COMMITS[0])
    sizes = {
        SAVED: GB,  # is there
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": 9 * GB,
        "text_encoder_2/model-00002-of-00002.safetensors": 11 * GB,
        "text_encoder_2/model.fp16.safetensors": GB,
        "vae/diffusion_pytorch_model.bin": GB,
        "flux1-schnell.safetensors": 24 * GB,
    }
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    info = SimpleNamespace(siblings=files)
    monkeypatch.setattr(models.HfApi, "model_info", lambda *_, **__: info)
    meta = torch.nn.Linear(2, 3)
    sizes = models.stored_bytes(models.pinned("a/b"), meta, dict(text_encoder_2=9, vae=9))
    assert sizes == dict(transformer=10 * GB, all=21 * GB, download=20 * GB)
    disks = dict(hub=(0, free[0]), out=(0 if one_disk else 1, free[1]))
    monkeypatch.setattr(artefacts, "disk_of", lambda folder: disks[folder.name])
    with pytest.raises(UserError, match=message) if message else ExitStack():
        artefacts.check_disk(tmp_path / "out", form, sizes, of_lora)


def test_saving_holds_few_weights_in_memory(tmp_path):
    """Folding and saving 240 MiB of weights takes no more anonymous memory than the gated layers,
    for the others stay mapped from their files."""
    with torch.device("meta"):
        sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=16)
        sizes |= dict(attention_head_dim=64, axes_dims_rope=(16, 24, 24))
        model = diffusers.FluxTransformer2DModel(**sizes)
    weights = model.state_dict().items()
    size = sum(p.nbytes for name, p in weights if ".ff" in name or "norm1_context" in name)
    mask = random_mask(model, ("ffn", "norm"))
    model.to_empty(device="cpu").save_pretrained(tmp_path / "transformer", max_shard_size="40MB")
    del model, weights
    parts = dict(transformer=["diffusers", "FluxTransformer2DModel"], _class_name="FluxPipeline")
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    out = tmp_path / "out"
    how = (str(tmp_path), diffusers.FluxPipeline, mask, out)
    peak = anonymous_peak(lambda: artefacts.save_folded(*how))
    assert sum(file.stat().st_size for file in out.iterdir()) > 240 * 2**20
    assert peak < size + 16 * 2**20, (peak, size)


def test_training_is_a_function_of_its_seed(pipe, capsys, monkeypatch):
    """Two runs have the same losses, and so has one that goes on from a state; another seed or
    setting has others; micro-batches and recompute change them by rounding. A loss that is not
    finite stops with exit code 1 and a line that names the step."""
    states = []

    def losses_of(**changes):
        losses = []

        def keep(metrics, state):
            losses.append(metrics["loss"])
            states.append({name: tensor.clone() for name, tensor in state.items()})

        settings = SETTINGS | dict(gate="hard_concrete", harm=0.1, steps=3, batch=2, retain_batch=2)
        settings |= dict(call=SMALL, on_step=keep) | changes
        erase.train(pipe, [("a gun", "nothing")], RETAIN, **settings)
        return losses

    losses = losses_of()
    assert losses_of() == losses
    for change in (dict(seed=1), dict(harm=0.0), dict(lr_norm=0.1), dict(beta=0.5)):
        assert losses_of(**change) != losses, change
    assert losses_of(first_step=1, state=states[0]) == losses[1:]
    assert losses_of(micro_batch=3, checkpoint="both") == pytest.approx(losses, rel=1e-3)
    monkeypatch.setattr(erase, "squared_error", lambda final, _: final.flatten(1).sum(1) * math.nan)
    assert erase.exit_code("erase.py", losses_of) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("erase.py: failed: step 0: the loss is nan"), error


def test_train_can_be_copied(pipe):
    """`train` and what it calls, taken out of erase.py with the imports that they need, none of
    argparse or accelerate, erase `apple` in 40 steps."""
    source = Path("erase.py").read_text()
    top = {}  # functions, constants and imports by name
    for node in ast.parse(source).body:
        names = [alias.asname or alias.name for alias in getattr(node, "names", ())]
        names += [target.id for target in getattr(node, "targets", ()) if hasattr(target, "id")]
        top |= dict.fromkeys([*names, getattr(node, "name", "")], node)
    needed = ["train"]
    for name in needed:  # which grows
        used = {part.id for part in ast.walk(top[name]) if isinstance(part, ast.Name)}
        needed += [other for other in top if other in used and other not in needed]
    text = ""
    lengths = []  # of the functions
    for node in sorted({top[name] for name in needed}, key=lambda node: node.lineno):
        first = node.lineno - len(getattr(node, "decorator_list", ()))
        lines = source.splitlines()[first - 1 : node.end_lineno]
        text += "\n".join(lines) + "\n"
        if isinstance(node, ast.FunctionDef):
            lengths.append(len(lines))
    assert len(lengths) <= 20 and sum(lengths) <= 230, lengths
    assert not re.search("argparse|accelerate|args|Parser|UserError", text)

    copied = {}
    exec(text, copied)
    rows = promptfiles.training_rows(TINY_PROMPTS, concept=["apple"], num_prompts=20)
    pairs = promptfiles.as_pairs(rows.pairs)
    retain = [row["prompt"] for row in rows.retain]
    mask = copied["train"](pipe, pairs, retain, call=CALL, **SETTINGS, steps=40, harm_draws=160)
    with torch.no_grad():
        how = dict(weights=None, call=CALL)
        before = copied["case_errors"](pipe, pairs, range(20), {}, **how).mean()
        after = copied["case_errors"](pipe, pairs, range(20), mask, **how).mean()
    assert after < 0.6 * before and any((gates == 0).any() for gates in mask.values())


def test_several_concepts_get_more():
    """Of steps, of gates that may close; a style takes twice the steps of the LoRA."""

    def found(*concepts):
        args = erase.parse_args(["--model", "tiny/flux", "--concept", *concepts])
        return args.steps, args.heal_steps, args.max_closed

    assert found("gun") == (200, 200, 0.01)
    assert found("sketch") == (200, 400, 0.01)
    assert found("gun", "knife") == (400, 283, 0.02)
    assert found(*MANY) == (400, 1386, 0.05)
    args = erase.parse_args(["--concept", *MANY, "--model", "tiny/flux", "--heal_steps", "9"])
    assert args.heal_steps == 9


def test_flags_that_would_change_nothing_are_refused():
    """Those of the LoRA where the preset has none, unless --heal 1 asks for it."""
    line = ["--concept", "gun", "--model", "tiny/flux", "--preset", "paper", "--heal_steps", "9"]
    with pytest.raises(UserError, match="^--heal_steps: changes nothing without --heal 1"):
        erase.parse_args(line)
    assert erase.parse_args([*line, "--heal", "1"]).heal_steps == 9
    words = artefacts.last_words(models.HERE, 400, 0, ["gun"])
    assert "NOT ERASED: gun; try --heal 1" in words and "heal_steps" not in words


def test_erased_folder(erased, tmp_path, pipe):
    """The command line writes the documented files, a line of metrics a step, finite losses.
    The card's errors are the mask's on 32 test pairs and 8 test retain prompts, none of which was
    trained on, from noises that training cannot draw. transformer/ in a stock pipeline, load_erased
    with it, and from the mask alone draw the same latents; without its mask it is refused."""
    assert listing(erased) == FILES
    assert [row["step"] for row in read_metrics(erased)] == [0, 1, 2, 3]
    assert all(0 < loss < 10 for loss in losses_in(erased))

    what = dict(concept=["gun"], num_prompts=20)
    held_out = sum(promptfiles.training_rows(TINY_PROMPTS, **what).held_out().values(), [])
    assert [row["split"] for row in held_out] == ["test"] * 64
    rows = promptfiles.training_rows(TINY_PROMPTS, **what, retain=str(FEW_RETAIN))
    held_out = sum(rows.held_out().values(), [])
    assert [row["split"] for row in held_out] == ["test"] * 40
    trained = {row["prompt"] for row in rows.pairs + rows.retain}
    assert not trained & {row["prompt"] for row in held_out}
    what = dict(concept=["gun", "nudity", "sketch"], prompts=None)
    rows = promptfiles.training_rows(models.HERE / "prompts", **what | dict(kind="style"))
    some = rows.held_out()["concept prompts"]
    assert [row["concept"] for row in some[:4]] == ["gun", "nudity", "sketch", "gun"]
    assert Counter(row["concept"] for row in some) == dict(gun=10, nudity=10, sketch=10)
    errors = dict(before=torch.ones(len(some)), erased=torch.zeros(len(some)))
    errors["erased"][1::3] = 1  # of nudity, which no prompt names
    assert pictures.not_erased(errors, dict(zip(["concept prompts"], [some]))) == ["nudity"]
    assert erase.HELD_OUT_NOISE >= erase.TRAIN_NOISE + 2**20
    mask = erase.load_mask(erased / "mask.safetensors", pipe)
    noises = range(erase.HELD_OUT_NOISE, erase.HELD_OUT_NOISE + 40)
    cases = promptfiles.as_pairs(held_out)
    with torch.no_grad():
        errors = erase.case_errors(pipe, cases, noises, mask, None, call=CALL)
    errors = [part.mean().item() for part in errors.split([32, 8])]
    card = (erased / "README.md").read_text()
    found = re.search(r"picture [\d.]+ -> ([\d.]+) \(.* 0 -> ([\d.]+)", card).groups()
    assert [float(number) for number in found] == pytest.approx(errors, abs=2e-4)

    folded = diffusers.FluxTransformer2DModel.from_pretrained(erased / "transformer")
    stock = diffusers.FluxPipeline.from_pretrained(models.TINY, transformer=folded)
    shutil.copy(erased / "config.json", tmp_path)
    with pytest.raises(UserError, match="no mask.safetensors, so no finished erased model"):
        erase.load_erased(tmp_path)
    shutil.copy(erased / "mask.safetensors", tmp_path)
    latents = final(stock, CALL)
    for folder in (erased, tmp_path):
        assert torch.equal(final(erase.load_erased(folder, "cpu"), CALL), latents)
    assert not torch.equal(final(pipe, CALL), latents)


def test_a_second_concept(erased, tmp_path, capsys, pipe):
    """--model with an erased folder goes on from it: what was closed stays closed, its base, the
    union of modules and both concepts are recorded, and load_erased, transformer/ and the mask over
    the base draw the same. The same command is the same run; an unfinished folder is refused."""
    out = tmp_path / "with blank"
    line = [*QUICK, "--model", str(erased), "--concept", "knife", "--modules", "ffn", "kv"]
    line += [*"--height 32 --width 32 --num_inference_steps 1 --out_dir".split(), str(out)]
    assert erase.main([*line, "--dry_run"]) == 0 and not out.exists()
    assert erase.main(line) == 0
    printed = capsys.readouterr().out
    assert f"model: {models.portable_name(str(erased))} (FluxPipeline)" in printed
    assert "after only 4 steps" in printed and "warning: NOT ERASED: knife; try" in printed
    words = artefacts.last_words(out, 400, 1, [])
    assert words.endswith(f"next: look at '{out}/preview.png', then python evaluate.py '{out}'")
    config = artefacts.read_config(out)
    assert config["concept"] == ["knife", "gun"] and config["model"] == "tiny/flux"
    assert read_subject([out], None, None, {}).concept == ["knife", "gun"]

    before = load_mask(erased / "mask.safetensors", pipe)
    mask = load_mask(out / "mask.safetensors", pipe)
    assert mask.keys() == gate_sites(pipe.transformer, ("ffn", "norm", "kv")).keys()
    assert all((mask[site] <= before[site]).all() for site in before)
    closed = [sum((gate == 0).sum() for gate in each.values()) for each in (before, mask)]
    assert 0 < closed[0] < closed[1]
    folded = diffusers.FluxTransformer2DModel.from_pretrained(out / "transformer")
    stock = diffusers.FluxPipeline.from_pretrained(models.TINY, transformer=folded)
    latents = final(stock, CALL)
    assert torch.equal(final(erase.load_erased(out, "cpu"), CALL), latents)
    assert torch.equal(final(pipe, CALL, mask), latents)
    soft = soft_gates(out, mask, pipe.transformer)  # of straight_through: the same
    assert all(torch.equal(soft[site], mask[site]) for site in mask)

    assert erase.main([*line, "--resume"]) == 2
    assert f"--resume: the run in {out} is finished" in capsys.readouterr().err
    (out / "mask.safetensors").unlink()
    assert erase.main([*line[:-1], str(tmp_path / "no"), "--model", str(out)]) == 2
    assert f"--model: {out}: no mask.safetensors, so no finished" in capsys.readouterr().err


def test_resumed_run_equals_uninterrupted_run(erased, tmp_path):
    """A run killed in the middle and resumed ends in the same mask, optimiser state and losses, bit
    for bit, also with other flags of those that do not change the result."""
    out = tmp_path / "gun"
    line = command("erase.py", *QUICK, "--out_dir", out)
    with subprocess.Popen(line, stderr=subprocess.DEVNULL, **PLACE) as killed:
        while not (out / "state.safetensors").exists() and killed.poll() is None:
            time.sleep(0.02)
        killed.kill()
    assert 0 < len(losses_in(out)) < 4 and not (out / "mask.safetensors").exists()
    free = "--resume --save mask --save_every 3 --checkpoint both --micro_batch 9 --offload"
    resumed = run("erase.py", *QUICK, *free.split(), "--out_dir", out)
    assert resumed.returncode == 0, resumed.stderr
    assert "after only 4 steps few gates have closed yet" in resumed.stdout
    assert listing(out) == FILES.removesuffix(" transformer")
    assert losses_in(out) == losses_in(erased)
    for name in ("state.safetensors", "mask.safetensors"):
        ours, theirs = load_file(out / name), load_file(erased / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_two_processes_train_as_one(erased, tmp_path, capsys, monkeypatch):
    """Two CPU processes (torchrun, gloo) split each step's prompts and end in the single process's
    mask, with equal losses within rounding; what cannot be split is refused."""
    done = run("erase.py", *QUICK, "--out_dir", tmp_path / "gun", launch=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path / "gun") == FILES
    ours, theirs = (load_file(out / "mask.safetensors") for out in (tmp_path / "gun", erased))
    assert sum((ours[site] != theirs[site]).sum() for site in theirs) <= 2
    assert losses_in(tmp_path / "gun") == pytest.approx(losses_in(erased), rel=1e-3)
    two = SimpleNamespace(num_processes=2, is_main_process=True, device="cpu")
    monkeypatch.setattr(erase, "PartialState", lambda cpu: two)
    assert erase.main([*QUICK, "--batch", "3"]) == 2
    refusal = "--batch: 3 prompts cannot be split evenly over 2 processes"
    assert refusal in capsys.readouterr().err


def change(folder, step="4", **tensors):
    path = folder / "state.safetensors"
    save_file(load_file(path) | tensors, path, dict(step=step))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def pipe_at(path):
    path.unlink()
    os.mkfifo(path)


NAN, SHORT = torch.full((7168,), math.nan), torch.ones(3)
DAMAGE = [
    (lambda f: change(f, logits=NAN), [], "state.safetensors is damaged (it holds NaN)"),
    (lambda f: change(f, logits=SHORT), [], "is damaged (other tensors than this run has)"),
    (lambda f: change(f, more=SHORT), [], "is damaged (other tensors than this run has)"),
    (lambda f: change(f, "9"), [], "state.safetensors is of step 9, --steps is 4"),
    (lambda f: change(f, "-1"), [], "state.safetensors is of step -1, --steps is 4"),
    (lambda f: change(f, "x"), [], "state.safetensors is damaged (invalid literal"),
    (lambda f: cut(f / "state.safetensors", 999), [], "state.safetensors is damaged ("),
    (lambda f: pipe_at(f / "state.safetensors"), [], "state.safetensors is no regular file"),
    (lambda f: pipe_at(f / "metrics.jsonl"), [], "metrics.jsonl is no regular file"),
    (lambda f: cut(f / "metrics.jsonl", -9), [], "metrics.jsonl has 3 rows, "),
    (lambda f: (f / "config.json").write_text("[]"), [], "config.json: is not a JSON object"),
    (lambda f: cut(f / "config.json", 99), [], "config.json: "),
    (lambda f: (f / "config.json").unlink(), [], "--resume: no run to go on with in "),
    (lambda f: None, ["--beta", "9"], "--resume: --beta was 3.0, now 9.0; repeat the same"),
    (lambda f: None, ["--height", "32"], "--resume: --call was {"),
    (lambda f: (f / "mask.safetensors").write_text(""), [], "--resume: the run in "),
]


@pytest.mark.parametrize("damage, flags, message", DAMAGE)
def test_damaged_runs_are_refused(damage, flags, message, erased, tmp_path, capsys):
    """By what is wrong with them, before a weight is loaded."""
    out = tmp_path / "out"
    shutil.copytree(erased, out, ignore=shutil.ignore_patterns("mask.safetensors", "transformer"))
    damage(out)
    assert erase.main([*QUICK, *flags, "--out_dir", str(out), "--resume"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


BAD = [
    ("--steps 0", "--steps: must be between 1 and 1,000,000, not 0"),
    ("--batch -1", "--batch: must be between 1 and "),
    ("--beta -1", "--beta: must be between 0 and "),
    ("--beta much", "--beta: invalid float value: 'much'"),
    ("--harm nan", "--harm: must be between 0 and 1,000,000, not nan"),
    ("--lr_ffn inf", "--lr_ffn: must be between 0 and 1,000,000, not inf"),
    ("--lr_norm 1e308", "--lr_norm: must be between 0 and 1,000,000, not 1e308"),
    ("--steps 1_000", "--steps: invalid int value: '1_000'"),
    (f"--steps {10**18}", "--steps: must be between 1 and 1,000,000, not 1000000000000000000"),
    (f"--batch {'9' * 5000}", "--batch: invalid int value: '99"),
    ("--seed ٣", "--seed: invalid int value: '٣'"),
    ("--seed 2147483648", "--seed: must be between 0 and 2,147,483,647, not 2147483648"),
    ("--num_inference_steps 1001", "--num_inference_steps: must be between 1 and 1,000"),
    ("--width 999999984", "--width: must be between 16 and 8,192 and a multiple of 16"),
    ("--width 8192 --height 8192", "--checkpoint: none needs about"),
    ("--hard 1.5", "--hard: must be between 0 and 1, not 1.5"),
    ("--max_closed -0.1", "--max_closed: must be between 0 and 1, not -0.1"),
    ("--height 60", "--height: must be between 16 and 8,192 and a multiple of 16, not 60"),
    ("--max_sequence_length 513", "--max_sequence_length: must be between 1 and 512, not 513"),
    ("--modules ffn bias", "argument --modules: invalid choice: 'bias'"),
    ("--gate step", "argument --gate: invalid choice: 'step'"),
    ("--quantize int2", "argument --quantize: invalid choice: 'int2'"),
    ("--step 3", "unrecognized arguments: --step 3"),
    ("--device tpu", "--device: tpu: "),
    ("--concept ' '", "--concept: is empty"),
    ("--concept ..", "--concept: '..' is no word"),
    ("--concept gun GUN", "--concept: 'gun' is there twice"),
    (f"--concept {'x' * 999} --kind object", "File name too long: "),
    ("--concept unicorn", "--kind: needed for 'unicorn': object, style or person?"),
    ("--concept 'brad pitt' --kind man", "--kind: invalid choice: 'man'"),
    ("--concept '\x07gun'", "--concept: '\\x07gun' has characters that cannot be printed"),
    ("--concept 'gun, knife'", "'gun, knife' has a comma"),
    ("--concept ../gun", "--concept: '../gun' has a slash"),
    ("--neutral 'a toy gun'", "--neutral: 'a toy gun' contains the concept"),
    ("--neutral x --prompts prompts/tiny/gun.csv", "--neutral: goes with template prompts"),
    ("--model prompts", "--model: prompts is not a diffusers pipeline: "),
    ("--model LICENSE", "--model: LICENSE is a file; wanted is a hub id, or a folder with a"),
    ("--model /dev/null", "--model: /dev/null is a file; wanted is a hub id, or a folder with a"),
    ("--model tiny/judge", "--model: tiny/judge is not a diffusers pipeline: "),
    ("--prompts /dev/zero", "--prompts: /dev/zero is no regular file"),
    ("--retain prompts", "--retain: prompts is no regular file"),
    ("--prompts none.csv", "--prompts: cannot read none.csv"),
    ("--retain LICENSE", "--retain: LICENSE has no column 'prompt'"),
    ("--out_dir prompts", "--out_dir: prompts is not empty"),
    ("--out_dir LICENSE", "LICENSE is a file"),
    ("--out_dir LICENSE/x", "LICENSE is a file"),
    ("--out_dir ''", "--out_dir: is empty"),
    ("--device=", "--device: is empty"),
    ("--device meta", "--device: meta: "),
    ("--prompts ''", "--prompts: is empty"),
    ("--resume --out_dir no_folder", "--resume: no run to go on with in no_folder"),
    ("--offload --checkpoint step", "--offload: needs --checkpoint block or both, not step"),
    ("--offload --compile", "--compile: does not go with --offload"),
    ("--concept nudity gun --prompts prompts/tiny/gun.csv", "no training pairs for 'nudity'"),
    ("", "--save mask"),  # no disk space
    (HEADER.replace("neutral_", "neutral"), "has no column 'neutral_prompt'"),
    (HEADER, "holds no prompts"),
    (f"{HEADER}0,a gun,nothing,1,training\n", "line 2: split is 'training'"),
    (f"{HEADER}0,a gun,x,1,train\n1,a,a,1,train\n", "line 3: prompt and neutral_prompt are the"),
    (f"{HEADER}0,a gun,nothing,one,train\n", "line 2: evaluation_seed is 'one'"),
    (f"{HEADER}0,a gun,,1\n", "line 2: 4 fields, the header has 5"),
    (f"{HEADER}0,a gun,nothing,1,train,x,y\n", "line 2: 7 fields, the header has 5"),
    (f"{HEADER}0,a cat,nothing,1,train\n", "--concept: 'gun' occurs in no prompt"),
    (f"{HEADER}0,a gun,nothing,1,test\n", "--prompts: no training pairs for 'gun'"),
]
if not find_spec("torchao"):
    BAD.append(("--quantize fp8", "--quantize: fp8 needs a library that is not here: pip install"))


@pytest.mark.parametrize("line, message", BAD)
def test_bad_input(line, message, tmp_path, capsys, monkeypatch):
    """Ends in exit code 2 and one line that names the flag or file, before a weight is loaded;
    nothing is written."""
    monkeypatch.setattr(models, "load_pipeline", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    if line.startswith("case"):
        (tmp_path / "p.csv").write_text(line)
        line = f"--prompts {tmp_path}/p.csv"
    for flag, value in (("concept", "gun"), ("model", "tiny/flux"), ("out_dir", tmp_path / "out")):
        if f"--{flag}" not in line:
            line += f" --{flag} {value}"
    assert erase.main(shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_dry_run_and_paper_preset(tmp_path, capsys, monkeypatch):
    """A dry run prints the model, the number of gates and of prompts, loads no weights and writes
    nothing. --preset paper gives table 6's values on any model, and is what real ones get."""
    monkeypatch.setattr(models, "load_pipeline", None)
    assert erase.main([*QUICK, "--out_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "7,168 gates in 12 layers; 104 concept pairs" in printed
    assert json.loads(printed[printed.index("{") :])["call"] == CALL
    assert "preset tiny; " in printed
    assert not (tmp_path / "out").exists()
    assert erase.main([*QUICK, "--dry_run", "--preset", "paper"]) == 0
    cost = "preset paper (--preset tiny keeps far more other things: RESULTS.md); 7,168 gates"
    assert cost in capsys.readouterr().out
    paper = dict(preset="paper", gate="hard_concrete", lr_ffn=0.5, lr_norm=0.5, weight_decay=0.01)
    paper |= dict(beta=0.01, batch=4, steps=400, hard=0, max_closed=1, harm=0, lr_decay=0)
    paper |= dict(num_prompts=20)
    for flags in ("tiny/flux --preset paper", f"{models.SCHNELL} --preset paper", models.SCHNELL):
        args = vars(erase.parse_args(f"--concept gun --model {flags}".split()))
        assert args | paper == args
    official = dict(temperature=0.83, noise=0.5, beta=0.1, batch=2, retain_batch=2)
    args = vars(erase.parse_args("--concept gun --model tiny/flux --preset official".split()))
    assert args | paper | official | dict(preset="official") == args


def test_official_noise():
    """The authors' bounded noise leaves all gates at .99 or more at the start, 3.4 % below 1."""
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    gates = erase.relax(torch.full((100_000,), 3.0), "hard_concrete", 0.0, uniform, 0.83)
    assert gates.min() > 0.989 and (gates < 1).float().mean() == pytest.approx(0.034, abs=0.003)


SCRIPTS = dict(erase=6, evaluate=5, attacks=1, probes=1, bench=0, baselines=5, reproduce=1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_documented_command_parses(script, tmp_path, monkeypatch):
    """Each command in a code block of README.md and RESULTS.md is accepted by the real parser, and
    there are at least some."""
    module = pytest.importorskip(script)
    text = Path("README.md").read_text() + Path("RESULTS.md").read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    call = rf"(?:^|&&)\s*(?:python|torchrun .*) {script}\.py\b(.*?)(?=$|&&)"
    commands = [shlex.split(line, comments=True) for line in re.findall(call, blocks, re.M)]
    assert len(commands) >= SCRIPTS[script], commands

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").symlink_to(models.HERE / "prompts")
    if script == "erase":
        single = sorted(set(re.findall(r"erased/(\w+)", text)) - {"both"})
        for name in (*single, "both"):
            parts = ("gun", "knife") if name == "both" else ()
            folder = tmp_path / "erased" / name
            folder.mkdir(parents=True)
            (folder / "mask.safetensors").write_text(name)
            hashes = {str(folder.parent / x): "" for x in parts}
            for part in hashes:
                hashes[part] = artefacts.digest(Path(part) / "mask.safetensors")
            config = dict(concept=[name], modules=["ffn"], model="tiny/flux", parts=hashes)
            (folder / "config.json").write_text(json.dumps(config | dict(call=CALL)))
    for arguments in commands:
        for folder in [] if script == "erase" else map(Path, arguments):
            if folder.parts and folder.parts[0] in ("erased", "baselines", "tiny"):
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("config.json", "mask.safetensors", "model_index.json"):
                    (folder / name).write_text("{}")
        module.parse_args(arguments)


def test_output_without_a_terminal(tmp_path):
    """Nothing dies of a letter that the output's encoding lacks, and progress is lines in a log. A
    file's text may hold what is no letter at all, as names of files do."""
    text = "import safely, tqdm; print('pi\xf1ata'); bar = tqdm.tqdm(range(9), 'go')\n"
    text += "for i in bar: bar.set_postfix_str(str(i))"
    how = PLACE | dict(env=PLACE["env"] | dict(PYTHONIOENCODING="ascii", LC_ALL="C"))
    done = subprocess.run(command("-c", text), capture_output=True, **how)
    assert done.stdout == b"pi\\xf1ata\n"
    first, last = done.stderr.decode().splitlines()
    assert b"\r" not in done.stderr and first.startswith("go:   0%") and "9/9" in last
    write_text(tmp_path / "a.md", "pi\xf1ata \udcc3")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "pi\xf1ata \\udcc3"


@pytest.mark.parametrize(
    "script, line, message",
    [
        ("check", "-n 5", "-n: must be between 32 and 100,000, not 5"),
        ("check", "--grid /dev/null", "--grid: /dev/null is no regular file"),
        ("check", "--grid no/such.png", "--grid: no/such.png is no PNG, or its folder"),
        ("train", "--flow_steps 1_000", "--flow_steps: invalid int value: '1_000'"),
        ("train", "--adam_lr inf", "--adam_lr: must be between 0 and 1, not inf"),
        ("train", "--init LICENSE", "--init: no folder LICENSE/flux"),
        ("train", "--work LICENSE", "--work: LICENSE is a file"),
        ("train", "--without unicorn", "--without: no such thing or style in the world: unicorn"),
        ("train", "--device tpu", "--device: tpu: "),
    ],
)
def test_bad_input_of_tiny(script, line, message, capsys, monkeypatch):
    """Ends in one line and exit code 2 there too."""
    monkeypatch.syspath_prepend(models.HERE / "tiny")
    assert importlib.import_module(script).main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error


def test_everyday_traps(tmp_path, monkeypatch):
    """Files get the mode that umask gives, a notebook's backend is no matter, a concept is no path
    to other files, and latents that are not finite are no black picture."""
    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    pictures.save_curves(
        tmp_path / "c.png", [dict(step=0, erase_loss=1, preserve_loss=1, closed=0)]
    )
    artefacts.save_mask(tmp_path / "m", dict(a=torch.ones(2)), "base", ["ffn"])
    umask = os.umask(0)
    os.umask(umask)
    modes = [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()]
    assert modes == [0o666 & ~umask] * 2
    (tmp_path / "gun.csv").write_text("not,a,prompt,file\n")
    rows = promptfiles.concept_pairs(str(tmp_path / "gun"), TINY_PROMPTS, kind="object")
    assert rows[0]["neutral_prompt"].count("nothing") == 1
    assert len(str(artefacts.default_folder([f"concept {i}" for i in range(60)]))) < 100
    broken = models.load_pipeline(models.TINY, "cpu")
    broken.transformer.proj_out.weight[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="'a gun' are not finite"):
        pictures.draw(broken, ["a gun"], [1], **models.CALLS["tiny/flux"])
