"""memory.py's estimate against bytes alive; weights in few bits or offloaded, compiled blocks:
gradients against those of the plain transformer."""

import functools
import os
import weakref
from importlib.util import find_spec

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the oracles are fp32 on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # no waiting for a hub that is not there
import diffusers
import pytest
import torch

import erase
import lowmem
import memory
import models
from bench import Allocated
from families import FAMILIES
from safely import UserError

MODES = ("none", "step", "block", "both")
PROMPTS = ["a gun on a red background", "an apple"]


def square_mean(final):
    return final.float().square().mean()


def gradients(pipe, call, values, checkpoint="none", sampling_steps=3):
    """{site: gradient} of a loss of two pictures' final latents, for gates of these values."""
    gates = {site: value.clone().requires_grad_() for site, value in values.items()}
    call = call | dict(num_inference_steps=sampling_steps)
    with erase.gated(pipe.transformer, gates):
        erase.rollout_backward(pipe, PROMPTS, [0, 1], square_mean, checkpoint, **call)
    return {site: gate.grad for site, gate in gates.items()}


def assert_close(ours, theirs):
    for site in theirs:
        assert torch.allclose(ours[site], theirs[site], rtol=1e-4, atol=1e-7), site


@pytest.fixture
def tiny():
    """(tiny/flux, its call)."""
    pipe = models.load_pipeline(models.TINY, "cpu")
    models.remember_prompts(pipe)
    return pipe, dict(models.CALLS["tiny/flux"])


# ------------------------------------------------------------------------------------------ memory
def seen_load(pipe, call) -> memory.Load:
    """The load that the attention layers of a rollout see: first the picture's, then the text's."""
    seen = {}

    def look(layer, inputs, output, name):
        seen.setdefault(name, []).append(inputs[0].shape[:2])

    hooks = [
        layer.register_forward_hook(lambda *args, name=name: look(*args, name))
        for name, layer in pipe.transformer.named_modules()
        if name.endswith(("to_q", "add_q_proj"))
    ]
    with torch.no_grad():
        erase.rollout(pipe, PROMPTS, [0, 1], **call)
    for hook in hooks:
        hook.remove()
    of_picture, of_text = list(seen.values())[:2]
    rows, tokens = of_picture[0]
    return memory.Load(tokens, of_text[0][1], rows // len(PROMPTS), len(of_picture))


def estimate_by_reality(pipe, call, modules) -> dict:
    """{checkpoint: bytes that memory.py says / bytes alive at once}, of two pictures."""
    load = seen_load(pipe, call)
    guessed = memory.load_of(type(pipe), call)
    assert (guessed.rows, guessed.calls) == (load.rows, load.calls)
    sites = erase.gate_sites(pipe.transformer, modules)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    ratios = {}
    for checkpoint in MODES:
        how = dict(load=load, checkpoint=checkpoint, pictures=2, itemsize=4, sites=sites)
        said = memory.memory_needed(pipe.transformer, **how) - 2**30 - weights
        open_gates = {name: torch.ones(site.units) for name, site in sites.items()}
        with Allocated() as real:
            gradients(pipe, call, open_gates, checkpoint, call["num_inference_steps"])
        ratios[checkpoint] = round(said / real.peak, 2)
    return ratios


@pytest.mark.parametrize("modules", [("ffn", "norm"), erase.MODULES], ids="-".join)
def test_memory_estimate(modules, tiny):
    """The estimate of a backward is within 20 % of what it allocates, on tiny/flux at 128 pixels."""
    pipe, call = tiny
    ratios = estimate_by_reality(pipe, call | dict(height=128, width=128), modules)
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_estimate_of_all_families(family):
    """It is within 30 % for small random transformers of every family, guided or not; and the same
    without weights."""
    pipe, call = FAMILIES[family]()
    models.remember_prompts(pipe)
    if "negative_prompt" in call:
        call["negative_prompt"] = PROMPTS[0]  # as many tokens as in the other pass
    ratios = estimate_by_reality(pipe, call | dict(height=64, width=64), ("ffn", "norm"))
    assert all(0.7 < ratio < 1.3 for ratio in ratios.values()), ratios
    with torch.device("meta"):
        empty = type(pipe.transformer).from_config(pipe.transformer.config)
    load = memory.Load(64, 16, 1, 4)
    how = dict(load=load, checkpoint="both", pictures=2, itemsize=2, offload=True)
    sizes = [
        memory.memory_needed(model, sites=erase.gate_sites(model), **how)
        for model in (empty, pipe.transformer)
    ]
    assert sizes[0] == sizes[1]


def test_size_of_a_rollout():
    """What the sampler asks of the transformer, as read off its class and its call."""
    size = dict(height=1024, width=512, num_inference_steps=8)
    for kind, call, expected in (
        ("FluxPipeline", dict(max_sequence_length=256), (2048, 256, 1, 8)),
        ("FluxPipeline", dict(true_cfg_scale=2.0, negative_prompt=""), (2048, 512, 1, 16)),
        ("StableDiffusion3Pipeline", dict(guidance_scale=0.0), (2048, 333, 1, 8)),
        ("StableDiffusion3Pipeline", dict(), (2048, 333, 2, 8)),
        ("QwenImagePipeline", dict(true_cfg_scale=4.0), (2048, 512, 1, 8)),
        ("QwenImagePipeline", dict(negative_prompt=" "), (2048, 512, 1, 16)),
        ("ZImagePipeline", dict(guidance_scale=0.5), (2048, 512, 2, 8)),
        ("Flux2KleinPipeline", dict(guidance_scale=1.0), (2048, 512, 1, 8)),
        ("Flux2Pipeline", dict(), (2048, 512, 1, 8)),
        ("ChromaPipeline", dict(), (2048, 512, 1, 16)),
    ):
        assert memory.load_of(getattr(diffusers, kind), size | call) == expected, (kind, call)


def test_checkpoint_auto_takes_what_fits(tiny, monkeypatch):
    """Less and less free memory: auto goes from no recompute to steps, blocks and both, and at last
    stops with what would fit."""
    pipe, call = tiny
    call |= dict(height=256, width=256, num_inference_steps=28)
    how = dict(sites=erase.gate_sites(pipe.transformer), pictures=16, itemsize=4)
    how |= dict(load=memory.load_of(type(pipe), call))
    needs = {m: memory.memory_needed(pipe.transformer, checkpoint=m, **how) for m in MODES}

    def plan(free, checkpoint="auto", **flags):
        monkeypatch.setattr(lowmem, "free_memory", lambda device: free)
        about = (pipe.transformer, type(pipe), how["sites"], call, "cpu")
        return lowmem.plan(*about, checkpoint=checkpoint, micro_batch=16, **flags)

    for free in needs.values():
        best = next(mode for mode in MODES if needs[mode] <= free)
        mode, why = plan(free)
        assert mode == best and why.startswith(f"checkpoint {best}: needs about")
        assert plan(free, offload=True)[0] in ("block", "both")
    assert plan(needs["block"], "both")[0] == "both"  # as asked
    with pytest.raises(UserError, match="^--checkpoint: step needs about"):
        plan(needs["block"], "step")
    with pytest.raises(UserError, match="^--checkpoint: both needs about") as error:
        plan(min(needs.values()) - 1)
    assert "--micro_batch 1 (" in str(error.value) and "--quantize nf4 (" in str(error.value)
    with pytest.raises(UserError, match="nothing fits; try a smaller --height"):
        plan(1000)


WRONG = [
    (dict(offload=True, checkpoint="step"), "--offload: needs --checkpoint block or both, not"),
    (dict(offload=True, compile=True), "--compile: does not go with --offload"),
    (dict(quantize="fp8", compile=True), "--compile: does not go with --quantize fp8"),
    (dict(quantize="nf4", offload=True), "--offload: does not go with --quantize nf4"),
]
for kind, library in lowmem.LIBRARIES.items():
    if not find_spec(library):
        message = f"--quantize: {kind} needs a library that is not here: pip install {library}"
        WRONG.append((dict(quantize=kind), message))


@pytest.mark.parametrize("flags, message", WRONG)
def test_what_does_not_go_together(flags, message):
    flags = dict(checkpoint="auto", quantize="none", offload=False, compile=False) | flags
    with pytest.raises(UserError, match=message):
        lowmem.check_combination(**flags)


# -------------------------------------------------------------------------------- gradients anyway
def random_gates(transformer, modules=erase.MODULES) -> dict:
    sites = erase.gate_sites(transformer, modules)
    return {name: torch.rand(site.units) for name, site in sites.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpoint", ["block", "both"])
def test_offloaded_blocks_are_on_the_device_only_while_they_compute(checkpoint, family):
    """With offload, gradients are those of plain autograd, no two blocks' copies are alive at once,
    and none is left: the weights stay where they were."""
    pipe, call = FAMILIES[family]()
    models.remember_prompts(pipe)
    transformer = pipe.transformer
    values = random_gates(transformer)
    plain = gradients(pipe, call, values)
    blocks = memory.blocks_of(transformer)
    places = {p: p.data_ptr() for block in blocks.values() for p in block.parameters()}
    copies = []  # (block, weak reference)
    most = 0

    def look(layer, inputs, name):
        nonlocal most
        assert layer.weight.data_ptr() not in places.values()
        copies.append((name, weakref.ref(layer.weight)))
        most = max(most, len({name for name, copy in copies if copy() is not None}))

    lowmem.offload(transformer, "cpu:0")  # to torch another device than "cpu", so that .to() copies
    for name, block in blocks.items():
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(functools.partial(look, name=name))
    assert_close(gradients(pipe, call, values, checkpoint), plain)
    assert most == 1 and not any(copy() is not None for _, copy in copies)
    assert all(p.data_ptr() == place for p, place in places.items())


@pytest.mark.parametrize("kind, library", lowmem.LIBRARIES.items())
def test_quantized_weights_give_the_same_gradients(kind, library, tiny):
    """Gate gradients with frozen weights in 8 or 4 bits: cosine to full precision at least 0.98,
    without and with offload."""
    pytest.importorskip(library)
    pipe, call = tiny
    values = {name: torch.ones_like(g) for name, g in random_gates(pipe.transformer).items()}

    def flat_gradients():
        return torch.cat([*gradients(pipe, call, values, "block", 4).values()])

    plain = flat_gradients()
    lowmem.quantize(pipe.transformer, kind, "cpu")
    quantized = flat_gradients()
    lowmem.offload(pipe.transformer, "cpu:0")
    offloaded = flat_gradients()
    cosine = torch.nn.functional.cosine_similarity(plain, quantized, 0)
    assert 0.98 <= cosine < 1 and torch.allclose(quantized, offloaded, rtol=1e-4), cosine


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_see_their_gates(family):
    """With --compile, gate gradients after an ungated rollout are those without it, whichever sites
    are gated; other gate values change all of them and compile nothing again; the base stays the
    base. (aot_eager: inductor's graphs, without its minute of C++.)"""
    pipe, call = FAMILIES[family]()
    models.remember_prompts(pipe)
    every = random_gates(pipe.transformer)
    some = {name: every[name] for name in list(every)[1::2]}

    def base():
        with torch.no_grad():
            return erase.rollout(pipe, PROMPTS, [0, 1], **call)

    def results():
        found = [base()]
        for values, checkpoint in ((every, "step"), (every, "both"), (some, "step")):
            found += gradients(pipe, call, values, checkpoint).values()
        return [*found, base()]

    plain = results()
    graphs = torch._dynamo.utils.counters["stats"]
    defaults = dict(skip_nnmodule_hook_guards=True, recompile_limit=8)  # torch's, also afterwards
    with torch._dynamo.config.patch(**defaults):
        lowmem.compile_blocks(pipe.transformer, backend="aot_eager")
        compiled = results()
        made = graphs["unique_graphs"]
        for values in every.values():
            values.uniform_()
        again = results()
    assert graphs["unique_graphs"] == made > 0
    for ours, theirs in zip(compiled, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and theirs.any()
    for ours, theirs in zip(compiled[1:-1], again[1:-1], strict=True):
        assert not torch.equal(ours, theirs)
