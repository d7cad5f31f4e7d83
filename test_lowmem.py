"""Oracles: bytes alive, and plain autograd of the plain transformer."""

import functools
import weakref
from importlib.util import find_spec

import diffusers
import pytest
import torch

import erase
import lowmem
import memory
import models
from costs import Allocated
from families import FAMILIES, OTHERS
from safely import UserError

MODES = ("none", "step", "block", "both")
PROMPTS = ["a gun on a red background", "an apple"]


def made(family):
    """(pipe, call) of a family, or of tiny/flux; with guidance both passes have as many tokens."""
    pipe, call = (FAMILIES | OTHERS)[family]()
    models.remember_prompts(pipe)
    if "negative_prompt" in call:
        call["negative_prompt"] = PROMPTS[0]
    return pipe, call


def random_gates(transformer) -> dict:
    sites = erase.gate_sites(transformer, erase.MODULES)
    return {name: torch.rand(site.units) for name, site in sites.items()}


def gradients(pipe, call, values, checkpoint="none") -> dict:
    """{site: gradient} of a loss of two pictures' final latents, for gates of these values."""
    gates = {site: value.clone().requires_grad_() for site, value in values.items()}
    with erase.gated(pipe.transformer, gates):
        loss = lambda final: final.float().square().mean()  # noqa: E731
        erase.rollout_backward(pipe, PROMPTS, [0, 1], loss, checkpoint, **call)
    # Qwen-Image's last text FFN reaches no picture
    return {site: torch.zeros(1) if g.grad is None else g.grad for site, g in gates.items()}


# ------------------------------------------------------------------------------------------ memory
def seen_load(pipe, call) -> memory.Load:
    """The load that the attention layers of a rollout see: first the picture's, then the text's."""
    seen = {}

    def look(layer, inputs, output, name):
        seen.setdefault(name, []).append(inputs[0].shape[:2])

    hooks = []
    for name, layer in pipe.transformer.named_modules():
        if name.endswith(("to_q", "add_q_proj")):
            hooks.append(layer.register_forward_hook(functools.partial(look, name=name)))
    with torch.no_grad():
        erase.rollout(pipe, PROMPTS, [0, 1], **call)
    for hook in hooks:
        hook.remove()
    of_picture, of_text = list(seen.values())[:2]
    rows, tokens = of_picture[0]
    return memory.Load(tokens, of_text[0][1], rows // len(PROMPTS), len(of_picture))


def estimate_by_reality(family, modules, size) -> dict:
    """{checkpoint: bytes that memory.py says / bytes alive at once}, of two pictures."""
    pipe, call = made(family)
    call |= dict(height=size, width=size)
    load = seen_load(pipe, call)
    guessed = memory.load_of(type(pipe), call)
    assert (guessed.rows, guessed.calls) == (load.rows, load.calls)
    sites = erase.gate_sites(pipe.transformer, modules)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    ratios = {}
    for checkpoint in MODES:
        how = dict(load=load, checkpoint=checkpoint, pictures=2, itemsize=4, sites=sites)
        said = memory.memory_needed(pipe.transformer, **how) - 2**30 - weights
        with Allocated() as real:
            open_gates = {name: torch.ones(site.units) for name, site in sites.items()}
            gradients(pipe, call, open_gates, checkpoint)
        ratios[checkpoint] = round(said / real.peak, 2)
    return ratios


@pytest.mark.parametrize("modules", [("ffn", "norm"), erase.MODULES], ids="-".join)
def test_memory_estimate(modules):
    """The estimate is within 20 % of what a backward allocates, on tiny/flux at 128 pixels."""
    ratios = estimate_by_reality("schnell", modules, 128)
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("family", [*FAMILIES, "flux2_klein_base", "z_image_guided"])
def test_memory_estimate_of_all_families(family):
    """It is within 30 % for small random transformers of every family, guided or not."""
    ratios = estimate_by_reality(family, ("ffn", "norm"), 128 if family == "qwen_image" else 64)
    assert all(0.7 < ratio < 1.3 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
def test_memory_is_known_before_any_weight(family):
    """The estimate is the same on the meta device; fewer bits and offload lower it."""
    pipe, _ = (FAMILIES | OTHERS)[family]()
    with torch.device("meta"):
        empty = type(pipe.transformer).from_config(pipe.transformer.config)
    how = dict(sites=erase.gate_sites(empty), load=memory.Load(64, 16, 1, 4), pictures=2)
    need = functools.partial(memory.memory_needed, **how, itemsize=2, checkpoint="both")
    assert need(pipe.transformer) == need(empty) > need(empty, quantize="nf4")
    assert need(empty) > need(empty, offload=True)


def test_load_of_a_call():
    """What the sampler asks of the transformer, read off its class and its call."""
    size = dict(height=1024, width=512, num_inference_steps=8)
    for kind, call, expected in (
        ("Flux", dict(max_sequence_length=256), (2048, 256, 1, 8)),
        ("Flux", dict(true_cfg_scale=2.0, negative_prompt=""), (2048, 512, 1, 16)),
        ("Flux2", dict(guidance_scale=4.0), (2048, 512, 1, 8)),
        ("StableDiffusion3", dict(guidance_scale=0.0), (2048, 333, 1, 8)),
        ("QwenImage", dict(true_cfg_scale=4.0), (2048, 512, 1, 8)),
        ("ZImage", dict(guidance_scale=0.5), (2048, 512, 2, 8)),
    ):
        pipeline_class = getattr(diffusers, f"{kind}Pipeline")
        assert memory.load_of(pipeline_class, size | call) == expected, (kind, call)


def test_checkpoint_auto_takes_what_fits(pipe, monkeypatch):
    """Less and less free memory: auto goes from no recompute to steps, blocks and both, and at last
    stops with what would fit."""
    call = dict(models.CALLS["tiny/flux"], height=256, width=256, num_inference_steps=28)
    sites = erase.gate_sites(pipe.transformer)
    how = dict(sites=sites, load=memory.load_of(type(pipe), call), pictures=16, itemsize=4)
    needs = {m: memory.memory_needed(pipe.transformer, checkpoint=m, **how) for m in MODES}

    def plan(free, checkpoint="auto", **flags):
        monkeypatch.setattr(lowmem, "free_memory", lambda device: free)
        flags |= dict(checkpoint=checkpoint, micro_batch=16)
        return lowmem.plan(pipe.transformer, type(pipe), sites, call, "cpu", **flags)

    for free in needs.values():
        best = next(mode for mode in MODES if needs[mode] <= free)
        mode, why = plan(free)
        assert mode == best and why.startswith(f"checkpoint {best}: needs about")
        assert plan(free, offload=True)[0] in ("block", "both")
    assert plan(needs["none"], "both")[0] == "both"  # as asked
    with pytest.raises(UserError, match="^--checkpoint: none needs about"):
        plan(needs["none"] - 1, "none")
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
    flags = dict(checkpoint="both", quantize="none", offload=False, compile=False) | flags
    with pytest.raises(UserError, match=message):
        lowmem.check_combination(**flags)


# ------------------------------------------------------------------------------- the same gradients
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_blocks_are_on_the_device_only_while_they_compute(family):
    """With offload, gradients are those of plain autograd, no two blocks' copies are alive at once,
    and none is left: the weights stay where they were."""
    pipe, call = made(family)
    values = random_gates(pipe.transformer)
    plain = gradients(pipe, call, values)
    blocks = memory.blocks_of(pipe.transformer)
    places = {p: p.data_ptr() for block in blocks.values() for p in block.parameters()}
    copies = []  # (block, weak reference)
    most = 0

    def look(layer, inputs, name):
        nonlocal most
        assert layer.weight.data_ptr() not in places.values()
        copies.append((name, weakref.ref(layer.weight)))
        most = max(most, len({name for name, copy in copies if copy() is not None}))

    lowmem.offload(pipe.transformer, "cpu:0")  # to torch not "cpu", so that .to() copies
    for name, block in blocks.items():
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(functools.partial(look, name=name))
    for checkpoint in ("block", "both"):
        offloaded = gradients(pipe, call, values, checkpoint)
        for site in plain:
            assert torch.allclose(offloaded[site], plain[site], rtol=1e-4, atol=1e-7), site
        assert most == 1 and not any(copy() is not None for _, copy in copies)
        assert all(p.data_ptr() == place for p, place in places.items())


@pytest.mark.parametrize("kind, library", lowmem.LIBRARIES.items())
def test_quantized_weights_give_the_same_gradients(kind, library):
    """Gate gradients with frozen weights in 8 or 4 bits: cosine to full precision at least 0.98,
    without and with offload."""
    pytest.importorskip(library)
    pipe, call = made("schnell")
    gates = {
        name: torch.ones_like(values) for name, values in random_gates(pipe.transformer).items()
    }
    found = [torch.cat([*gradients(pipe, call, gates, "block").values()])]
    for change in (functools.partial(lowmem.quantize, kind=kind), lowmem.offload):
        change(pipe.transformer, device="cpu:0")
        found.append(torch.cat([*gradients(pipe, call, gates, "block").values()]))
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], 0)
    assert 0.98 <= cosine < 1 and torch.allclose(found[1], found[2], rtol=1e-4), cosine


TORCH = dict(skip_nnmodule_hook_guards=True, recompile_limit=8)  # its defaults; also afterwards
GRAPHS = torch._dynamo.utils.counters["stats"]


def test_compiled_blocks_see_their_gates():
    """With --compile, gate gradients after an ungated rollout are those without it, whichever sites
    are gated; other gate values change all of them and compile nothing again; the base stays the
    base. (aot_eager: inductor's graphs, without its minute of C++.)"""
    pipe, call = made("flux_dev")
    call |= dict(num_inference_steps=3)
    every = random_gates(pipe.transformer)
    some = {name: every[name] for name in list(every)[1::2]}

    @torch.no_grad()
    def base():
        return erase.rollout(pipe, PROMPTS, [0, 1], **call)

    def results():
        found = [base()]
        for values, checkpoint in ((every, "step"), (every, "both"), (some, "step")):
            found += gradients(pipe, call, values, checkpoint).values()
        return [*found, base()]

    plain = results()
    with torch._dynamo.config.patch(**TORCH):
        lowmem.compile_blocks(pipe.transformer, backend="aot_eager")
        compiled = results()
        graphs = GRAPHS["unique_graphs"]
        for values in every.values():
            values.uniform_()
        again = results()
    assert GRAPHS["unique_graphs"] == graphs > 0
    for ours, theirs in zip(compiled, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and theirs.any()
    for ours, theirs in zip(compiled[1:-1], again[1:-1], strict=True):
        assert not torch.equal(ours, theirs)


@torch._dynamo.config.patch(**TORCH)
def test_blocks_of_one_kind_share_their_graphs():
    """With --compile, gates in another block of the same kind compile nothing: else FLUX.1's 57
    blocks soon reach torch's limit, after which nothing is compiled, without a word."""
    torch._dynamo.reset()
    pipe, call = made("schnell")
    lowmem.compile_blocks(pipe.transformer, backend="aot_eager")
    graphs = set()
    for block in (1, 2):
        gates = {f"transformer_blocks.{block}.ff.net.2": torch.ones(512)}
        gradients(pipe, call | dict(num_inference_steps=1), gates)
        graphs.add(GRAPHS["unique_graphs"])
    assert len(graphs) == 1, graphs
