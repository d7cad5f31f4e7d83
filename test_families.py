"""Each family of pipelines on a tiny random one (families.py). Oracles: the stock pipeline, plain
autograd, finite differences, weights folded in."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel

import erase
import memory
import models
from families import FAMILIES, OTHERS
from memory import blocks_of
from recompute import checkpointed
from safely import UserError
from sites import MODULES, gate_sites

ALL = FAMILIES | OTHERS
PROMPTS = ["a red gun", "a big yellow dog"]  # of two lengths
SEEDS = [1, 2]
# Gates of each family, in the order of MODULES: ffn norm kv heads mlp.
GATES = dict(
    schnell=(4096, 3072, 1024, 24, 1024),
    flux_dev=(512, 384, 128, 8, 256),
    flux2_klein=(384, 0, 128, 4, 192),
    sd3=(384, 256, 128, 6, 0),
    z_image=(340, 384, 0, 8, 0),
    qwen_image=(512, 384, 128, 4, 0),
    chroma=(512, 0, 128, 8, 256),
    lumina2=(384, 0, 0, 4, 0),
    aura_flow=(1280, 384, 128, 12, 0),
    sana=(160, 0, 0, 8, 0),
    krea2=(120, 0, 0, 0, 0),
    ernie=(96, 0, 0, 4, 0),
)
GATES |= dict(flux2_klein_base=GATES["flux2_klein"], z_image_guided=GATES["z_image"])
# What no picture hangs on: the text's last FFN, whose output goes nowhere.
DEAD = dict(qwen_image=["transformer_blocks.1.txt_mlp.net.2"])


def units_of(transformer) -> tuple:
    every = [gate_sites(transformer, (module,)).values() for module in MODULES]
    return tuple(sum(site.units for site in sites) for sites in every)


def rollout(pipe, call, gates=None):
    with torch.no_grad(), erase.gated(pipe.transformer, gates or {}):
        return erase.rollout(pipe, PROMPTS, SEEDS, **call)


def stock_latents(pipe, call, count: int):
    """Of the first prompts, by pipe(...) itself."""
    latents = []

    def keep(pipe, step, timestep, tensors):
        latents[:] = [tensors["latents"]]
        return {}

    if "negative_prompt" in call:
        call = call | dict(negative_prompt=[call["negative_prompt"]] * count)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:count]]
    how = dict(output_type="latent", callback_on_step_end=keep, generator=generators)
    pipe(prompt=PROMPTS[:count], **how, **call)
    return latents[0]


@pytest.mark.parametrize("name", ALL)
def test_stock_pipeline_and_fold(name):
    """Gates open, a picture has the bits of pipe(...), also with gradients, recompute and no text
    encoders; a batch of two but for rounding. Every kind of module has the gates that it should;
    closed, they are bit for bit the fold, which zeroes both rows that make a neuron of a gated FFN,
    and not the base."""
    pipe, call = ALL[name]()
    one, two = stock_latents(pipe, call, 1), stock_latents(pipe, call, 2)
    models.remember_prompts(pipe)
    models.encode_all(pipe, "cpu", PROMPTS, call)
    transformer = pipe.transformer
    sites = gate_sites(transformer, MODULES)
    gates = {site: torch.ones(found.units, requires_grad=True) for site, found in sites.items()}
    with erase.gated(transformer, gates), checkpointed(pipe, "both", call):
        final = erase.rollout(pipe, PROMPTS[:1], SEEDS[:1], **call)
    base = rollout(pipe, call)
    assert torch.equal(final, one) and final.requires_grad and torch.allclose(base, two, atol=1e-4)
    assert units_of(transformer) == GATES[name]

    weights = {key: value.clone() for key, value in transformer.state_dict().items()}
    for module in [module for module, units in zip(MODULES, GATES[name], strict=True) if units]:
        sites = gate_sites(transformer, (module,))
        mask = {site: (torch.arange(sites[site].units) % 3 > 0).float() for site in sites}
        hooked = rollout(pipe, call, mask)
        erase.fold(transformer, mask)
        assert torch.equal(rollout(pipe, call), hooked) and not torch.equal(hooked, base), module
        for site in sites if module == "ffn" else ():
            for producer in sites[site].producers:
                rows = transformer.get_parameter(f"{producer}.weight").flatten(1)
                assert (rows == 0).all(1).float().mean() == (mask[site] == 0).float().mean()
        transformer.load_state_dict(weights)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    """In the gates, in all four modes: those of plain autograd, and of finite differences. By
    steps, all calls of the transformer but the last are computed again. A loss of the first picture
    alone has none in the second one's gates."""
    pipe, call = ALL[name]()
    models.remember_prompts(pipe)
    transformer = pipe.transformer
    sites = gate_sites(transformer, MODULES)
    start, direction = torch.rand(2, sum(GATES[name]), generator=torch.Generator().manual_seed(3))
    start = 0.5 + 0.5 * start
    shape = rollout(pipe, call).shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.double)

    def loss_of(final):
        return (final.double() - target).square().mean()

    def on_final(path):
        return loss_of(path[-1])

    plain = start.clone().requires_grad_()
    with erase.gated(transformer, erase.split(plain, sites)):
        loss_of(erase.rollout(pipe, PROMPTS, SEEDS, **call)).backward()
    drawn = []
    calls = memory.load_of(type(pipe), call).calls
    next(iter(blocks_of(transformer).values())).register_forward_pre_hook(
        lambda *_: drawn.append(1)
    )
    for mode, count in (("none", 0), ("step", calls - 1), ("block", 0), ("both", calls - 1)):
        drawn.clear()
        gates = start.clone().requires_grad_()
        with erase.gated(transformer, erase.split(gates, sites)):
            erase.rollout_backward(pipe, PROMPTS, SEEDS, on_final, mode, **call)
        assert (gates.grad - plain.grad).norm() < 1e-5 * plain.grad.norm(), mode
        assert len(drawn) == calls + count, mode
    grads = erase.split(plain.grad, sites)
    assert [site for site, grad in grads.items() if not grad.any()] == DEAD.get(name, [])

    direction = torch.nn.functional.normalize(direction - 0.5, dim=0)
    step = 1e-3 if name == "sana" else 2e-2  # the least linear of them

    def rise(distance):
        moved = [start + sign * distance * direction for sign in (1, -1)]
        above, below = (loss_of(rollout(pipe, call, erase.split(at, sites))) for at in moved)
        return above - below

    slope = (8 * rise(step) - rise(2 * step)) / (12 * step)
    assert (plain.grad @ direction).item() == pytest.approx(slope.item(), rel=0.02, abs=1e-5)

    gates = start.expand(2, -1).clone().requires_grad_()
    with erase.gated(transformer, erase.split(gates, sites)):
        how = dict(loss_of_path=lambda path: path[-1][0].square().mean(), **call)
        erase.rollout_backward(pipe, PROMPTS, SEEDS, **how)
    assert gates.grad[0].any() and not gates.grad[1].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_training(name, tmp_path):
    """Ten steps on a pair of prompts lower the loss under noises that training never had. python
    erase.py takes a folder of the family; load_erased draws what the stock pipeline draws with the
    transformer/ that was written."""
    pipe, call = FAMILIES[name]()
    sites = gate_sites(pipe.transformer, MODULES)
    gates = {}

    def keep(metrics, state):
        gates.update(erase.split(erase.sigmoid(state["logits"]), sites))

    settings = {flag: columns[1] for flag, columns in erase.DEFAULTS.items()}
    settings |= dict(gate="sigmoid", lr_ffn=0.5, lr_norm=0.5, adam_eps=1e-8, harm=0.0, beta=0.1)
    settings |= dict(batch=2, retain_batch=2, modules=MODULES, steps=10, checkpoint="none")
    pairs = [tuple(PROMPTS)]
    erase.train(pipe, pairs, ["a blue hat", "two cats"], call=call, on_step=keep, **settings)
    with torch.no_grad():
        how = dict(weights=None, call=call)
        before = erase.case_errors(pipe, pairs * 8, range(8), {}, **how).mean()
        assert erase.case_errors(pipe, pairs * 8, range(8), gates, **how).mean() < 0.9 * before

    out = tmp_path / "out"
    pipe.save_pretrained(tmp_path / "base")
    flags = dict(model=tmp_path / "base", concept="gun", device="cpu", out_dir=out, preset="tiny")
    head = "case_number,prompt,neutral_prompt,evaluation_seed,split\n"
    rows = dict(prompts="0,a red gun,a red dog,1,train", retain="0,a cat,,1,train\n1,hats,,2,train")
    for flag, text in rows.items():
        flags[flag] = tmp_path / f"{flag}.csv"
        flags[flag].write_text(f"{head}{text}\n")
    flags |= dict(
        heal_steps=2, steps=2, batch=2, retain_batch=2, lr_ffn=9, lr_norm=9, harm=0, adam_eps=1e-12
    )
    assert erase.main([f"--{flag}={value}" for flag, value in (flags | call).items()]) == 0
    assert json.loads((out / "config.json").read_text())["call"] == call
    loaded = rollout(erase.load_erased(out, "cpu"), call)
    assert not torch.equal(loaded, rollout(pipe, call))
    folded = type(pipe.transformer).from_pretrained(out / "transformer")
    pipe.register_modules(transformer=folded.requires_grad_(False))
    assert torch.equal(loaded, rollout(pipe, call))


def test_what_cannot_be_driven_is_refused(tmp_path, capsys):
    """A pipeline by its name and with what it lacks, from model_index.json alone; a transformer
    without a known FFN."""
    for kind in ("DDPMPipeline", "StableDiffusionPipeline", "NoSuchPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        assert erase.main(["--model", str(tmp_path), "--concept", "gun", "--device", "cpu"]) == 2
        lacks = "which this diffusers does not have" if "No" in kind else "which has no transformer"
        assert f"--model: {tmp_path} is a {kind}, {lacks}" in capsys.readouterr().err
    for kind in ("WanPipeline", "FluxFillPipeline", "QwenImageEditPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(UserError, match=f"is a {kind}, which draws no pictures from text al"):
            models.pipeline_class(str(tmp_path))
    with pytest.raises(UserError, match="no feed-forward layer known in TransformerEncoderLayer"):
        gate_sites(torch.nn.TransformerEncoderLayer(8, 2))


def test_prompts_of_other_lengths_without_a_mask_are_refused():
    long, short = torch.zeros(1, 5, 4), torch.zeros(1, 3, 4)
    with pytest.raises(UserError, match="no mask for prompts of other lengths"):
        models.collate([(long, None, None), (short, None, None)])
    embeds, mask = models.collate([(long, torch.ones(1, 5)), (short, torch.ones(1, 3))])
    assert embeds.shape == (2, 5, 4) and mask.sum(1).tolist() == [5, 3]


def test_number_of_gates_of_full_size_flux():
    """FLUX.1-schnell's configuration has the paper's 466,944 FFN and 350,208 norm units."""
    sizes = dict(in_channels=64, attention_head_dim=128, num_layers=19, num_single_layers=38)
    sizes |= dict(num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768)
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**sizes, guidance_embeds=False)
    assert units_of(flux) == (466_944, 350_208, 116_736, 57 * 24, 38 * 12_288)


def test_prompts_stay_as_they_are():
    """ERNIE-Image's model that writes prompts anew, each time otherwise, is left out."""
    pipe = SimpleNamespace(pe="writes", encode_prompt=lambda prompt: None)
    models.remember_prompts(pipe)
    assert pipe.pe is None
