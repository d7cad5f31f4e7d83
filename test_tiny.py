"""The embedded models and how they are trained. Oracles: the stock pipelines, torch's own Muon, the
world's rules."""

import random
import sys

import pytest
import torch
from diffusers import FluxPipeline

import erase
import models

sys.path.insert(0, str(models.HERE / "tiny"))
import flows
import train
import world

CAPTIONS = ["a gun on a red background", "a cherry and a dog on a blue background"]


@pytest.mark.parametrize("family", flows.FAMILIES)
def test_velocity_is_the_stock_pipelines(family, monkeypatch):
    """What training fits is what the stock pipeline's sampler steps along, from the same captions,
    and each file is of 16 MB or less."""
    model = str(models.HERE / "tiny" / family)
    pipe = models.load_pipeline(model, "cpu")
    seen = []
    stock = pipe.scheduler.step

    def step(velocity, t, x, *args, **kwargs):
        seen.append((velocity, t / 1000, x))
        return stock(velocity, t, x, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", step)
    with torch.no_grad():
        erase.rollout(pipe, CAPTIONS, [0, 1], **models.sampler_call(model, type(pipe)))
    assert [s.item() for _, s, _ in seen] == [1, 0.75, 0.5, 0.25]
    of_family = flows.FAMILIES[family]
    tokens = of_family.tokens(pipe, CAPTIONS, random.Random(1))  # which drops none
    for velocity, s, x in seen:
        if family == "zimage":  # not packed there
            velocity, x = [FluxPipeline._pack_latents(v, 2, 16, 8, 8) for v in (velocity, x)]
        with torch.no_grad():
            found = of_family.velocity(pipe, x, s.expand(2), tokens)
        assert torch.allclose(found, velocity, rtol=1e-4, atol=1e-5), (found - velocity).abs().max()
    sizes = [f.stat().st_size for f in (models.HERE / "tiny" / family).rglob("*") if f.is_file()]
    assert max(sizes) <= 16e6


def test_noise_asks_for_the_layout():
    """The things stand where the noise is largest along their directions, and it stays normal."""
    rng = random.Random(0)
    scenes = [world.sample_scene(rng) for _ in range(512)]
    noise = train.noise_for(scenes, torch.Generator().manual_seed(0))
    along = (noise @ train.DIRECTIONS.T).transpose(1, 2).flatten(1)
    right = [0, 0]
    for scene, coordinates in zip(scenes, along, strict=True):
        if len(scene.windows) == 2:
            asked = world.PAIR_WINDOWS[(train.PAIR_SCORES @ coordinates).argmax()]
            right[asked == scene.windows] += 1
        elif scene.windows:
            asked = world.SINGLE_WINDOWS[(train.SINGLE_SCORES @ coordinates).argmax()]
            right[asked == scene.windows[0]] += 1
    assert right[True] > 0.99 * sum(right) > 300
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_muon_steps_along_orthogonal_matrices():
    """Matrices of one shape step together as each would alone, and nearly as torch.optim.Muon."""
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)]
    gradients = [torch.randn_like(p) for p in start]

    def stepped(optimizer, params, **rate):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        for group in optimizer.param_groups:
            group |= rate
        optimizer.step()
        return [p - before for p, before in zip(params, start, strict=True)]

    params = [torch.nn.Parameter(p.clone()) for p in start]
    found = stepped(train.Muon(params), params, lr=0.1)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    how = dict(lr=0.1, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    wanted = stepped(torch.optim.Muon(params, **how), params)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.98
        assert 0.7 < (ours.norm() / theirs.norm()).item() < 1.4


def test_training_goes_on_with_its_own_settings_alone(tmp_path):
    """A checkpoint of other settings, and a stage that would be left out, are refused; the models
    that come with the kit are not what is written to."""
    assert train.parse_args([]).out == train.HERE / "work/model"
    with pytest.raises(train.UserError, match="^--stages: judge stays with --without"):
        train.parse_args(["--without", "gun", "--stages", "judge"])
    layer = torch.nn.Linear(4, 4)

    def optimizers():
        named = layer.named_parameters()
        return train.Optimizers(named, lambda _, p: p.ndim == 2, (1e-3, 1e-3), 0.95, (0.9, 0.98))

    settings = dict(flow_steps=9, init=None)
    file = tmp_path / "flow.pt"
    train.save_progress(file, 3, optimizers(), settings, layer=layer.state_dict())
    how = (file, "cpu", optimizers(), lambda state: layer.load_state_dict(state["layer"]))
    assert train.load_progress(*how, settings) == 3
    with pytest.raises(train.UserError, match="flow.pt: made with init None, now tiny; delete it"):
        train.load_progress(*how, settings | dict(init="tiny"))
