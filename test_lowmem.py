"""Oracles: bytes alive, and plain autograd of the plain transformer."""

import functools
import itertools
import weakref

import diffusers
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import erase
import fullsize
import heal
import lowmem
import memory
import models
import recompute
from costs import Allocated, square_mean
from families import FAMILIES, OTHERS
from safely import UserError

MODES = ("none", "step", "block", "both")
PROMPTS = ["a gun on a red background", "an apple"]


def made(family, **others):
    """(pipe, call) of a family; with guidance both passes have as many tokens."""
    pipe, call = (FAMILIES | OTHERS)[family]()
    models.remember_prompts(pipe)
    if "negative_prompt" in call:
        call["negative_prompt"] = PROMPTS[0]
    return pipe, call | others


def gates_of(transformer, values=torch.rand, modules=erase.MODULES) -> dict:
    sites = erase.gate_sites(transformer, modules)
    return {name: values(site.units) for name, site in sites.items()}


def gradients(pipe, call, values, checkpoint="none") -> dict:
    """{site: gradient} of a loss of two pictures' final latents, for gates of these values."""
    gates = {site: value.clone().requires_grad_() for site, value in values.items()}
    with erase.gated(pipe.transformer, gates):
        erase.rollout_backward(pipe, PROMPTS, [0, 1], square_mean, checkpoint, **call)
    # Qwen-Image's last text FFN reaches no picture
    return {site: torch.zeros(1) if g.grad is None else g.grad for site, g in gates.items()}


CASES = [("schnell", modules, 128, 0.2) for modules in (("ffn", "norm"), erase.MODULES)]
for family in (*FAMILIES, "flux2_klein_base", "z_image_guided"):
    CASES.append((family, ("ffn", "norm"), 128 if family == "qwen_image" else 64, 0.3))


@pytest.mark.parametrize("family, modules, size, error", CASES)
def test_memory_estimate(family, modules, size, error):
    """It is within 20 % of what a backward allocates on tiny/flux, 30 % in any family."""
    pipe, call = made(family, height=size, width=size)
    layers = dict(pipe.transformer.named_modules())
    queries = {layers[name] for name in layers if name.endswith(("to_q", "add_q_proj"))}
    seen = {}  # of attention layers: first of the picture, then of the text

    def look(layer, inputs, output):
        if layer in queries:
            seen.setdefault(layer, []).append(inputs[0].shape)

    with register_module_forward_hook(look), torch.no_grad():
        erase.rollout(pipe, PROMPTS, [0, 1], **call)
    of_picture, of_text = list(seen.values())[:2]
    guessed = memory.load_of(type(pipe), call)
    assert (guessed.rows * len(PROMPTS), guessed.calls) == (of_picture[0][0], len(of_picture))
    load = guessed._replace(tokens=of_picture[0][1], text_tokens=of_text[0][1])
    sites = erase.gate_sites(pipe.transformer, modules)
    need = functools.partial(memory.memory_needed, pipe.transformer, sites=sites, load=load)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    ratios = []
    for mode in MODES:
        said = need(pictures=2, itemsize=4, checkpoint=mode) - 2**30 - weights
        with Allocated() as real:
            gradients(pipe, call, gates_of(pipe.transformer, torch.ones, modules), mode)
        ratios.append(round(said / real.peak, 2))
    assert all(1 - error < ratio < 1 + error for ratio in ratios), ratios


@pytest.mark.parametrize("mode", ["none", "step", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_estimate_of_a_lora(dtype, mode):
    """It is within 20 % while a LoRA learns under gates that are fixed."""
    pipe, call = made("schnell", height=128, width=128)
    transformer = pipe.to(dtype).transformer
    flat = heal.start(transformer, 4, 0).requires_grad_()
    lora = heal.as_lora(flat, heal.shapes_of(transformer, 4))
    gates = gates_of(transformer, torch.ones, ("ffn", "norm"))
    load = memory.load_of(type(pipe), call)
    how = dict(sites=erase.gate_sites(transformer), load=load, pictures=2, checkpoint=mode)
    how |= dict(lora=lora, itemsize=dtype.itemsize)
    said = memory.memory_needed(transformer, **how) - 2**30
    said -= sum(p.nbytes for p in transformer.parameters())
    with Allocated() as real, heal.adapted(transformer, lora), erase.gated(transformer, gates):
        erase.rollout_backward(pipe, PROMPTS, [0, 1], square_mean, mode, **call)
    assert 0.8 < said / real.peak < 1.2, said / real.peak


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_forward(family):
    """They are within 8 % of what torch counts."""
    pipe, call = made(family, num_inference_steps=1)
    counts, queries = [], []

    def counted(module, forward):
        def run(*args, **kwargs):
            with FlopCounterMode(display=False) as counter:
                found = forward(*args, **kwargs)
            counts.append(counter.get_total_flops())
            return found

        return run

    for name, layer in pipe.transformer.named_modules():
        if name.endswith(("to_q", "add_q_proj")):
            layer.register_forward_hook(lambda layer, x, y: queries.append(x[0].shape[1]))
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # it counts
    with torch.no_grad(), math_only, recompute.replaced([pipe.transformer], counted):
        erase.rollout(pipe, PROMPTS[:1], [0], **call)
    load = memory.load_of(type(pipe), call)._replace(tokens=queries[0], text_tokens=queries[1])
    said = load.rows * load.calls * memory.forward_flops(pipe.transformer, load)
    assert abs(said / sum(counts) - 1) < 0.08, said / sum(counts)


def test_what_is_known_before_any_weight():
    """The load of a call, by the pipeline's class; bytes, which are the same on the meta device;
    fewer bits and offload lower them."""
    for family in FAMILIES | OTHERS:
        pipe, _ = made(family)
        with torch.device("meta"):
            empty = type(pipe.transformer).from_config(pipe.transformer.config)
        how = dict(sites=erase.gate_sites(empty), load=memory.Load(64, 16, 1, 4), pictures=2)
        need = functools.partial(memory.memory_needed, **how, itemsize=2, checkpoint="both")
        assert need(pipe.transformer) == need(empty) > need(empty, quantize="nf4"), family
        assert need(empty) > need(empty, offload=True), family

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


LONG = dict(models.CALLS["tiny/flux"], height=256, width=256, num_inference_steps=28)
OTHERS_OF_TINY = dict(text_encoder=600_000, text_encoder_2=700_000, vae=2_600_000)


@pytest.fixture
def plan(pipe, monkeypatch):
    """lowmem.plan of tiny/flux for so many free bytes of the device and of CPU memory, and
    needs(mode, pictures), the bytes that it counts."""
    sites = erase.gate_sites(pipe.transformer)
    load = memory.load_of(type(pipe), LONG)
    needed = functools.partial(memory.memory_needed, pipe.transformer, sites=sites, load=load)

    def plan(free, checkpoint="auto", device="cpu", host=2**40, micro_batch=16, others={}, **flags):
        sizes = dict(cpu=host if device == "cuda" else free, cuda=free)
        monkeypatch.setattr(lowmem, "free_memory", sizes.get)
        flags |= dict(checkpoint=checkpoint, micro_batch=micro_batch)
        return lowmem.plan(pipe.transformer, others, type(pipe), sites, LONG, device, **flags)

    def needs(mode, pictures=16, **flags):
        return needed(checkpoint=mode, pictures=pictures, itemsize=4, **flags)

    return plan, needs


def test_processes_share_a_host(pipe, plan, monkeypatch):
    """What one process just gets, two do not: of the CPU's memory, for --offload too."""
    plan, needs = plan
    of_blocks = memory.block_bytes(pipe.transformer, 4)
    offloaded = dict(device="cuda", host=2 * of_blocks - 1, checkpoint="both", offload=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert plan(2 * needs("none") - 1)[0]["checkpoint"] == "none"
    plan(needs("both"), **offloaded)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan(2 * needs("none") - 1)[0]["checkpoint"] != "none"
    with pytest.raises(UserError, match="--offload: needs about"):
        plan(needs("both"), **offloaded)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan(device, plan):
    """With less and less free memory auto goes from no recompute to steps, blocks and both, each
    first with fewer pictures at a time unless --micro_batch says how many; of another mode or
    number than was asked for it takes none. On a CPU the other parts count too."""
    plan, needs = plan
    sizes = {(m, n): needs(m, n) for m in MODES for n in lowmem.MICRO_BATCHES}
    for wanted, free in sizes.items():
        best = next(which for which, size in sizes.items() if size <= free)
        chosen, why = plan(free, device=device, micro_batch=None)
        assert tuple(chosen.values()) == best and list(chosen) == ["checkpoint", "micro_batch"]
        assert why.startswith(f"checkpoint {best[0]}, micro_batch {best[1]}: needs about")
        chosen, _ = plan(free, device=device, micro_batch=wanted[1])
        assert chosen["micro_batch"] == wanted[1] and sizes[tuple(chosen.values())] <= free
        if wanted[0] in ("block", "both"):
            chosen, _ = plan(free, device=device, micro_batch=None, offload=True)
            assert chosen["checkpoint"] in ("block", "both")
    assert plan(2**40, "both", device)[0]["checkpoint"] == "both"  # as asked
    free = sizes["none", 16]
    chosen, why = plan(free, device=device, others=OTHERS_OF_TINY)
    assert chosen["checkpoint"] == ("step" if device == "cpu" else "none")
    assert "encode on the CPU" not in why
    if device == "cuda":
        why = plan(free, device=device, others=dict(text_encoder=free))[1]
        assert why.endswith("do not fit there and encode on the CPU")


FITS = r"--checkpoint: both needs about .*fit: --checkpoint both --micro_batch 1 \([\d.]+ GiB\)"
REFUSED = [
    (("none", 16), "none", {}, "--checkpoint: none needs about"),
    (("both", 16), "auto", {}, f"{FITS}$"),
    (("both", 16), "auto", dict(quantize="nf4"), f"{FITS}$"),
    (("both", 16), "auto", dict(device="cuda"), FITS + ".*--quantize fp8 .*nf4 .*--offload "),
    (("both", 16), "auto", dict(device="cuda", host=9), FITS + r".*--quantize nf4 \([^;]*$"),
    (("both", 16), "auto", dict(device="cuda", host=9, offload=True), "--offload: .* of CPU mem"),
    (("both", 1), "auto", dict(refitted=10**9), "--checkpoint: "),
    (None, "auto", {}, ".*; nothing fits; try a smaller --height"),
    (None, "step", dict(offload=True), "--offload: needs --checkpoint block or both, not step"),
    (None, "both", dict(offload=True, compile=True), "--compile: does not go with --offload"),
    (None, "both", dict(quantize="fp8", compile=True), "--compile: .* with --quantize fp8"),
    (None, "both", dict(quantize="nf4", offload=True), "--offload: .* with --quantize nf4"),
]


@pytest.mark.parametrize("almost, mode, flags, message", REFUSED)
def test_refused_plans(almost, mode, flags, message, plan, monkeypatch):
    """With a byte less than a mode needs, or flags that do not go together: by what would fit,
    which is never --quantize or --offload on a CPU."""
    plan, needs = plan
    monkeypatch.setattr(lowmem, "find_spec", lambda library: True)
    free = needs(*almost) - 1 if almost else 1000
    with pytest.raises(UserError, match=f"^{message}"):
        plan(free, mode, **flags)


def test_regression_that_does_not_fit_is_refused(plan):
    with pytest.raises(UserError, match="^--refit: needs about .* GiB of CPU memory; try fewer"):
        plan[0](2**40, refitted=10**9)


def test_libraries_and_dtypes(plan, monkeypatch):
    """A library that is not here is named. Large transformers are bf16, small ones fp32, wherever
    they are; what the plan counts beside one is what the pipeline has."""
    monkeypatch.setattr(lowmem, "find_spec", lambda library: None)
    for kind, library in lowmem.LIBRARIES.items():
        with pytest.raises(UserError, match=f"--quantize: {kind} .*here: pip install {library}"):
            plan[0](2**40, quantize=kind)
    large = fullsize.random_transformer("meta")
    for device in ("cpu", "cpu:0", "cuda"):
        assert models.default_dtype(device, large) == torch.bfloat16
        assert models.dtype_of(models.TINY, device) == torch.float32
    pipe = models.load_pipeline(models.TINY, "cpu:0")
    assert pipe.dtype == torch.float32
    _, _, others, _ = models.inspect_model(models.TINY)
    for part, size in others.items():
        module = getattr(pipe, part)
        assert sum(p.numel() for p in module.parameters()) == size
    assert list(others) == ["vae", "text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_blocks_are_on_the_device_only_while_they_compute(family):
    """With offload, gradients are those of plain autograd, no two blocks' copies are alive at once,
    and none is left: the weights stay where they were."""
    pipe, call = made(family)
    values = gates_of(pipe.transformer)
    plain = gradients(pipe, call, values)
    blocks = memory.blocks_of(pipe.transformer)
    places = {p: p.data_ptr() for block in blocks.values() for p in block.parameters()}
    copies = []  # (block, weak reference)
    alive = set()  # how many blocks' at once

    def look(layer, inputs, name):
        assert layer.weight.data_ptr() not in places.values()
        copies.append((name, weakref.ref(layer.weight)))
        alive.add(len({name for name, copy in copies if copy() is not None}))

    lowmem.offload(pipe.transformer, "cpu:0")  # to torch not "cpu", so that .to() copies
    for name, block in blocks.items():
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(functools.partial(look, name=name))
    for checkpoint in ("block", "both"):
        for site, offloaded in gradients(pipe, call, values, checkpoint).items():
            assert torch.allclose(offloaded, plain[site], rtol=1e-4, atol=1e-7), site
        assert alive == {1} and not any(copy() is not None for _, copy in copies)
        assert all(p.data_ptr() == place for p, place in places.items())


def test_packed_weights():
    """Packed, weights are the bits that they were, no two overlap, and each starts at a multiple of
    64 bytes. The buffers, as powers of two of bytes, take 12 % more than the weights, one by one
    they would take half as much again; one weight is larger than a buffer."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3 * i, 80 - i) for i in range(80)] * 3 + [(2**15, 2), ()]
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for p in weights[::3]:
        p.data = p.data.bfloat16()
    before = [p.data.clone() for p in weights]
    lowmem.pack(weights, pin=False, chunk=2**17)
    for p, old in zip(weights, before, strict=True):
        assert torch.equal(p.data, old) and p.dtype == old.dtype
        assert p.storage_offset() * p.element_size() % 64 == 0
    places = sorted((p.data_ptr(), p.nbytes) for p in weights)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))
    buffers = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in weights}
    taken = [
        sum(2 ** (size - 1).bit_length() for size in sizes if size)
        for sizes in (buffers.values(), [p.nbytes for p in weights])
    ]
    total = sum(p.nbytes for p in weights)
    assert taken[0] < 1.15 * total and taken[1] > 1.3 * total, (taken, total)


@pytest.mark.parametrize("kind, library", lowmem.LIBRARIES.items())
def test_quantized_weights_give_the_same_gradients(kind, library):
    """Frozen weights in few bits: cosine to full precision at least 0.98, also with offload."""
    pytest.importorskip(library)
    pipe, call = made("schnell")
    gates = gates_of(pipe.transformer, torch.ones)
    found = [torch.cat([*gradients(pipe, call, gates, "block").values()])]
    for change in (functools.partial(lowmem.quantize, kind=kind), lowmem.offload):
        change(pipe.transformer, device="cpu:0")
        found.append(torch.cat([*gradients(pipe, call, gates, "block").values()]))
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], 0)
    assert 0.98 <= cosine < 1 and torch.allclose(found[1], found[2], rtol=1e-4), cosine


# torch's defaults, which come back afterwards
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True, recompile_limit=8)
def test_compiled_blocks_see_their_gates():
    """With --compile, gate gradients after an ungated rollout are those without it, whichever sites
    are gated; the base stays the base. Other gate values, or gates in another block of the same
    kind, compile nothing again: else FLUX.1's 57 blocks soon reach torch's silent limit."""
    pipe, call = made("flux_dev", num_inference_steps=3)
    every = gates_of(pipe.transformer)
    some = {name: every[name] for name in list(every)[1::2]}
    compiled = torch._dynamo.utils.counters["stats"]

    def results():
        with torch.no_grad():
            found = [erase.rollout(pipe, PROMPTS, [0, 1], **call)]
        for values, checkpoint in ((every, "step"), (every, "both"), (some, "step")):
            found += gradients(pipe, call, values, checkpoint).values()
        with torch.no_grad():
            return [*found, erase.rollout(pipe, PROMPTS, [0, 1], **call)]

    plain = results()
    lowmem.compile_blocks(pipe.transformer, backend="eager")  # the same graphs, no C++
    ours = results()
    graphs = [compiled["unique_graphs"]]
    for values in every.values():
        values.uniform_()
    again = results()
    assert compiled["unique_graphs"] == graphs[0] > 0
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7) and other.any()
    for one, other in zip(ours[1:-1], again[1:-1], strict=True):
        assert not torch.equal(one, other)

    torch._dynamo.reset()
    pipe, call = made("schnell", num_inference_steps=1)
    lowmem.compile_blocks(pipe.transformer, backend="eager")
    for block in (1, 2):
        gradients(pipe, call, {f"transformer_blocks.{block}.ff.net.2": torch.ones(512)})
        graphs.append(compiled["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2], graphs
