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
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import artefacts
import erase
import families
import models
import promptfiles
from conftest import QUICK, TWO_PROCESSES, command, run
from costs import anonymous_peak
from models import HERE
from safely import UserError
from sites import MODULES, gate_sites

CALL = models.CALLS["tiny/flux"]
# The preset "tiny".
SETTINGS = {flag: columns[1] for flag, columns in erase.DEFAULTS.items()}
SETTINGS |= dict(modules=("ffn", "norm"), checkpoint="none")
SMALL = CALL | dict(height=32, width=32, num_inference_steps=2)
RETAIN = ["an apple on a red background", "a dog"]
FILES = "README.md config.json curves.png mask.safetensors metrics.jsonl preview.png "
FILES += "state.safetensors transformer"
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS="1")
TINY_PROMPTS = HERE / "prompts/tiny"
HEADER = "case_number,prompt,neutral_prompt,evaluation_seed,split\n"


@pytest.fixture(scope="module")
def tiny():
    """tiny/flux, which remembers its prompts."""
    pipe = models.load_pipeline(models.TINY, "cpu")
    models.remember_prompts(pipe)
    return pipe


@pytest.fixture
def random_flux():
    """(pipe, call) of a random FLUX, two double and two single blocks."""
    pipe, call = families.flux_dev()
    models.remember_prompts(pipe)
    return pipe, call


@pytest.fixture
def at_home(monkeypatch):
    monkeypatch.chdir(HERE)


def final(pipe, call, gates=None):
    with torch.no_grad(), erase.gated(pipe.transformer, gates or {}):
        return erase.rollout(pipe, RETAIN, [1, 2], **call)


def random_mask(transformer, modules=MODULES, share=0.3):
    generator = torch.Generator().manual_seed(2)
    mask = {}
    for name, site in gate_sites(transformer, modules).items():
        mask[name] = (torch.rand(site.units, generator=generator) > share).float()
    return mask


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(path, text):
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------- gates
@pytest.mark.parametrize("gate", erase.START)
def test_relaxations(gate):
    """At its start a gate is 1 to the last bit; gates lie in [0, 1] and rise with the logit; a
    logit near 0 gets a gradient."""
    assert (erase.relax(torch.full((9,), erase.START[gate]), gate, 0.0) == 1).all()
    logits = torch.linspace(-6, 6, 25).requires_grad_()
    gates = erase.relax(logits, gate, 0.0, torch.full((25,), 0.5))
    gates.sum().backward()
    assert 0 <= gates.min() and gates.max() <= 1 and (gates.diff() >= 0).all()
    assert logits.grad[12] > 0


def test_share_of_trainable_gates_at_the_papers_start():
    """Few hard-concrete gates get a gradient from the paper's start value 3, all straight-through
    ones do."""
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    shares = {}
    for gate in ("hard_concrete", "straight_through"):
        logits = torch.full((100_000,), 3.0, requires_grad=True)
        erase.relax(logits, gate, 0.0, uniform.clamp(1e-6, 1 - 1e-6)).sum().backward()
        shares[gate] = (logits.grad != 0).float().mean().item()
    assert shares["straight_through"] == 1 and 0.15 < shares["hard_concrete"] < 0.22, shares


@pytest.mark.parametrize("max_closed", [0, 0.03, 0.5, 1])
def test_no_more_gates_close_than_allowed(max_closed):
    """The lowest logits close, never above 0 and never more than the share; training's forward
    gates are just these."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    threshold = erase.closing_threshold(logits, max_closed)
    gates = erase.relax(logits, "straight_through", threshold)
    wanted = min(int(max_closed * 1000), int((logits <= 0).sum()))
    assert (gates == 0).sum() == wanted and not gates[logits.argsort()[:wanted]].any()


def test_hard_cases_come_more_often():
    """With hard 1, cases are drawn in proportion to their latest error, those never seen like the
    worst; with 0, evenly."""
    latest = torch.tensor([1.0, 0, 0, 0, 0.5, 0.5, 0, math.inf])

    def counts(hard):
        drawn = erase.choose(random.Random(0), range(4), 600, hard, latest)
        drawn += erase.choose(random.Random(0), range(4, 8), 600, hard, latest)
        return torch.bincount(torch.tensor(drawn), minlength=8).tolist()

    found = counts(1.0)
    assert found[0] > 590 and found[6] < 10 and all(150 < found[i] < 250 for i in (4, 5, 7)), found
    assert all(100 < count < 200 for count in counts(0.0))


def test_harm_is_what_closing_a_gate_a_little_does(tiny, monkeypatch):
    """The estimated harm of the gates that matter most, of every kind, is that of finite
    differences of the final latents, within a quarter."""

    class OneNoise(random.Random):
        def randrange(self, *limits):
            return 0

    monkeypatch.setattr(erase, "random", SimpleNamespace(Random=OneNoise))
    sites = gate_sites(tiny.transformer, MODULES)
    harm = erase.harm_of_closing(tiny, RETAIN[:1], sites, call=SMALL, draws=320)
    case = [(RETAIN[0], RETAIN[0])]
    for module in MODULES:
        name = next(iter(gate_sites(tiny.transformer, (module,))))
        gates = torch.ones(sites[name].units)
        gates[harm[name].argmax()] -= 0.02
        how = dict(gates={name: gates}, weights=None, call=SMALL)
        with torch.no_grad():
            exact = erase.case_errors(tiny, case, [erase.TRAIN_NOISE], **how).item() / 0.02**2
        assert abs(harm[name].max().item() / exact - 1) < 0.25, (name, harm[name].max(), exact)


# -------------------------------------------------------------------------------------------- fold
def test_fold_zeroes_both_sides_of_a_closed_neuron(random_flux):
    """A closed FFN neuron keeps no incoming row, bias or outgoing column; an open one keeps all
    three; and likewise a closed output of AdaLN."""
    transformer = random_flux[0].transformer
    mask = random_mask(transformer, ("ffn", "norm"))
    erase.fold(transformer, mask)
    for i, block in enumerate(transformer.transformer_blocks):
        closed = mask[f"transformer_blocks.{i}.ff_context.net.2"] == 0
        maker, reader = block.ff_context.net[0].proj, block.ff_context.net[2]
        sides = [maker.weight, maker.bias[:, None], reader.weight.T]
        norm_closed = mask[f"transformer_blocks.{i}.norm1_context.linear"] == 0
        linear = block.norm1_context.linear
        for weight in sides:
            assert not weight[closed].any() and weight[~closed].any(1).all()
        for weight in (linear.weight, linear.bias[:, None]):
            assert not weight[norm_closed].any() and weight[~norm_closed].any(1).all()


def test_closed_norm_gates_equal_weights_zeroed_by_hand(random_flux):
    """Closing all norm gates of a block equals a zero norm1_context.linear."""
    pipe, call = random_flux
    name = "transformer_blocks.0.norm1_context.linear"
    linear = pipe.transformer.get_submodule(name)
    hooked = final(pipe, call, {name: torch.zeros(linear.out_features)})
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    assert torch.equal(final(pipe, call), hooked)


def test_hooks_are_gone_after_an_exception(random_flux):
    """Whatever is raised inside `gated`, also by gates that do not fit, the base is back."""
    pipe, call = random_flux
    base = final(pipe, call)
    mask = random_mask(pipe.transformer)
    with pytest.raises(ZeroDivisionError), erase.gated(pipe.transformer, mask):
        1 / 0
    for foreign in ("transformer_blocks.1.ff.net.2", "no.such.layer"):
        with pytest.raises(ValueError, match=f"{foreign}: 3 gates do not fit"):
            final(pipe, call, mask | {foreign: torch.ones(3)})
    assert torch.equal(final(pipe, call), base)


def test_where_a_style_enters(tiny):
    """Why --modules kv: with the text's keys and values of the first block alone taken from the
    neutral prompt, most of what a style does is gone, and nothing of a gun."""
    blocks = tiny.transformer.transformer_blocks
    layers = [(block.attn.add_k_proj, block.attn.add_v_proj) for block in blocks]
    stays = {}
    for concept in ("sepia", "sketch", "neon", "mosaic", "gun"):
        rows = promptfiles.read_rows(TINY_PROMPTS / f"{concept}.csv", "")
        rows = promptfiles.of_split(rows, "test")[:16]
        seeds = [row["evaluation_seed"] for row in rows]
        outputs = {}  # of each layer under the neutral prompt, one a sampling step

        def keep(layer, inputs, output):
            outputs.setdefault(layer, []).append(output)

        def swap(layer, inputs, output):
            return outputs[layer].pop(0)

        def drawn(column, hook, hooked):
            with torch.no_grad(), ExitStack() as hooks:
                for layer in hooked:
                    hooks.enter_context(layer.register_forward_hook(hook))
                return erase.rollout(tiny, [row[column] for row in rows], seeds, **CALL)

        neutral = drawn("neutral_prompt", keep, sum(layers, ()))
        base = erase.squared_error(drawn("prompt", swap, ()), neutral).sum()
        stays[concept] = []
        for pair in layers:
            errors = erase.squared_error(drawn("prompt", swap, pair), neutral)
            stays[concept].append(round((errors.sum() / base).item(), 2))
    print(stays)  # the share of the error to the neutral picture that stays, for each block
    assert stays.pop("gun")[0] > 0.9
    for first, *others in stays.values():
        assert first < 0.65 and min(others) > 0.85, stays


# ------------------------------------------------------------------------------ pipelines, pictures
def test_sampler_arguments():
    """The model's own card and over it the flags; what its pipeline does not take and what is
    missing is refused by name."""
    assert models.sampler_call("tiny/flux", diffusers.FluxPipeline, height=32)["height"] == 32
    assert models.sampler_call(models.SCHNELL, diffusers.FluxPipeline)["width"] == 512
    with pytest.raises(UserError, match="--true_cfg_scale: Flux2KleinPipeline takes none"):
        models.sampler_call("a/b", diffusers.Flux2KleinPipeline, true_cfg_scale=2.0)
    with pytest.raises(UserError, match="--height: needed, for a/b is not in models.py's table"):
        models.sampler_call("a/b", diffusers.FluxPipeline, num_inference_steps=4, width=64)


def test_prompts_are_encoded_once(random_flux, monkeypatch):
    """Whatever the batch, a text encoder sees each prompt once, and then it may go."""
    pipe, call = random_flux
    seen = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: seen.append(1))
    models.encode_all(pipe, "cpu", [*RETAIN, *RETAIN], call)
    assert len(seen) == 2 and pipe.text_encoder is None and pipe.text_encoder_2 is None
    assert final(pipe, call).isfinite().all()
    with pytest.raises(Exception, match="NoneType"):
        erase.rollout(pipe, ["a new one"], [1], **call)


# ------------------------------------------------------------------------------------ save and load
def test_mask_round_trip(tmp_path, random_flux):
    """A mask loads as it was saved, also on the same weights in bf16."""
    transformer = random_flux[0].transformer
    mask = random_mask(transformer)
    path = tmp_path / "mask.safetensors"
    artefacts.save_mask(path, mask, artefacts.fingerprint(transformer), MODULES)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = erase.load_mask(path, transformer.to(dtype))
        assert loaded.keys() == mask.keys()
        assert all(torch.equal(loaded[site], mask[site]) for site in mask)


SITE = "transformer_blocks.0.ff.net.2"
FOREIGN_MASKS = [
    (dict(format="npz"), {}, "its format is npz, not"),
    (dict(base="012"), {}, "made for base weights 012"),
    (dict(closed="0 of 9"), {}, "gates are closed, not 0 of 9"),
    (dict(modules=["ffn"]), {}, "its gates are not those of ffn"),
    (dict(modules=["ffn", "norm", "kv"]), {}, "its gates are not those of ffn and norm and kv"),
    ({}, dict(x=torch.ones(3).byte()), "its gates are not those of ffn and norm"),
    ({}, {SITE: torch.ones(3).byte()}, "its gates are not those of ffn and norm"),
    ({}, {SITE: torch.full((128,), 2).byte()}, f"{SITE} is not a list of 0 and 1"),
    ({}, {SITE: torch.ones(128)}, f"{SITE} is not a list of 0 and 1"),
]


@pytest.mark.parametrize("said, gates, message", FOREIGN_MASKS)
def test_foreign_masks_are_refused(said, gates, message, tmp_path, random_flux):
    """By what is wrong with them."""
    transformer = random_flux[0].transformer
    mask = random_mask(transformer, ("ffn", "norm"))
    about = dict(base=artefacts.fingerprint(transformer), modules=["ffn", "norm"])
    about |= dict(format=artefacts.MASK_FORMAT, closed=artefacts.closed_of(mask))
    tensors = {site: gate.byte() for site, gate in mask.items()}
    path = tmp_path / "mask.safetensors"
    save_file(tensors | gates, path, dict(mask=json.dumps(about | said)))
    with pytest.raises(UserError, match=message):
        erase.load_mask(path, transformer)


def test_torn_masks_are_refused(erased, tmp_path, pipe):
    """A truncated file, one of another kind, and none."""
    whole = (erased / "mask.safetensors").read_bytes()
    for name, content in (("cut", whole[:200]), ("text", b"{}"), ("none", None)):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a readable safetensors file"):
            erase.load_mask(path, pipe.transformer)


@pytest.mark.parametrize("dtype, shard", [(torch.float32, "5GB"), (torch.bfloat16, "20KB")])
def test_saving_folds_the_stored_files(dtype, shard, tmp_path, random_flux):
    """The saved folder is the base folded in memory, bit for bit, in the stored dtype, sharded or
    not; it replaces what a killed run left, and takes along no other file of the base's."""
    pipe, _ = random_flux
    transformer = pipe.transformer.to(dtype)
    mask = random_mask(transformer)
    base, out = tmp_path / "base", tmp_path / "out/transformer"
    pipe.save_pretrained(base)
    shutil.rmtree(base / "transformer")
    transformer.save_pretrained(base / "transformer", max_shard_size=shard)
    write(base / "transformer/diffusion_pytorch_model.bin", "unfolded")
    before = {file.name: file.read_bytes() for file in (base / "transformer").iterdir()}
    assert (len(before) > 5) == (shard != "5GB")
    for leftover in (out, out.with_name("transformer.tmp")):
        leftover.mkdir(parents=True)
        write(leftover / "old.safetensors", "")
    artefacts.save_folded(str(base), type(pipe), mask, out)
    erase.fold(transformer, mask)
    saved = load_file(out / "diffusion_pytorch_model.safetensors")
    assert len(saved) == len(transformer.state_dict())
    for name, weight in transformer.state_dict().items():
        assert torch.equal(saved[name], weight) and saved[name].dtype == dtype, name
    assert {file.name: file.read_bytes() for file in (base / "transformer").iterdir()} == before
    expected = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(file.name for file in out.iterdir()) == expected
    assert [file.name for file in out.parent.iterdir()] == ["transformer"]


def test_saving_holds_few_weights_in_memory(tmp_path):
    """Folding and saving 240 MiB of weights takes no more anonymous memory than the gated layers,
    for the others stay mapped from their files."""
    with torch.device("meta"):
        sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=16)
        sizes |= dict(attention_head_dim=64, axes_dims_rope=(16, 24, 24))
        model = diffusers.FluxTransformer2DModel(**sizes)
    gated = [name for name in model.state_dict() if ".ff" in name or "norm1_context" in name]
    size = sum(model.state_dict()[name].nbytes for name in gated)
    mask = random_mask(model, ("ffn", "norm"))
    model.to_empty(device="cpu").save_pretrained(tmp_path / "transformer", max_shard_size="40MB")
    parts = dict(transformer=["diffusers", "FluxTransformer2DModel"], _class_name="FluxPipeline")
    write(tmp_path / "model_index.json", json.dumps(parts))
    del model
    out = tmp_path / "out"
    arguments = (str(tmp_path), diffusers.FluxPipeline, mask, out)
    peak = anonymous_peak(lambda: artefacts.save_folded(*arguments))
    print(f"peak {peak / 2**20:.0f} MiB, gated layers {size / 2**20:.0f} MiB")
    assert sum(file.stat().st_size for file in out.iterdir()) > 240 * 2**20
    assert peak < size + 16 * 2**20


# ---------------------------------------------------------------------------------------- training
def losses_of(pipe, on_step=None, **changes) -> list[float]:
    """Of three steps of train with hard-concrete gates, which draw noise."""
    losses = []

    def keep(metrics, state):
        losses.append(metrics["loss"])
        if on_step:
            on_step(metrics, state)

    settings = SETTINGS | dict(gate="hard_concrete", harm=0.1, steps=3, batch=2, retain_batch=2)
    settings |= dict(call=SMALL, on_step=keep) | changes
    erase.train(pipe, [("a gun", "nothing")], RETAIN, **settings)
    return losses


def test_training_is_a_function_of_its_seed(tiny):
    """Two runs have the same losses, and so has one that goes on from a state; another seed or
    setting has others. Pictures at a time and recompute change them only by rounding."""
    states = []

    def keep(metrics, state):
        states.append({name: tensor.clone() for name, tensor in state.items()})

    losses = losses_of(tiny, keep)
    assert losses_of(tiny) == losses
    for change in (dict(seed=1), dict(harm=0.0), dict(lr_norm=0.1), dict(beta=0.5)):
        assert losses_of(tiny, **change) != losses, change
    assert losses_of(tiny, first_step=1, state=states[0]) == losses[1:]
    assert losses_of(tiny, micro_batch=3, checkpoint="both") == pytest.approx(losses, rel=1e-3)


def test_non_finite_loss_stops_the_run(tiny, capsys, monkeypatch):
    """With exit code 1 and a line that names the step."""
    monkeypatch.setattr(erase, "squared_error", lambda final, _: final.flatten(1).sum(1) * math.nan)
    assert erase.exit_code("erase.py", lambda: losses_of(tiny)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("erase.py: failed: step 0: the loss is nan"), error


def definitions_of(name: str, source: str) -> list:
    """The functions, constants and imports at the top of a source that a function of it needs."""
    top = {}
    for node in ast.parse(source).body:
        names = [alias.asname or alias.name for alias in getattr(node, "names", ())]
        names += [target.id for target in getattr(node, "targets", ()) if hasattr(target, "id")]
        top |= dict.fromkeys([*names, getattr(node, "name", "")], node)
    taken = []
    todo = [name]
    for name in todo:
        node = top[name]
        if node not in taken:
            taken.append(node)
            used = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
            todo += [other for other in used if other in top]
    return sorted(taken, key=lambda node: node.lineno)


def test_train_can_be_copied(tmp_path):
    """`train` and what it calls, taken out of erase.py into a file of their own with the imports
    that they need, none of argparse or accelerate, erase `apple` in 40 steps."""
    source = (HERE / "erase.py").read_text()
    lines = source.splitlines()
    text = ""
    lengths = []  # of the functions
    for node in definitions_of("train", source):
        first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])
        text += "\n".join(lines[first - 1 : node.end_lineno]) + "\n"
        if isinstance(node, ast.FunctionDef):
            lengths.append(node.end_lineno - first + 1)
    print(f"{len(lengths)} functions of {sum(lengths)} lines")
    assert len(lengths) <= 20 and sum(lengths) <= 230
    assert not re.search("argparse|accelerate|args|Parser|UserError", text)

    spec = importlib.util.spec_from_file_location("copied", write(tmp_path / "copied.py", text))
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    pipe = models.load_pipeline(models.TINY, "cpu")
    models.remember_prompts(pipe)
    rows = promptfiles.training_rows(TINY_PROMPTS, concept=["apple"], num_prompts=20)
    pairs = promptfiles.as_pairs(rows.pairs)
    retain = [row["prompt"] for row in rows.retain]
    settings = SETTINGS | dict(steps=40, harm_draws=160)
    mask = copied.train(pipe, pairs, retain, call=CALL, **settings)
    with torch.no_grad():
        before, after = (
            copied.case_errors(pipe, pairs, range(20), gates, None, call=CALL).mean().item()
            for gates in ({}, mask)
        )
    print(f"error to the neutral picture {before} -> {after}")
    assert after < 0.6 * before
    assert any((gates == 0).any() for gates in mask.values())


# ------------------------------------------------------------------------------------ command line
def test_command_line_writes_the_documented_files(erased):
    """Exactly these, with a line of metrics a step and finite losses."""
    assert artefacts.listing(erased) == FILES
    rows = metrics_of(erased)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(0 < row["loss"] < 10 for row in rows)


def test_the_model_card_measures_test_prompts(erased, tiny):
    """Its errors are the mask's on 32 test pairs and 32 test retain prompts, none of which was
    trained on, from noises that training cannot draw."""
    rows = promptfiles.training_rows(TINY_PROMPTS, concept=["gun"], num_prompts=20)
    held_out = sum(rows.held_out().values(), [])
    assert [row["split"] for row in held_out] == ["test"] * 64
    trained = {row["prompt"] for row in rows.pairs + rows.retain}
    assert not trained & {row["prompt"] for row in held_out}
    assert erase.HELD_OUT_NOISE >= erase.TRAIN_NOISE + 2**20
    mask = erase.load_mask(erased / "mask.safetensors", tiny.transformer)
    noises = range(erase.HELD_OUT_NOISE, erase.HELD_OUT_NOISE + 64)
    cases = promptfiles.as_pairs(held_out)
    with torch.no_grad():
        errors = erase.case_errors(tiny, cases, noises, mask, None, call=CALL)
    card = (erased / "README.md").read_text()
    found = re.search(r"picture [\d.]+ -> ([\d.]+), to .* 0 -> ([\d.]+)", card).groups()
    expected = [errors[:32].mean().item(), errors[32:].mean().item()]
    assert [float(number) for number in found] == pytest.approx(expected, abs=2e-4)


def test_erased_model_loads_from_folder_and_from_mask(erased, tmp_path, pipe):
    """transformer/ in a stock pipeline, load_erased with it, and load_erased from the mask alone
    draw the same latents; without its mask it is refused: never the base by mistake."""
    folded = diffusers.FluxTransformer2DModel.from_pretrained(erased / "transformer")
    stock = diffusers.FluxPipeline.from_pretrained(models.TINY, transformer=folded)
    shutil.copy(erased / "config.json", tmp_path)
    with pytest.raises(UserError, match="no mask.safetensors, so no finished erased model"):
        erase.load_erased(tmp_path)
    shutil.copy(erased / "mask.safetensors", tmp_path)
    same = [stock, erase.load_erased(erased, "cpu"), erase.load_erased(tmp_path, "cpu")]
    latents = [final(each, CALL) for each in (*same, pipe)]
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents[3])


def test_resumed_run_equals_uninterrupted_run(erased, tmp_path):
    """A run killed in the middle and resumed ends in the same mask, optimiser state and losses, bit
    for bit, also with other flags of those that do not change the result."""
    out = tmp_path / "gun"
    line = command("erase.py", *QUICK, "--out_dir", out)
    killed = subprocess.Popen(line, cwd=HERE, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    try:
        while not (out / "state.safetensors").exists() and killed.poll() is None:
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.wait()
    assert 0 < len(metrics_of(out)) < 4 and not (out / "mask.safetensors").exists()
    free = "--save mask --save_every 3 --checkpoint both --micro_batch 9 --offload".split()
    resumed = run("erase.py", *QUICK, *free, "--out_dir", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "after only 4 steps few gates have closed yet" in resumed.stdout
    assert artefacts.listing(out) == FILES.removesuffix(" transformer")
    for name in ("state.safetensors", "mask.safetensors"):
        ours, theirs = load_file(out / name), load_file(erased / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    losses = [[row["loss"] for row in metrics_of(folder)] for folder in (out, erased)]
    assert losses[0] == losses[1]


def test_two_processes_train_as_one(erased, tmp_path):
    """Two CPU processes (torchrun, gloo) split each step's prompts and end in the single process's
    mask, with equal losses within rounding; what cannot be split is refused."""
    out = tmp_path / "gun"
    done = run("erase.py", *QUICK, "--out_dir", out, launch=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert artefacts.listing(out) == FILES
    ours, theirs = (load_file(folder / "mask.safetensors") for folder in (out, erased))
    changed = sum((ours[site] != theirs[site]).sum().item() for site in theirs)
    losses = [[row["loss"] for row in metrics_of(folder)] for folder in (out, erased)]
    assert changed <= 2 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_prompts_that_processes_cannot_share_are_refused(capsys, monkeypatch, at_home):
    two = SimpleNamespace(num_processes=2, is_main_process=True, device="cpu")
    monkeypatch.setattr(erase, "PartialState", lambda cpu: two)
    assert erase.main([*QUICK, "--batch", "3"]) == 2
    error = "--batch: 3 prompts cannot be split evenly over 2 processes"
    assert error in capsys.readouterr().err


def change_state(folder, step="4", **tensors):
    path = folder / "state.safetensors"
    save_file(load_file(path) | tensors, path, dict(step=step))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


NAN, FEW = torch.full((7168,), math.nan), torch.ones(3)
DAMAGE = [
    (lambda f: change_state(f, logits=NAN), [], "state.safetensors is damaged (it holds NaN)"),
    (lambda f: change_state(f, logits=FEW), [], "is damaged (other tensors than this run has)"),
    (lambda f: change_state(f, more=FEW), [], "is damaged (other tensors than this run has)"),
    (lambda f: change_state(f, "9"), [], "state.safetensors is of step 9, --steps is 4"),
    (lambda f: change_state(f, "-1"), [], "state.safetensors is of step -1, --steps is 4"),
    (lambda f: change_state(f, "x"), [], "state.safetensors is damaged (invalid literal"),
    (lambda f: cut(f / "state.safetensors", 999), [], "state.safetensors is damaged ("),
    (lambda f: cut(f / "metrics.jsonl", -9), [], "metrics.jsonl has 3 rows, "),
    (lambda f: write(f / "config.json", "[]"), [], "config.json: is not a JSON object"),
    (lambda f: cut(f / "config.json", 99), [], "config.json: "),
    (lambda f: (f / "config.json").unlink(), [], "--resume: no run to go on with in "),
    (lambda f: None, ["--beta", "9"], "--resume: --beta was 3.0, now 9.0; repeat the same"),
    (lambda f: None, ["--height", "32"], "--resume: --call was {"),
    (lambda f: write(f / "mask.safetensors", ""), [], "--resume: the run in "),
]


@pytest.mark.parametrize("damage, flags, message", DAMAGE, ids=[row[2][:40] for row in DAMAGE])
def test_damaged_runs_are_refused(damage, flags, message, erased, tmp_path, capsys, at_home):
    """By what is wrong with them, before a weight is loaded."""
    out = tmp_path / "out"
    shutil.copytree(erased, out, ignore=shutil.ignore_patterns("mask.safetensors", "transformer"))
    damage(out)
    assert erase.main([*QUICK, *flags, "--out_dir", str(out), "--resume"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


BAD = [
    ("--steps 0", "--steps: must be at least 1, not 0"),
    ("--batch -1", "--batch: must be at least 1"),
    ("--beta -1", "--beta: must be at least 0"),
    ("--beta much", "--beta: invalid float value: 'much'"),
    ("--harm nan", "--harm: must be at least 0, not nan"),
    ("--lr_ffn inf", "--lr_ffn: must be at least 0, not inf"),
    ("--hard 1.5", "--hard: must be between 0 and 1, not 1.5"),
    ("--max_closed -0.1", "--max_closed: must be between 0 and 1, not -0.1"),
    ("--height 60", "--height: must be at least 16 and a multiple of 16, not 60"),
    ("--max_sequence_length 513", "--max_sequence_length: must be between 1 and 512, not 513"),
    ("--modules ffn bias", "argument --modules: invalid choice: 'bias'"),
    ("--gate step", "argument --gate: invalid choice: 'step'"),
    ("--quantize int2", "argument --quantize: invalid choice: 'int2'"),
    ("--step 3", "unrecognized arguments: --step 3"),
    ("--device tpu", "--device: tpu: "),
    ("--concept ' '", "--concept: is empty"),
    ("--neutral 'a toy gun'", "--neutral: 'a toy gun' contains the concept"),
    ("--neutral x --prompts prompts/tiny/gun.csv", "--neutral: goes with template prompts"),
    ("--model prompts", "--model: prompts is not a diffusers pipeline: "),
    ("--model tiny/judge", "--model: tiny/judge is not a diffusers pipeline: "),
    ("--prompts none.csv", "--prompts: cannot read none.csv"),
    ("--retain LICENSE", "--retain: LICENSE has no column 'prompt'"),
    ("--out_dir prompts", "--out_dir: prompts is not empty"),
    ("--out_dir LICENSE", "--out_dir: LICENSE is a file"),
    ("--resume --out_dir no_folder", "--resume: no run to go on with in no_folder"),
    ("--offload --checkpoint step", "--offload: needs --checkpoint block or both, not step"),
    ("--offload --compile", "--compile: does not go with --offload"),
    ("--concept nudity gun --prompts prompts/tiny/gun.csv", "no training pairs for 'nudity'"),
]
BAD_FILES = [
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


@pytest.mark.parametrize(
    "line, message", BAD + BAD_FILES, ids=[row[1][:40] for row in BAD + BAD_FILES]
)
def test_bad_input(line, message, tmp_path, capsys, monkeypatch, at_home):
    """Ends in exit code 2 and one line that names the flag or file, before a weight is loaded;
    nothing is written."""
    monkeypatch.setattr(models, "load_pipeline", None)
    if line.startswith("case"):
        line = f"--prompts {write(tmp_path / 'p.csv', line)}"
    for flag, value in (("concept", "gun"), ("model", "tiny/flux"), ("out_dir", tmp_path / "out")):
        if f"--{flag}" not in line:
            line += f" --{flag} {value}"
    assert erase.main(shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_no_disk_space_is_one_line(tmp_path, capsys, monkeypatch, at_home):
    """Found before loading, with the flag that helps."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert erase.main([*QUICK, "--out_dir", str(tmp_path / "out")]) == 2
    assert "--save mask" in capsys.readouterr().err


def test_dry_run_loads_no_weights(tmp_path, capsys, monkeypatch, at_home):
    """It prints the model, the number of gates and of prompts, and writes nothing; short runs say
    that they are."""
    monkeypatch.setattr(models, "load_pipeline", None)
    assert erase.main([*QUICK, "--out_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "7,168 gates in 12 layers; 20 concept pairs" in printed
    assert json.loads(printed[printed.index("{") :])["call"] == CALL
    assert not (tmp_path / "out").exists()


def test_paper_preset_is_table_6():
    """--preset paper gives the paper's values on any model, and is what real ones get."""
    for model in ("tiny/flux", models.SCHNELL):
        args = erase.parse_args(["--concept", "gun", "--model", model, "--preset", "paper"])
        assert (args.gate, args.lr_ffn, args.lr_norm) == ("hard_concrete", 0.5, 0.5)
        assert (args.weight_decay, args.beta, args.batch, args.steps) == (0.01, 0.01, 4, 400)
        assert (args.hard, args.max_closed, args.harm, args.lr_decay) == (0, 1, 0, 0)
        assert args.num_prompts == 20
    assert erase.parse_args(["--concept", "gun", "--model", models.SCHNELL]).preset == "paper"


def documented(script: str) -> list[list[str]]:
    """The arguments of `python <script>.py` in the code blocks of README.md and RESULTS.md."""
    files = [HERE / name for name in ("README.md", "RESULTS.md")]
    text = "\n".join(file.read_text() for file in files if file.exists())
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    parts = re.split(r"\n|&&", "\n".join(blocks).replace("\\\n", " "))
    found = [re.match(rf"\s*(?:python|torchrun .*) {script}\.py\b(.*)", part) for part in parts]
    return [shlex.split(match[1], comments=True) for match in found if match]


SCRIPTS = dict(erase=6, evaluate=5, attacks=1, probes=1, bench=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_documented_command_parses(script, tmp_path, monkeypatch):
    """Each command in a code block of README.md and RESULTS.md is accepted by the real parser, and
    there are at least some."""
    module = pytest.importorskip(script)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").symlink_to(HERE / "prompts")
    commands = documented(script)
    assert len(commands) >= SCRIPTS[script], commands
    for arguments in commands:
        for folder in map(Path, arguments if script != "erase" else ()):
            if folder.parts and folder.parts[0] in ("erased", "baselines", "tiny"):
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("config.json", "mask.safetensors", "model_index.json"):
                    write(folder / name, "{}")
        module.parse_args(arguments)
