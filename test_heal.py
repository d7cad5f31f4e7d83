"""heal.py and refit.py. Oracles: the base's own latents, weights added by hand, files changed on
purpose."""

import contextlib
import copy
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import artefacts
import erase
import families
import heal
import models
import promptfiles
import refit
from conftest import FEW_RETAIN, QUICK, run
from safely import UserError
from sites import closed_slices, gate_sites

ALL = families.FAMILIES | families.OTHERS
CALL = models.CALLS["tiny/flux"] | dict(num_inference_steps=2)
CONCEPT = ["a gun on a red background", "a gun next to a dog", "we see a gun"]
COLOURS = ("red", "blue", "green", "gray")
RETAIN = [f"{x} on a {colour} background" for x in ("a dog", "a hat") for colour in COLOURS]
UNSEEN = ["a dog next to a hat", "a hat on a pink background", "we see a dog"]


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """Enough for what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "PICTURES", 12)
        yield


def random_mask(transformer, closed=0.2, modules=("ffn", "norm")):
    generator = torch.Generator().manual_seed(2)
    mask = {}
    for name, site in gate_sites(transformer, modules).items():
        mask[name] = (torch.rand(site.units, generator=generator) >= closed).float()
    return mask


def erased(transformer, mask, lora):
    model = copy.deepcopy(transformer)
    artefacts.apply(model, artefacts.Erasure(mask, [], lora))
    return model


def refitted(pipe, mask, lora, concept, retain, call, rank=64, **how):
    """The LoRA that refit gives."""
    sample = partial(erase.rollout, pipe, **call)
    masked = partial(erase.gated, pipe.transformer, mask)
    how = dict(strength=0.01, rank=rank, retain=retain) | how
    itself = refit.Teacher(concept, masked, lora)
    return refit.refit(pipe.transformer, sample, masked, [itself], **how)


@torch.no_grad()
def final(pipe, transformer, prompts, call):
    base, pipe.transformer = pipe.transformer, transformer
    latents = erase.rollout(pipe, prompts, list(range(len(prompts))), **call)
    pipe.transformer = base
    return latents


def error(pipe, transformer, prompts, call) -> float:
    """Of the final latents, against the base's."""
    made, wanted = (final(pipe, t, prompts, call) for t in (transformer, pipe.transformer))
    return erase.squared_error(made, wanted).mean().item()


@torch.no_grad()
def layer_outputs(pipe, mask, lora, states) -> dict:
    """{layer: what it makes of all states, a row a token}."""
    transformer = erased(pipe.transformer, mask or {}, lora)
    outputs = {name: [] for name in heal.lora_layers(transformer)}
    with refit.replaying(transformer) as run:
        for _, names in refit.stages(transformer, states[0]):
            for state in states:
                for name, (_, output) in run(state, names, [], {}).items():
                    outputs[name].append(output)
    return {name: torch.cat(rows) for name, rows in outputs.items()}


@pytest.fixture(scope="module")
def healed(pipe):
    """(mask, LoRA) of tiny/flux."""
    mask = random_mask(pipe.transformer)
    before = copy.deepcopy(pipe.transformer.state_dict())
    lora = refitted(pipe, mask, {}, CONCEPT, RETAIN * 4, CALL)
    now = pipe.transformer.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert not any("forward" in vars(block) for block in pipe.transformer.transformer_blocks)
    return mask, lora


def test_prompts_not_seen_are_mended_too(pipe, healed):
    mask, lora = healed
    masked, mended = (erased(pipe.transformer, mask, change) for change in ({}, lora))
    assert error(pipe, mended, UNSEEN, CALL) < 0.8 * error(pipe, masked, UNSEEN, CALL)


def test_closed_neurons_stay_zero(pipe, healed):
    mask, lora = healed
    mended = erased(pipe.transformer, mask, lora)
    for name, dim, index in closed_slices(mended, mask):
        assert not mended.get_parameter(name).index_select(dim, index).any(), name


def test_closed_outputs_take_no_rank(pipe, healed):
    """What a closed gate multiplies cannot be mended, so the LoRA leaves it alone."""
    mask, lora = healed
    for name in gate_sites(pipe.transformer, ("norm",)):
        a, b = lora[name]
        assert (b @ a)[mask[name] == 0].abs().max() < 1e-5, name


def test_hooks_are_as_weights(pipe, healed):
    """With gates and LoRA as hooks, and with both in the weights, the same latents; two add up."""
    mask, lora = healed
    halves = [{name: (a, b / 2) for name, (a, b) in lora.items()}] * 2
    wanted = final(pipe, erased(pipe.transformer, mask, lora), UNSEEN, CALL)
    for change in (lora, heal.joined(*halves)):
        with heal.adapted(pipe.transformer, change), erase.gated(pipe.transformer, mask):
            found = final(pipe, pipe.transformer, UNSEEN, CALL)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    assert (found - final(pipe, pipe.transformer, UNSEEN, CALL)).abs().max() > 0.05


def test_path_error(pipe):
    """Two paths whose velocities differ by 1 in all of 4 steps are 1 apart, by 1 in the last step
    (1 / 4)^2 in one step of 4. The model's own path ends in what it draws."""
    apart = [torch.full((2, 3, 5), k / 4) for k in (1, 2, 3, 4)]
    same = [torch.zeros(2, 3, 5)] * 4
    torch.testing.assert_close(heal.path_error(apart, same), torch.ones(2))
    late = [*same[:3], torch.full((2, 3, 5), 1 / 4)]
    torch.testing.assert_close(heal.path_error(late, same), torch.full((2,), 1 / 64))
    with torch.no_grad():
        path = erase.rollout_path(pipe, UNSEEN, range(len(UNSEEN)), **CALL)
    assert len(path) == CALL["num_inference_steps"]
    assert torch.equal(path[-1], final(pipe, pipe.transformer, UNSEEN, CALL))


def test_end_to_end(pipe):
    """At its start the LoRA changes nothing, to the bit; its loss falls, the weights stay as they
    are; the same seed gives the same, and so does going on from a state; gradients are those of
    finite differences."""
    shapes = heal.shapes_of(pipe.transformer, 4)
    with heal.adapted(pipe.transformer, heal.as_lora(heal.start(pipe.transformer, 4, 0), shapes)):
        begun = final(pipe, pipe.transformer, UNSEEN, CALL)
    assert torch.equal(begun, final(pipe, pipe.transformer, UNSEEN, CALL))

    mask = random_mask(pipe.transformer)
    pairs = [(CONCEPT[0], "nothing on a red background")]
    how = dict(beta=1.0, batch=2, retain_batch=2, hard=0.5)
    how |= dict(call=CALL, error_of=heal.path_error)

    def tuned(first=0, state=None, steps=8):
        learn, latest = erase.learner(pipe, pairs, RETAIN[:2], **how)
        rows, states = [], []

        def keep(metrics, state):
            rows.append(metrics["loss"])
            states.append({name: tensor.clone() for name, tensor in state.items()})

        learn = partial(learn, gates=mask)
        own = dict(steps=steps, lr=5e-3, rank=4)
        return heal.tune(pipe, {}, learn, latest, first, state, keep, **own), rows, states

    lora, losses, states = tuned()
    assert min(losses[-3:]) < 0.8 * losses[0]
    again, rest, _ = tuned(3, states[2])
    assert rest == losses[3:]
    assert all(torch.equal(x, y) for n in lora for x, y in zip(lora[n], again[n], strict=True))

    flat = states[-1]["lora"].clone().requires_grad_()
    learn, _ = erase.learner(pipe, pairs, RETAIN[:2], **how)
    learn("3 0", flat, mask, heal.as_lora(flat, shapes))
    step = 2e-2 * flat.grad / flat.grad.norm()

    def loss_at(moved):
        learn, _ = erase.learner(pipe, pairs, RETAIN[:2], **how)
        leaf = moved.detach().requires_grad_()
        return learn("3 0", leaf, mask, heal.as_lora(leaf, shapes))["loss"]

    slope = (loss_at(flat + step) - loss_at(flat - step)) / 2
    assert slope == pytest.approx((flat.grad * step).sum().item(), rel=0.05)


def first_changed(base, masked, state) -> list:
    """The layers of the first stage that reads what the mask changes."""
    with refit.replaying(masked) as run, refit.replaying(base) as teach:
        for _, names in refit.stages(base, state):
            now, before = run(state, names, [], {}), teach(state, names, [], {})
            if not all(torch.equal(now[name][0], before[name][0]) for name in names):
                return names


def test_a_layer_is_plain_least_squares(pipe):
    """The first layers whose inputs the mask changes, on all rows at once, ridge as rows."""
    mask = random_mask(pipe.transformer)
    lora = refitted(pipe, mask, {}, CONCEPT[:1], RETAIN[:4], CALL, rank=1000, batch=2)
    sample = partial(erase.rollout, pipe, **CALL)
    masked = erased(pipe.transformer, mask, {})
    concept = CONCEPT[:1] * refit.PICTURES
    with torch.no_grad():
        kept = refit.states(pipe.transformer, sample, RETAIN[:4], refit.NOISE, 2)
        with erase.gated(pipe.transformer, mask):
            other = refit.states(pipe.transformer, sample, concept, refit.NOISE + 2**21, 2)
        names = first_changed(pipe.transformer, masked, kept[0])
        rows = []
        with refit.replaying(masked) as run, refit.replaying(pipe.transformer) as teach:
            for state in kept:
                rows.append((run(state, names, [], {}), teach(state, names, [], {}), 1.0))
            for state in other:
                found = run(state, names, [], {})
                rows.append((found, found, refit.CONCEPT**0.5))
    for name in names:
        x = torch.cat([weight * m[name][0] for m, _, weight in rows]).double()
        y = torch.cat([weight * (b[name][1] - m[name][1]) for m, b, weight in rows]).double()
        ridge = (0.01 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
        y = torch.cat([y, torch.zeros(len(ridge), y.shape[1]).double()])
        wanted = torch.linalg.lstsq(torch.cat([x, ridge]), y).solution.T.float()
        assert wanted.abs().max() > 1e-3
        a, b = lora[name]
        torch.testing.assert_close(b @ a, wanted, rtol=1e-3, atol=1e-4)
        a, b = heal.best_ranks(wanted, 3)
        values = torch.linalg.svdvals(wanted)
        left = torch.linalg.matrix_norm(wanted - b @ a)
        torch.testing.assert_close(left, values[3:].square().sum().sqrt(), rtol=1e-3, atol=1e-5)


def test_several_teachers(pipe):
    """One LoRA fitted to two others, each on its own prompts, comes nearer to each there than their
    sum and than the base, and nearer to the base elsewhere than the sum."""
    shapes = heal.shapes_of(pipe.transformer, 2)
    size = heal.size_of(pipe.transformer, 2)
    loras = []
    for seed in (0, 1):
        flat = 0.07 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
        loras.append(heal.as_lora(flat, shapes))
    prompts = CONCEPT[:1], [CONCEPT[-1]]
    assert prompts[0] != prompts[1]
    teachers = [refit.Teacher(*x) for x in zip(prompts, [contextlib.nullcontext] * 2, loras)]
    sample = partial(erase.rollout, pipe, **CALL)
    how = dict(retain=RETAIN * 4, strength=0.01, rank=128)
    both = refit.refit(pipe.transformer, sample, contextlib.nullcontext, teachers, **how)
    candidates = [erased(pipe.transformer, {}, x) for x in (both, heal.joined(*loras), {})]

    def errors(teacher, prompts):
        wanted = final(pipe, erased(pipe.transformer, {}, teacher), prompts, CALL)
        made = [final(pipe, model, prompts, CALL) for model in candidates]
        return [erase.squared_error(x, wanted).mean().item() for x in made]

    for teacher, own in zip(loras, prompts, strict=True):
        ours, of_sum, of_base = errors(teacher, own)
        assert ours < of_sum and ours < of_base, (ours, of_sum, of_base)
    ours, of_sum, _ = errors({}, UNSEEN)
    assert ours < of_sum, (ours, of_sum)


@pytest.mark.parametrize("name", ALL)
def test_replay(name):
    """What is computed from remembered blocks has the bits of a whole forward."""
    pipe, call = ALL[name]()
    models.remember_prompts(pipe)
    sample = partial(erase.rollout, pipe, **call | dict(num_inference_steps=2))
    with torch.no_grad():
        state = refit.states(pipe.transformer, sample, RETAIN[:2], 0, 2)[0]
    memory = {}
    with torch.no_grad(), refit.replaying(pipe.transformer) as run:
        for done, names in refit.stages(pipe.transformer, state):
            quick, whole = run(state, names, done, memory), run(state, names, [], {})
            assert set(quick) == set(whole) == set(names)
            for layer in names:
                for a, b in zip(quick[layer], whole[layer], strict=True):
                    assert torch.equal(a, b), layer
    assert memory


@pytest.mark.parametrize("name", ["schnell", "flux2_klein", "sd3", "z_image", "sana"])
def test_families(name):
    """Each layer's error on what it was fitted to falls; with an empty mask nothing changes."""
    pipe, call = ALL[name]()
    models.remember_prompts(pipe)
    call |= dict(num_inference_steps=2)
    mask = random_mask(pipe.transformer, 0.3, ("ffn",))
    how = dict(call=call, rank=1000, batch=16)
    lora = refitted(pipe, mask, {}, CONCEPT[:1], RETAIN[:4], **how)
    assert set(lora) == set(heal.lora_layers(pipe.transformer)) != set()
    assert all(part.isfinite().all() for pair in lora.values() for part in pair)
    sample = partial(erase.rollout, pipe, **call)
    with torch.no_grad():
        states = refit.states(pipe.transformer, sample, RETAIN[:4], refit.NOISE, 2)
    base, masked, mended = (
        layer_outputs(pipe, m, change, states)
        for m, change in ((None, {}), (mask, {}), (mask, lora))
    )
    for layer, wanted in base.items():
        before, after = ((x[layer] - wanted).square().mean() for x in (masked, mended))
        assert after < before or before < 1e-12, layer
    if name in families.FAMILIES:  # others' FFNs are convolutions, or so narrow that much is lost
        masked, mended = (erased(pipe.transformer, mask, change) for change in ({}, lora))
        assert error(pipe, mended, RETAIN[:4], call) < error(pipe, masked, RETAIN[:4], call)
    nothing = {site: torch.ones_like(gates) for site, gates in mask.items()}
    lora = refitted(pipe, nothing, {}, CONCEPT[:1], RETAIN[:2], **how)
    assert max((b @ a).abs().max() for a, b in lora.values()) < 1e-6


BASE = dict(transformer="of these weights")


def test_another_device():
    """What comes from files lies in CPU memory, and goes where the model is: a LoRA that is added
    to one there, a teacher's, and a resumed run's state. The other device is torch's meta."""
    transformer = models.inspect_model("tiny/flux")[1]
    shapes = heal.shapes_of(transformer, 2)
    here = heal.as_lora(heal.start(transformer, 2, 0), shapes)
    there = heal.as_lora(heal.start(transformer, 2, 0).to("meta"), shapes)
    for first, second in ((there, here), (here, here)):
        both = heal.joined(first, second)
        assert all(a.device == first[name][0].device for name, (a, _) in both.items())
        assert all(a.shape[0] == b.shape[1] == 4 for a, b in both.values())
    name = next(iter(here))
    with heal.adapted(transformer, {name: here[name]}):
        layer = transformer.get_submodule(name)
        assert layer(torch.zeros(1, layer.in_features, device="meta")).device.type == "meta"

    flat = heal.start(transformer, 2, 0)
    state = dict(latest=torch.ones(3), lora=flat, step=torch.tensor(1.0))
    state |= dict(exp_avg=flat, exp_avg_sq=flat)
    pipe = SimpleNamespace(transformer=transformer, _execution_device=torch.device("meta"))

    def learn(key, leaf, lora):
        leaf.grad = torch.zeros_like(leaf)
        return dict(erase_loss=0.0, preserve_loss=0.0)

    how = dict(steps=2, lr=0.1, rank=2)
    lora = heal.tune(pipe, {}, learn, torch.ones(3), 1, state, None, **how)
    assert lora.keys() == here.keys()


def test_saved_and_loaded(pipe, healed, tmp_path):
    """The same bits; nothing but the same file for the same base and mask is loaded."""
    mask, lora = healed
    file = tmp_path / "heal.safetensors"
    heal.save(file, lora, BASE, mask)
    loaded = heal.load(file, pipe.transformer, BASE, mask)
    both = [erased(pipe.transformer, mask, change) for change in (lora, loaded)]
    assert torch.equal(*(final(pipe, model, UNSEEN, CALL) for model in both))

    with pytest.raises(UserError, match="made for base"):
        heal.load(file, pipe.transformer, dict(transformer="another"), mask)
    with pytest.raises(UserError, match="made for mask"):
        heal.load(file, pipe.transformer, BASE, random_mask(pipe.transformer, 0.1))
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="made for format None"):
        heal.load(tmp_path / "empty.safetensors", pipe.transformer, BASE, mask)


def changed(tensors, change):
    return {name: change(tensor).contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: dict(list(t.items())[1:]), "tensors are not those"),
        (lambda t: t | dict(another=torch.zeros(1)), "tensors are not those"),
        (lambda t: changed(t, lambda x: x[:-1].clone()), "tensors are not those"),
        (lambda t: changed(t, lambda x: x.flatten()), "tensors are not those"),
        (lambda t: changed(t, lambda x: x.sum()), "tensors are not those"),
        (lambda t: changed(t, lambda x: x / 0), "finite"),
        (lambda t: changed(t, lambda x: x.half()), "finite fp32"),
        (None, "not a readable safetensors file"),
    ],
)
def test_damaged(pipe, healed, tmp_path, damage, message):
    file = tmp_path / "heal.safetensors"
    heal.save(file, healed[1], BASE, healed[0])
    if damage:
        with safe_open(file, "pt") as f:
            metadata = f.metadata()
        save_file(damage(load_file(file)), file, metadata)
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=message):
        heal.load(file, pipe.transformer, BASE, healed[0])


def test_command_line(pipe, tmp_path):
    """A run that heals: resumed in the middle of it the same files; what load_erased gives is what
    transformer/ holds; without the LoRA's file, or with one that is not of the run, refused; a
    stock pipeline loads the LoRA where PEFT is installed."""
    line = [*QUICK, "--heal", "1", "--heal_steps", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run("erase.py", *line, "--out_dir", whole)
    assert done.returncode == 0, done.stderr
    rows = (whole / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(7))

    shutil.copytree(whole, killed)
    (killed / "mask.safetensors").unlink()
    with safe_open(whole / "heal_state.safetensors", "pt") as f:
        assert f.metadata() == dict(step="3")
    (killed / "heal_state.safetensors").unlink()
    done = run("erase.py", *line, "--out_dir", killed, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("mask.safetensors", "heal.safetensors", "preview.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name

    loaded = artefacts.load_erased(whole, "cpu").transformer
    stock = type(loaded).from_pretrained(whole / "transformer")
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    only_mask = erased(pipe.transformer, artefacts.load_mask(whole / "mask.safetensors", pipe), {})
    assert not torch.equal(only_mask.proj_out.weight, torch.zeros(1))
    assert any(not torch.equal(t, only_mask.state_dict()[n]) for n, t in stock.state_dict().items())

    try:
        import peft  # noqa: F401
    except ImportError:
        pass
    else:
        other = copy.copy(pipe)
        other.transformer = only_mask
        other.load_lora_weights(whole, weight_name="heal.safetensors")
        torch.testing.assert_close(
            final(pipe, other.transformer, UNSEEN, CALL),
            final(pipe, stock, UNSEEN, CALL),
            rtol=0,
            atol=2e-3,
        )

    (killed / "heal.safetensors").unlink()
    with pytest.raises(UserError, match="heal.safetensors: not a readable"):
        artefacts.load_erased(killed, "cpu")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | dict(heal=0)))
    with pytest.raises(UserError, match="heal.safetensors: is not of this run"):
        artefacts.load_erased(whole, "cpu")
    (whole / "config.json").write_text(json.dumps(config | dict(heal=7)))
    with pytest.raises(UserError, match="heal is 7, not 0 or 1"):
        artefacts.load_erased(whole, "cpu")


def refused(capsys, *line) -> str:
    assert erase.main([str(word) for word in line]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    return error[0]


def test_compose(pipe, request, tmp_path, capsys, monkeypatch):
    """The composed mask closes the half of what any part closes that harms least, all of it without
    a LoRA; nothing is trained but what mends; the folder is an erased folder like any; one part can
    be taken out again; what does not fit is refused."""
    monkeypatch.setattr(erase, "harm_of_closing", partial(erase.harm_of_closing, draws=8))
    parts = [request.getfixturevalue("erased"), tmp_path / "knife"]
    line = [*QUICK, "--steps", "2", "--out_dir", parts[1]]
    line[line.index("gun")] = "knife"
    assert run("erase.py", *line).returncode == 0
    masks = [artefacts.load_mask(part / "mask.safetensors", pipe) for part in parts]

    both = tmp_path / "both"
    short = ["--heal_steps", "2", "--retain", FEW_RETAIN, "--batch", "2", "--retain_batch", "2"]
    done = run("erase.py", "--compose", *parts, *short, "--out_dir", both)
    assert done.returncode == 0, done.stderr
    mask = artefacts.load_mask(both / "mask.safetensors", pipe)
    union = {site: gates * masks[1][site] for site, gates in masks[0].items()}
    retain = promptfiles.of_split(promptfiles.retain_rows(str(FEW_RETAIN)), "train")
    prompts = [row["prompt"] for row in promptfiles.without(["gun", "knife"], retain)]
    harm = erase.harm_of_closing(
        pipe, prompts, gate_sites(pipe.transformer), call=models.CALLS["tiny/flux"]
    )
    capsys.readouterr()  # its progress
    flat, everything = (torch.cat(list(x.values())) for x in (mask, union))
    harms = torch.cat([harm[site] for site in mask])
    assert ((flat == 0) <= (everything == 0)).all()
    opened, closed = (flat == 1) & (everything == 0), flat == 0
    assert opened.sum() == round(0.5 * int((everything == 0).sum())) > 0
    assert harms[opened].min() >= harms[closed].max()
    config = artefacts.erased_config(both)
    assert config["concept"] == ["gun", "knife"] and len(config["parts"]) == 2
    loaded = artefacts.load_erased(both, "cpu").transformer
    together = artefacts.load_erased(*parts, "cpu").transformer
    wanted = erased(pipe.transformer, union, {}).state_dict()
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in together.state_dict().items())
    assert any(not torch.equal(tensor, wanted[n]) for n, tensor in loaded.state_dict().items())

    alone = tmp_path / "alone"
    line = ["--compose", both, "--restore", "gun", "--heal", "0", "--retain", FEW_RETAIN]
    assert run("erase.py", *line, "--out_dir", alone).returncode == 0
    found = artefacts.load_mask(alone / "mask.safetensors", pipe)
    assert all(torch.equal(gates, masks[1][site]) for site, gates in found.items())
    assert artefacts.erased_config(alone)["concept"] == ["knife"]

    for name, about in dict(to_guns=dict(), second=dict(on="erased/x")).items():
        shutil.copytree(parts[1], tmp_path / name)
        config = json.loads((parts[1] / "config.json").read_text()) | dict(neutral="a gun") | about
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    mix = tmp_path / "mix"  # a composed folder with a part of its own neutral prompts, and on it
    stacks = dict(mix=dict(parts={str(tmp_path / "to_guns"): ""}), stacked=dict(on=str(mix)))
    for name, about in stacks.items():
        shutil.copytree(parts[1], tmp_path / name)
        config = json.loads((parts[1] / "config.json").read_text()) | about
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="have gun in common; leave one of them out"):
        artefacts.load_erased(both, parts[0])
    for name, below in dict(on_gun=parts[0], higher=tmp_path / "on_gun").items():
        config = json.loads((parts[1] / "config.json").read_text()) | dict(on=str(below))
        shutil.copytree(parts[1], tmp_path / name, dirs_exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for pair in ((parts[0], tmp_path / "higher"), (both, tmp_path / "higher")):
        with pytest.raises(UserError, match="have gun in common; leave one of them out"):
            artefacts.check_apart(pair)
    with pytest.raises(UserError, match="one of the folders is named twice"):
        artefacts.load_erased(parts[0], parts[0])
    shutil.copytree(both, tmp_path / "killed")
    (tmp_path / "killed/mask.safetensors").unlink()
    line = ["--compose", *parts, *short, "--out_dir", tmp_path / "killed", "--resume"]
    assert "--resume: --refit was 0.01, now 0.0" in refused(capsys, *line, "--refit", "0")
    dry = ["--dry_run", "--out_dir", tmp_path / "no"]
    there = "/".join(("..", Path(both).parent.name, "both"))  # the same by another name
    args = erase.parse_args([*map(str, ("--compose", both, parts[0], tmp_path / there))])
    assert [part.name for part in args.compose] == ["gun", "knife"] and args.refit_rank == 128
    shutil.copytree(parts[1], tmp_path / "other_size")
    config = json.loads((parts[1] / "config.json").read_text())
    config["call"] |= dict(height=48)
    (tmp_path / "other_size/config.json").write_text(json.dumps(config))
    for line, wanted in (
        (["--compose", parts[0], tmp_path / "other_size"], "other_size has 48"),
        (["--compose", both, "--restore", "dog"], "--restore: none of the folders erases 'dog'"),
        (["--compose", both, "--concept", "gun"], "--concept: does not go with"),
        (["--compose", both, "--model", "tiny/flux"], "--model: does not go with"),
        (["--compose", both, "--steps", "9"], "--steps: does not go with --compose"),
        (["--compose", *parts, "--refit", "0"], "--refit: 0 leaves no LoRA; add --heal_steps, or"),
        (["--compose", *parts, "--gate", "sigmoid"], "--gate: does not go with --compose"),
        (["--compose", *parts, "--beta", "1"], "--beta: does not go with --compose"),
        (["--compose", alone, "--restore", "knife"], "--restore: nothing is left to erase"),
        (["--compose", tmp_path], "no finished erased model"),
        (["--compose", parts[0], tmp_path / "to_guns"], "every neutral prompt of 'knife' names"),
        (
            ["--compose", parts[0], tmp_path / "second"],
            "second stands on erased/x, and one",
        ),
        (["--compose", parts[0], tmp_path / "stacked"], f"stacked stands on {mix}, and one"),
        (["--compose", *parts, tmp_path / "to_guns"], "to_guns names what is to be erased beside"),
        (["--concept", "gun", "--restore", "gun"], "--restore: goes with --compose"),
        ([], "the following arguments are required: --concept"),
    ):
        assert wanted in refused(capsys, *line, *dry), line
    (parts[1] / "heal.safetensors").write_text("")  # the same mask, another LoRA
    assert "is gone or has changed" in refused(capsys, "--compose", both, *dry)
    shutil.rmtree(parts[1])
    assert "is gone or has changed" in refused(capsys, "--compose", both, *dry)


def test_import_mask(pipe, tmp_path, capsys):
    """Lists of tensors as the authors' code keeps them, one a layer, become an erased folder whose
    gates are closed where a value is 0 or less; what does not fit is refused by name, a pickle with
    a line that says how to convert it."""
    generator = torch.Generator().manual_seed(0)
    lists, wanted = {}, {}
    for module in ("ffn", "norm"):
        for i, (name, site) in enumerate(gate_sites(pipe.transformer, (module,)).items()):
            values = torch.randn(site.units, generator=generator) + 2
            lists[f"{module}.{i}"], wanted[name] = values[None], (values > 0).float()
    file = tmp_path / "theirs.safetensors"
    save_file(lists, file)
    line = [
        "--import_mask",
        str(file),
        "--concept",
        "gun",
        "--model",
        "tiny/flux",
        "--save",
        "mask",
    ]
    done = run("erase.py", *line, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    mask = artefacts.load_mask(tmp_path / "out/mask.safetensors", pipe)
    assert all(torch.equal(mask[name], gates) for name, gates in wanted.items())
    assert artefacts.load_erased(tmp_path / "out", device="cpu")

    (tmp_path / "ff.pt").write_bytes(b"pickle")
    some = [(lists | {"ffn.0": lists["ffn.0"][:, 1:]}, "ffn.0 has 511 values, ")]
    some += [({k: v for k, v in lists.items() if k != "norm.1"}, "norm.1 is missing")]
    some += [
        ({k: v for k, v in lists.items() if k != "norm.3"}, "has of norm 3 tensors, the model 4")
    ]
    some += [(lists | dict(attn=torch.ones(3)), "attn is neither ffn. nor norm. and a number")]
    some += [({k: torch.ones_like(v) for k, v in lists.items()}, "closes nothing")]
    for i, (tensors, message) in enumerate(some):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        line[1] = str(tmp_path / f"{i}.safetensors")
        assert message in refused(capsys, *line, "--out_dir", tmp_path / "no"), message
    line[1] = str(tmp_path / "ff.pt")
    assert "is never unpickled; convert it" in refused(capsys, *line)
    line[1] = str(file)
    assert "--steps: does not go with --import_mask" in refused(capsys, *line, "--steps", "9")
    for flag in ("--beta", "--heal_steps"):
        assert f"{flag}: does not go with --import_mask" in refused(capsys, *line, flag, "2")
