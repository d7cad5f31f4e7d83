"""heal.py. Oracles: the base's own latents, weights added by hand, files changed on purpose."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import artefacts
import erase
import families
import heal
import models
from safely import UserError
from sites import closed_slices, fold, gate_sites

ALL = families.FAMILIES | families.OTHERS
CALL = models.CALLS["tiny/flux"] | dict(num_inference_steps=2)
CONCEPT = ["a gun on a red background", "a gun next to a dog", "we see a gun"]
COLOURS = ("red", "blue", "green", "gray")
RETAIN = [f"{x} on a {colour} background" for x in ("a dog", "a hat") for colour in COLOURS]
UNSEEN = ["a dog next to a hat", "a hat on a pink background", "we see a dog"]


def random_mask(transformer, closed=0.2, modules=("ffn", "norm")):
    generator = torch.Generator().manual_seed(2)
    mask = {}
    for name, site in gate_sites(transformer, modules).items():
        mask[name] = (torch.rand(site.units, generator=generator) >= closed).float()
    return mask


def erased(transformer, mask, deltas):
    model = copy.deepcopy(transformer)
    fold(model, mask)
    heal.apply(model, deltas)
    return model


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
def layer_outputs(pipe, mask, deltas, states) -> dict:
    """{layer: what it makes of all states, a row a token}."""
    transformer = erased(pipe.transformer, mask or {}, deltas)
    outputs = {name: [] for name in heal.readers(transformer)}
    with heal.replaying(transformer) as run:
        for _, names in heal.stages(transformer, states[0]):
            for state in states:
                for name, (_, output) in run(state, names, [], {}).items():
                    outputs[name].append(output)
    return {name: torch.cat(rows) for name, rows in outputs.items()}


@pytest.fixture(scope="module")
def healed(pipe):
    """(mask, deltas) of tiny/flux."""
    mask = random_mask(pipe.transformer)
    before = copy.deepcopy(pipe.transformer.state_dict())
    deltas = heal.heal(pipe, mask, CONCEPT, RETAIN, call=CALL, draws=(1, 4))
    now = pipe.transformer.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert not any("forward" in vars(block) for block in pipe.transformer.transformer_blocks)
    return mask, deltas


def test_prompts_not_seen_are_mended_too(pipe, healed):
    mask, deltas = healed
    masked, mended = (erased(pipe.transformer, mask, d) for d in ({}, deltas))
    assert error(pipe, mended, UNSEEN, CALL) < 0.8 * error(pipe, masked, UNSEEN, CALL)


def test_closed_neurons_stay_zero(pipe, healed):
    mask, deltas = healed
    mended = erased(pipe.transformer, mask, deltas)
    for name, dim, index in closed_slices(mended, mask):
        assert not mended.get_parameter(name).index_select(dim, index).any(), name


def test_a_layer_is_plain_least_squares(pipe):
    """The first layer whose inputs the mask changes, on all of its rows at once, ridge as rows."""
    mask = random_mask(pipe.transformer)
    deltas = heal.heal(pipe, mask, [], RETAIN[:4], call=CALL, batch=2, draws=(1, 1))
    states = heal.states(pipe, RETAIN[:4], heal.NOISE, CALL, 2)
    order = heal.stages(pipe.transformer, states[0])
    _, names = order[0]
    masked = erased(pipe.transformer, mask, {})
    with torch.no_grad(), heal.replaying(masked) as run, heal.replaying(pipe.transformer) as teach:
        found = [(run(s, names, [], {}), teach(s, names, [], {})) for s in states]
    for name in names:
        x = torch.cat([of_masked[name][0] for of_masked, _ in found]).double()
        y = torch.cat([b[name][1] - m[name][1] for m, b in found]).double()
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        ridge = (0.01 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
        y = torch.cat([y, torch.zeros(len(ridge), y.shape[1]).double()])
        wanted = torch.linalg.lstsq(torch.cat([x, ridge]), y).solution.T.float()
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(deltas[f"{name}.weight"], wanted[:, :-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deltas[f"{name}.bias"], wanted[:, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_replay(name):
    """What is computed from remembered blocks has the bits of a whole forward."""
    pipe, call = ALL[name]()
    models.remember_prompts(pipe)
    state = heal.states(pipe, RETAIN[:2], 0, call | dict(num_inference_steps=2), 2)[0]
    memory = {}
    with torch.no_grad(), heal.replaying(pipe.transformer) as run:
        for done, names in heal.stages(pipe.transformer, state):
            quick, whole = run(state, names, done, memory), run(state, names, [], {})
            assert set(quick) == set(whole) == set(names)
            for layer in names:
                for a, b in zip(quick[layer], whole[layer], strict=True):
                    assert torch.equal(a, b), layer
    assert memory


@pytest.mark.parametrize("name", [*families.FAMILIES, "lumina2", "sana", "krea2"])
def test_families(name):
    """Each layer's error on what it was fitted to falls; with an empty mask nothing changes."""
    pipe, call = ALL[name]()
    models.remember_prompts(pipe)
    call |= dict(num_inference_steps=2)
    mask = random_mask(pipe.transformer, 0.3, ("ffn",))
    how = dict(call=call, draws=(1, 1), batch=2)
    deltas = heal.heal(pipe, mask, CONCEPT[:1], RETAIN[:4], **how)
    ends = (".weight", ".bias")
    known = {f"{layer}{end}" for layer in heal.readers(pipe.transformer) for end in ends}
    assert deltas and set(deltas) == known & set(pipe.transformer.state_dict())
    assert all(delta.isfinite().all() for delta in deltas.values())
    states = heal.states(pipe, RETAIN[:4], heal.NOISE, call, 2)
    base, masked, mended = (
        layer_outputs(pipe, m, d, states) for m, d in ((None, {}), (mask, {}), (mask, deltas))
    )
    for layer, wanted in base.items():
        before, after = ((x[layer] - wanted).square().mean() for x in (masked, mended))
        assert after < before or before < 1e-12, layer
    if name in families.FAMILIES:  # others' FFNs are convolutions, or so narrow that much is lost
        masked, mended = (erased(pipe.transformer, mask, d) for d in ({}, deltas))
        assert error(pipe, mended, RETAIN[:4], call) < error(pipe, masked, RETAIN[:4], call)
    nothing = {site: torch.ones_like(gates) for site, gates in mask.items()}
    deltas = heal.heal(pipe, nothing, CONCEPT[:1], RETAIN[:2], **how)
    assert max(delta.abs().max() for delta in deltas.values()) < 1e-6


def test_saved_and_loaded(pipe, healed, tmp_path):
    """The same bits; nothing but the same file for the same base and mask is loaded."""
    mask, deltas = healed
    base, modules = artefacts.fingerprint(pipe.transformer), ("ffn", "norm")
    mask_file, file = tmp_path / "mask.safetensors", tmp_path / "heal.safetensors"
    artefacts.save_mask(mask_file, mask, base, modules)
    heal.save(file, deltas, base, mask_file)
    loaded = heal.load(file, pipe.transformer, base, mask_file)
    both = [erased(pipe.transformer, mask, d) for d in (deltas, loaded)]
    assert torch.equal(*(final(pipe, model, UNSEEN, CALL) for model in both))

    with pytest.raises(UserError, match="made for base"):
        heal.load(file, pipe.transformer, "another", mask_file)
    other = tmp_path / "other.safetensors"
    artefacts.save_mask(other, random_mask(pipe.transformer, 0.1), base, modules)
    with pytest.raises(UserError, match="made for mask"):
        heal.load(file, pipe.transformer, base, other)
    with pytest.raises(UserError, match="made for format None"):
        heal.load(mask_file, pipe.transformer, base, mask_file)


def without_first(deltas):
    return dict(list(deltas.items())[1:])


def changed(deltas, change):
    return {name: change(delta) for name, delta in deltas.items()}


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_first, "tensors are not those"),
        (lambda d: d | dict(another=torch.zeros(1)), "tensors are not those"),
        (lambda d: changed(d, lambda x: x[:-1].clone()), "tensors are not those"),
        (lambda d: changed(d, lambda x: x / 0), "finite"),
        (lambda d: changed(d, lambda x: x.half()), "finite fp32"),
        (None, "not a readable safetensors file"),
    ],
)
def test_damaged(pipe, healed, tmp_path, damage, message):
    file, mask_file = tmp_path / "heal.safetensors", tmp_path / "mask.safetensors"
    artefacts.save_mask(mask_file, healed[0], "base", ("ffn", "norm"))
    heal.save(file, healed[1], "base", mask_file)
    if damage:
        with safe_open(file, "pt") as f:
            metadata = f.metadata()
        save_file(damage(load_file(file)), file, metadata)
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=message):
        heal.load(file, pipe.transformer, "base", mask_file)
