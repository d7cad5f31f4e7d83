"""pytest on a CPU, no network. Oracles: diffusers' own pipeline, plain autograd, weights zeroed by hand, uninterrupted runs."""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""      # the oracles are fp32 on the CPU
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

import erase

HERE = Path(__file__).parent
SIZE = argparse.Namespace(height=64, width=64, num_inference_steps=4, max_sequence_length=24)


@pytest.fixture
def transformer():
    """A random FLUX, 2 double and 2 single blocks, fp32."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                                   joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6))
    return model.requires_grad_(False)


@pytest.fixture
def inputs():
    """noise (2, 4, 16), text, grid."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(2, 4, 16), (draw(2, 5, 24), draw(2, 12)), (2, 2)


@pytest.fixture(scope="session")
def pipe():
    return erase.load_pipeline(erase.TINY, "cpu")


def sigmas(steps):
    return [1 - i / steps for i in range(steps + 1)]


def random_mask(transformer, modules=erase.MODULES, share=0.3):
    generator = torch.Generator().manual_seed(2)
    return {site: (torch.rand(units, generator=generator) > share).float() for site, units in erase.gate_sites(transformer, modules).items()}


def final(transformer, inputs, steps=3):
    noise, text, grid = inputs
    return erase.rollout(transformer, noise, text, sigmas(steps), grid)[-1]


# ------------------------------------------------------------------------------------------------------------ gates
@pytest.mark.parametrize("gate", erase.START)
def test_start_values_give_the_base_output_bit_for_bit(gate, transformer, inputs):
    """At their start value the gates are exactly 1, and gating with them changes no bit."""
    gates = {site: erase.relax(torch.full((units,), erase.START[gate]), gate) for site, units in erase.gate_sites(transformer, erase.MODULES).items()}
    assert all((g == 1).all() for g in gates.values())
    base = final(transformer, inputs)
    with erase.gated(transformer, gates):
        assert torch.equal(final(transformer, inputs), base)


@pytest.mark.parametrize("gate", erase.START)
def test_relaxations_stay_in_range_and_pass_gradients(gate):
    """Gates lie in [0, 1], rise with the logit, and a logit near 0 receives a gradient."""
    logits = torch.linspace(-6, 6, 25).requires_grad_()
    g = erase.relax(logits, gate, torch.full((25,), 0.5) if gate == "hard_concrete" else None)
    g.sum().backward()
    assert 0 <= g.min() and g.max() <= 1 and (g.diff() >= 0).all() and logits.grad[12] > 0


def test_share_of_trainable_gates_at_the_papers_start():
    """Few hard-concrete gates get a gradient from the paper's start value 3; every straight-through gate does."""
    noise = erase.gate_noise(dict(a=100_000), seed=0, step=0)["a"]
    shares = {}
    for gate, uniform in (("hard_concrete", noise), ("straight_through", None)):
        logits = torch.full((100_000,), 3.0).requires_grad_()
        erase.relax(logits, gate, uniform).sum().backward()
        shares[gate] = (logits.grad != 0).float().mean().item()
    assert shares["straight_through"] == 1 and 0.15 < shares["hard_concrete"] < 0.22, shares


def test_gate_noise_is_a_function_of_seed_and_step():
    """The same (seed, step) gives the same noise, another step or seed another."""
    draw = lambda seed, step: erase.gate_noise(dict(a=8, b=8), seed, step)
    assert torch.equal(draw(1, 2)["b"], draw(1, 2)["b"])
    assert not torch.equal(draw(1, 2)["a"], draw(1, 3)["a"]) and not torch.equal(draw(1, 2)["a"], draw(2, 2)["a"])


def test_number_of_gates_of_full_size_flux():
    """FLUX.1-schnell's configuration has the paper's 466,944 FFN and 350,208 norm units."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                                      num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=False)
    count = lambda *modules: sum(erase.gate_sites(flux, modules).values())
    assert count("ffn") == 466_944 and count("norm") == 350_208 and count("attn") == 57 * 24 and count("mlp") == 38 * 12_288


# ------------------------------------------------------------------------------------------------------------ hooks
@pytest.mark.parametrize("module", erase.MODULES)
def test_fold_equals_hooks(module, transformer, inputs):
    """Folding a binary mask into the weights gives the hooked model's output bit for bit, and differs from the base."""
    mask, base = random_mask(transformer, (module,)), final(transformer, inputs)
    with erase.gated(transformer, mask):
        hooked = final(transformer, inputs)
    erase.fold(transformer, mask)
    folded = final(transformer, inputs)
    assert torch.equal(folded, hooked), (folded - hooked).abs().max()
    assert not torch.equal(folded, base)


def test_fold_zeroes_both_sides_of_a_closed_neuron(transformer):
    """A closed FFN neuron keeps no incoming row, bias or outgoing column; an open one keeps all three."""
    mask = random_mask(transformer, ("ffn", "norm"))
    erase.fold(transformer, mask)
    for i, block in enumerate(transformer.transformer_blocks):
        off = mask[f"transformer_blocks.{i}.ff_context.net.0"] == 0
        ffn = block.ff_context
        assert not ffn.net[0].proj.weight[off].any() and not ffn.net[0].proj.bias[off].any() and not ffn.net[2].weight[:, off].any()
        assert ffn.net[0].proj.weight[~off].any(1).all() and ffn.net[2].weight[:, ~off].any(0).all()
        off = mask[f"transformer_blocks.{i}.norm1_context.linear"] == 0
        assert not block.norm1_context.linear.weight[off].any() and not block.norm1_context.linear.bias[off].any()


def test_closed_norm_gates_equal_weights_zeroed_by_hand(transformer, inputs):
    """Closing all norm gates of a block equals a zero norm1_context.linear."""
    site = "transformer_blocks.0.norm1_context.linear"
    with erase.gated(transformer, {site: torch.zeros(erase.gate_sites(transformer)[site])}):
        hooked = final(transformer, inputs)
    torch.nn.init.zeros_(transformer.get_submodule(site).weight), torch.nn.init.zeros_(transformer.get_submodule(site).bias)
    assert torch.equal(final(transformer, inputs), hooked)


def test_hooks_are_gone_after_an_exception(transformer, inputs):
    """Whatever is raised inside `gated`, the model is the base again afterwards."""
    base = final(transformer, inputs)
    with pytest.raises(ZeroDivisionError), erase.gated(transformer, random_mask(transformer)):
        1 / 0
    with pytest.raises(ValueError, match="units"), erase.gated(transformer, random_mask(transformer) | {"transformer_blocks.1.ff.net.0": torch.ones(3)}):
        pass
    assert torch.equal(final(transformer, inputs), base)


# ------------------------------------------------------------------------------------------------------------- flow
def test_rollout_equals_diffusers_own_pipeline(pipe):
    """Same prompt, seed and steps: our final latents are those of FluxPipeline.__call__, bit for bit."""
    prompts, seeds = ["a gun on a red background", "an apple"], [3, 4]
    for steps in (1, 4):
        theirs = pipe(prompts, height=64, width=64, num_inference_steps=steps, guidance_scale=0.0, max_sequence_length=24, output_type="latent",
                      generator=[torch.Generator().manual_seed(s) for s in seeds]).images
        text = erase.stack(erase.encode(pipe, prompts, 24), "cpu")
        trajectory = erase.rollout(pipe.transformer, erase.init_latents(pipe, seeds, 64, 64), text, erase.schedule(pipe, steps, 16), (4, 4))
        assert len(trajectory) == steps + 1 and torch.equal(trajectory[-1], theirs), (trajectory[-1] - theirs).abs().max()


def test_a_picture_does_not_depend_on_its_batch(pipe):
    """The same (prompt, seed) gives the same noise in any batch."""
    assert torch.equal(erase.init_latents(pipe, [7, 8], 64, 64)[1:], erase.init_latents(pipe, [8], 64, 64))


# --------------------------------------------------------------------------------------------------------- backward
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_stepwise_backward_equals_autograd(steps, transformer, inputs):
    """Loss and gate gradients of the step-wise backward are those of plain autograd through the whole rollout."""
    noise, text, grid = inputs
    target = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    loss_of = lambda x: (x - target).square().mean()
    values = {site: torch.rand(units) for site, units in erase.gate_sites(transformer, erase.MODULES).items()}
    plain, stepwise = ({s: v.clone().requires_grad_() for s, v in values.items()} for _ in range(2))
    with erase.gated(transformer, plain):
        x = noise
        for s, s_next in zip(sigmas(steps), sigmas(steps)[1:]):
            x = erase.euler(transformer, x, s, s_next, text, grid)
        loss_of(x).backward()
    with erase.gated(transformer, stepwise):
        loss, _ = erase.rollout_backward(transformer, noise, text, sigmas(steps), grid, loss_of)
    assert torch.allclose(loss, loss_of(x), atol=1e-6)
    for site in values:
        assert torch.allclose(stepwise[site].grad, plain[site].grad, rtol=1e-4, atol=1e-7), site
        assert plain[site].grad.any(), site


def test_memory_does_not_grow_with_sampling_steps(transformer, inputs):
    """The most bytes that autograd holds at once: equal at 2 and 12 sampling steps, while plain autograd's grow sixfold."""
    noise, text, grid = inputs
    held = peak = 0

    class Saved:                                  # lives exactly as long as its node of the graph
        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor = tensor
            held += tensor.nbytes
            peak = max(peak, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.nbytes

    def measure(steps, stepwise):
        nonlocal peak
        peak = 0
        gates = {site: torch.ones(units, requires_grad=True) for site, units in erase.gate_sites(transformer).items()}
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor), erase.gated(transformer, gates):
            if stepwise:
                erase.rollout_backward(transformer, noise, text, sigmas(steps), grid, lambda x: x.square().mean())
            else:
                x = noise
                for s, s_next in zip(sigmas(steps), sigmas(steps)[1:]):
                    x = erase.euler(transformer, x, s, s_next, text, grid)
                x.square().mean().backward()
        return peak

    stepwise, plain = ([measure(steps, kind) for steps in (2, 12)] for kind in (True, False))
    assert stepwise[1] <= 1.05 * stepwise[0] and plain[1] > 4 * plain[0], (stepwise, plain)


# ---------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("words, phrase", [("apple", "an apple"), ("gun", "a gun"), ("hour glass", "an hour glass"), ("unicorn", "a unicorn"),
                                           ("umbrella", "an umbrella"), ("Hulk", "Hulk"), ("guns", "guns"), ("glass", "a glass"),
                                           ("octopus", "an octopus"), ("a cat", "a cat"), ("nothing", "nothing"), ("woman", "a woman")])
def test_articles(words, phrase):
    """Articles and plurals are right in template prompts."""
    assert erase.noun_phrase(words) == phrase


def test_template_pairs():
    """Any concept gets its pairs with no file; an empty neutral is the empty prompt."""
    row = dict(prompt="a photo of {x} next to a box", evaluation_seed=1, split="train")
    pair, = erase.template_pairs("apple", "nothing", [row])
    assert (pair["prompt"], pair["neutral_prompt"]) == ("a photo of an apple next to a box", "a photo of nothing next to a box")
    assert erase.template_pairs("apple", "", [row])[0]["neutral_prompt"] == ""


@pytest.mark.parametrize("file", sorted(p for p in HERE.glob("prompts/**/*.csv") if p.stem not in ("retain", "templates")), ids=lambda p: str(p.relative_to(HERE)))
def test_shipped_prompts(file):
    """Every shipped concept file reads, has at least 20 train pairs, and no prompt is both trained and tested on."""
    rows = erase.read_prompts(file, "--concept")
    split = {s: [r["prompt"] for r in rows if r["split"] == s] for s in ("train", "test")}
    assert len(split["train"]) >= 20 and len(split["test"]) >= 50 and not set(split["train"]) & set(split["test"])
    word = dict(nudity="nude", drug="drugs?").get(file.stem, file.stem.replace("_", " "))
    for row in rows:
        assert re.search(rf"\b{word}", row["prompt"], re.I) and not re.search(rf"\b{word}\b", row["neutral_prompt"], re.I), row
        assert file.stem != "nudity" or not re.search(r"boy|girl|child|kid|teen|young|minor|school|student|baby", row["prompt"] + row["neutral_prompt"], re.I), row


# ------------------------------------------------------------------------------------------------- fold, save, load
def test_mask_round_trip_and_refusals(tmp_path, transformer):
    """A mask loads as it was saved; another base, a truncated file and a missing one are refused."""
    mask, path = random_mask(transformer), tmp_path / "mask.safetensors"
    erase.save_mask(path, mask, erase.fingerprint(transformer), model="m")
    loaded = erase.load_mask(path, transformer)
    assert loaded.keys() == mask.keys() and all(torch.equal(loaded[s], mask[s]) for s in mask)
    transformer.proj_out.weight.data[0, 0] += 1
    with pytest.raises(erase.UserError, match="made for base weights"):
        erase.load_mask(path, transformer)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(erase.UserError, match="not a readable safetensors"):
        erase.load_mask(path, transformer)
    with pytest.raises(erase.UserError, match="not a readable safetensors"):
        erase.load_mask(tmp_path / "none.safetensors", transformer)


# ----------------------------------------------------------------------------------------------------- command line
def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, "erase.py", *map(str, arguments)], cwd=HERE, capture_output=True, text=True, **kwargs)


FILES = {"README.md", "config.json", "curves.png", "mask.safetensors", "metrics.jsonl", "preview.png", "state.safetensors"}
QUICK = ("--model", "tiny/flux", "--concept", "gun", "--steps", "4", "--batch", "2", "--retain_batch", "2", "--save_every", "1",
         "--lr_ffn", "1.5", "--lr_norm", "1.5")


@pytest.fixture(scope="session")
def erased(tmp_path_factory):
    """A four-step run of the real command line."""
    out = tmp_path_factory.mktemp("erased") / "gun"
    done = run(*QUICK, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["closed"] < 1
    return out


def test_command_line_writes_the_documented_files(erased):
    """One run writes exactly the documented files, one metrics line per step, and finite losses."""
    assert {p.name for p in erased.iterdir()} == FILES | {"transformer"}
    rows = [json.loads(line) for line in (erased / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and all(0 < r["loss"] < 10 for r in rows)


def test_erased_model_loads_from_folder_and_from_mask(erased, tmp_path, pipe):
    """transformer/ in a stock pipeline, load_erased with it, and load_erased from the mask alone draw the same latents."""
    stock = FluxPipeline.from_pretrained(HERE / "tiny/flux", transformer=FluxTransformer2DModel.from_pretrained(erased / "transformer"))
    for name in ("config.json", "mask.safetensors"):
        (tmp_path / name).write_bytes((erased / name).read_bytes())
    latents = [p("a gun", height=64, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=24, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).images for p in (stock, erase.load_erased(erased, "cpu"), erase.load_erased(tmp_path, "cpu"), pipe)]
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[3])


def test_load_erased_fails_closed(erased, tmp_path):
    """Without its mask, an erased model is refused: never the base by mistake."""
    (tmp_path / "config.json").write_bytes((erased / "config.json").read_bytes())
    with pytest.raises(erase.UserError, match="no mask.safetensors"):
        erase.load_erased(tmp_path)


def test_resumed_run_equals_uninterrupted_run(erased, tmp_path):
    """A run killed in the middle and resumed ends in the same mask, optimiser state and losses, bit for bit."""
    out, steps = tmp_path / "gun", 0
    killed = subprocess.Popen([sys.executable, "erase.py", *QUICK, "--out_dir", str(out)], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while steps < 2 and killed.poll() is None:
            time.sleep(0.02)
            steps = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
    finally:
        killed.kill(), killed.wait()
    assert steps >= 2 and not (out / "mask.safetensors").exists()
    assert run(*QUICK, "--out_dir", out).returncode == 2                                 # not empty, and no --resume
    resumed = run(*QUICK, "--out_dir", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("state.safetensors", "mask.safetensors"):
        ours, theirs = load_file(out / name), load_file(erased / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, erased)]
    assert losses[0] == losses[1] and run(*QUICK, "--out_dir", out, "--resume").returncode == 2   # finished


def write(path, text):
    path.write_text(text)
    return path


HEADER = "case_number,prompt,neutral_prompt,evaluation_seed,split\n"
BAD = [
    (["--steps", "0"], "--steps: must be at least 1, not 0"),
    (["--batch", "-1"], "--batch: must be at least 1"),
    (["--beta", "-1"], "--beta: must be a number >= 0"),
    (["--lr_ffn", "nan"], "--lr_ffn: must be a number >= 0"),
    (["--height", "60"], "--height: must be a multiple of 16"),
    (["--modules", "ffn", "bias"], "argument --modules: invalid choice: 'bias'"),
    (["--gate", "step"], "argument --gate: invalid choice: 'step'"),
    (["--concept", " "], "--concept: is empty"),
    (["--neutral", "a toy gun"], "--neutral: 'a toy gun' contains the concept"),
    (["--model", "prompts"], "--model: prompts is not a diffusers FLUX model"),
    (["--prompts", "none.csv"], "--prompts: cannot read none.csv"),
    (["--retain", "LICENSE"], "--retain: LICENSE has no column 'prompt'"),
    (["--model", "tiny/judge"], "--model: tiny/judge is not a diffusers FLUX model"),
    (["--out_dir", "prompts"], "--out_dir: prompts is not empty"),
    (["--out_dir", "LICENSE"], "--out_dir: LICENSE is a file"),
    (["--resume", "--out_dir", "no_such_folder"], "--resume: no run to go on with in no_such_folder"),
    ([HEADER.replace("neutral_", "neutral")], "has no column 'neutral_prompt'"),
    ([HEADER], "holds no prompts"),
    ([HEADER + "0,a gun,nothing,1,training\n"], "line 2: split is 'training'"),
    ([HEADER + "0,a gun,nothing,1,train\n1,a gun,a gun,1,train\n"], "line 3: prompt and neutral_prompt are the same"),
    ([HEADER + "0,a gun,nothing,one,train\n"], "line 2: evaluation_seed is 'one'"),
    ([HEADER + "0,a gun,nothing,1\n"], "line 2: 4 fields, the header has 5"),
    ([HEADER + "0,a cat,nothing,1,train\n"], "--concept: 'gun' occurs in no prompt"),
    ([HEADER + "0,a gun,nothing,1,test\n"], "--prompts: no training pairs"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    """Bad input ends in exit code 2 and one line that names the flag or file, before a weight is loaded; nothing is written."""
    monkeypatch.chdir(HERE)
    if arguments[0].startswith("case"):
        arguments = ["--prompts", str(write(tmp_path / "p.csv", arguments[0]))]
    base = [] if "--concept" in arguments else ["--concept", "gun"]
    out = [] if "--out_dir" in arguments else ["--out_dir", str(tmp_path / "out")]
    try:
        code = erase.main([*base, "--device", "cpu", *arguments, *out] if "--model" in arguments else [*base, "--model", str(HERE / "tiny/flux"), *arguments, *out])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error.splitlines()[-1] and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_no_disk_space_is_one_line(tmp_path, capsys, monkeypatch):
    """Too little room for the transformer folder is found before loading, with the flag that helps."""
    monkeypatch.setattr(erase.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert erase.main(["--concept", "gun", "--model", str(HERE / "tiny/flux"), "--out_dir", str(tmp_path / "out")]) == 2
    assert "--save mask" in capsys.readouterr().err


def test_non_finite_loss_stops_the_run(tmp_path, capsys, monkeypatch):
    """A loss that is not finite ends the run with exit code 1, naming the step."""
    monkeypatch.setattr(erase.Cases, "loss", lambda self, gates, *a, **k: torch.full((3,), float("nan")))
    assert erase.main(["--concept", "gun", "--model", str(HERE / "tiny/flux"), "--out_dir", str(tmp_path / "out")]) == 1
    assert "step 0: the loss is nan" in capsys.readouterr().err


def test_dry_run_loads_no_weights(tmp_path, capsys, monkeypatch):
    """--dry_run prints the model, the number of gates and of prompts, and writes nothing."""
    monkeypatch.setattr(erase, "load_pipeline", None)
    assert erase.main(["--concept", "gun", "--model", str(HERE / "tiny/flux"), "--out_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "gates in 12 layers" in out and "20 concept pairs" in out and not (tmp_path / "out").exists()


def test_paper_preset_is_table_6():
    """--preset paper gives the paper's values on any model."""
    args = erase.parse_args(["--concept", "gun", "--model", "tiny/flux", "--preset", "paper"])
    assert (args.gate, args.lr_ffn, args.lr_norm, args.weight_decay, args.beta, args.batch, args.steps, args.num_prompts) == (
        "hard_concrete", 0.5, 0.5, 0.01, 0.01, 4, 400, 20)


def test_every_readme_command_parses():
    """Each `python erase.py ...` line of README's code blocks is accepted by the real argparse."""
    commands = [line.split("&&")[-1].strip() for line in (HERE / "README.md").read_text().splitlines() if "python erase.py" in line and line.startswith(("python", "pip"))]
    assert len(commands) >= 6
    for command in commands:
        erase.parse_args(shlex.split(command.split("python erase.py")[1].split("#")[0].strip(" `")))
