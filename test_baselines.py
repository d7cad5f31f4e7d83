"""baselines.py and methods.py. Oracles: the normal equations, diffusers' own guidance, the base,
and what evaluate.py reads of what was written."""

import copy
import json
import re

import pytest
import torch

import baselines
import evaluate
import foreign
import methods
import models
import promptfiles
from artefacts import write_json
from erase import rollout, squared_error
from opened import Model

TINY = ["--model", "tiny/flux", "--device", "cpu", "--concept", "gun"]
TRAINED = [name for name, own in baselines.METHODS.items() if "lr" in own]


@pytest.fixture(scope="module")
def remembering(pipe):
    """The pipeline, which encodes each prompt once for all tests."""
    pipe = copy.copy(pipe)
    models.remember_prompts(pipe)
    return pipe


def make(remembering, method, *flags) -> methods.Lab:
    if method in baselines.PICTURES:
        flags = (*flags, "--cases", "cases.json")
    args = baselines.parse_args([*TINY, "--method", method, *map(str, flags)])
    folder = models.prompt_folder(args.model)
    rows = promptfiles.training_rows(folder, concept=["gun"], num_prompts=20)
    model = Model(copy.copy(remembering), {}, models.CALLS["tiny/flux"])
    return baselines.make_lab(model, args, rows, folder)


def velocity(lab) -> torch.Tensor:
    return lab.model.velocity(lab.model.noise([1, 2]), 0.5, lab.text(["a gun", "a dog"]))


def test_closed_forms_solve_their_normal_equations():
    """sum w (W c - v) c^T + lam (W - W_old) = 0 on random rows; a large weight makes W c = v."""
    old, c, v = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4, 3)
    found = methods.closed_form(old, [(c[:1], v[:1], 2.0), (c[1:], v[1:], 0.3)], 0.5)
    weights = torch.tensor([2.0, 0.3, 0.3, 0.3])[:, None]
    gradient = (weights * (c @ found.T - v)).T @ c + 0.5 * (found - old)
    assert gradient.abs().max() < 1e-5
    exact = methods.closed_form(old, [(c, v, 1e8)], 0.5)
    assert (c @ exact.T - v).abs().max() < 1e-4


def test_uce_moves_the_concept_and_keeps_the_words(remembering):
    """The less the old weights count, the nearer the concept's last token comes to the guide's;
    with --retain the other words stay nearer than without."""
    layer = remembering.transformer.context_embedder
    moved, kept = [], []
    for lam, retain in ((100, 0), (0.5, 0), (0.5, 1)):
        lab = make(remembering, "uce", "--lam", lam, "--retain", retain)
        lab = lab._replace(words=dict(list(lab.words.items())[:12]))
        methods.uce(lab)
        assert list(lab.leaves) == [f"{name}.weight" for name in methods.TEXT_LAYERS]
        change = lab.leaves["context_embedder.weight"] - layer.weight
        last = len(lab.model.tokenizers["t5"]("gun").input_ids) - 2
        gun, empty = lab.text(["gun"])[0][0, last], lab.text([""])[0][0, -1]
        moved.append((layer.weight @ (gun - empty) + change @ gun).norm() / (gun - empty).norm())
        lengths = {w: len(lab.model.tokenizers["t5"](w).input_ids) for w in lab.words}
        lasts = torch.stack([lab.text([w])[0][0, n - 2] for w, n in lengths.items()])
        kept.append((change @ lasts.T).norm())
    assert moved[1] < moved[0] and kept[2] < kept[1]


def test_tokens_that_stand_for_each_other():
    """The same tokens; replaced ones in order or, of other number, all; else the whole prompt."""
    assert methods.aligned([5, 6, 0, 0], [5, 7, 0, 0]) == [[0], [1], [2], [3]]
    assert methods.aligned([5, 8, 9, 6], [5, 7, 6]) == [[0], [1], [1], [2]]
    assert methods.aligned([5, 8, 6], [5, 6]) == [[0], [0, 1], [1]]


def test_uce_on_whole_prompts_erases_what_it_is_given(remembering):
    """In most of its concept prompts the final latents become nearly the neutral prompts'; those of
    retain prompts hardly move."""
    lab = make(remembering, "uce_context")
    lab = lab._replace(retain=lab.retain[:40])
    methods.uce_context(lab)
    prompts, neutrals = zip(*lab.pairs[:8], strict=True)
    noise = lab.model.noise(range(8))

    def final(texts):
        return lab.model.trajectory(noise, lab.text(texts))[-1]

    base, wanted, other = final(prompts), final(neutrals), final(lab.retain[:8])
    with methods.student(lab):
        erased, stays = final(prompts), final(lab.retain[:8])
    left = squared_error(erased, wanted) / squared_error(base, wanted)
    moved = squared_error(stays, other) / squared_error(other, 0 * other)
    assert left.median() < 0.1 and moved.median() < 0.01, (left, moved)


@pytest.mark.parametrize("method, turn", [(name, 0) for name in TRAINED] + [("eraseanything", 1)])
def test_training_lowers_the_method_s_loss(method, turn, pipe, remembering, tmp_path):
    """A few optimiser steps on fixed data lower the loss (on these: esd, eap and eraseanything look
    at points of the student's own way, which moves) and leave the base as it was; the file then
    holds the student: evaluate.py's loader gives its velocities."""
    lab = make(remembering, method, "--batch_size", 2, "--lr", 3e-3 if "esd" in method else 1e-3)
    before = velocity(lab)
    optimizer = torch.optim.Adam(lab.leaves.values(), lr=lab.flags.lr)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        total = 0.0
        for loss in getattr(methods, method)(lab, turn):
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
    assert losses[-1] < losses[0], losses
    assert torch.equal(velocity(lab), before)
    with methods.student(lab):
        after = velocity(lab)
    assert not torch.equal(after, before)
    baselines.save(lab, tmp_path)
    found = foreign.find(tmp_path, pipe)
    assert re.match("LoRA" if lab.flags.rank else "partial state dict", found.form)
    other = lab.model.pipe.transformer
    lab.model.pipe.transformer = found.load().transformer
    assert torch.allclose(velocity(lab), after, atol=1e-4)
    lab.model.pipe.transformer = other


def test_what_holds_the_retain_prompts(remembering):
    """It is 0 at first and grows with the change; in EAP's adversary's turns only the choice
    of the word has a gradient."""
    lab = make(remembering, "eap", "--batch_size", 2, "--retain", 2)
    assert [loss.item() for loss in methods.kept(lab, 0)] == [0]
    for leaf in lab.leaves.values():
        leaf.data *= 1.05
    (loss,) = methods.kept(lab, 0)
    (gain,) = methods.eap(lab, 1)
    gain.backward()
    assert loss > 0 > gain and all(leaf.grad is None for leaf in lab.leaves.values())
    assert lab.adversary.grad.norm() > 0


def test_where_a_concept_is_read(remembering):
    """Tokens of its name; of a prompt without it, all that are no padding."""
    lab = make(remembering, "eraseanything")
    tokenizer = lab.model.tokenizers["t5"]
    found = methods.concept_tokens(lab, ["a gun on a red background", "a dog"])
    ids = tokenizer("a gun on a red background").input_ids
    read = [tokenizer.decode([i]) for i, chosen in zip(ids, found[0]) if chosen]
    assert "".join(read).strip() == "gun" and found[1].sum() == len(tokenizer("a dog").input_ids)


def test_guidance_is_diffusers_own(pipe, remembering):
    """A negative prompt is true_cfg_scale's; SLD of the concept's bare name with eta 1 leaves
    v(gun) - v(gun) + v(""); without strength, and where nothing is edited, it is the base."""
    cases = [dict(prompt=text, seed=i, neutral=None) for i, text in enumerate(["a gun", "a dog"])]
    prompts = [case["prompt"] for case in cases]
    call = models.CALLS["tiny/flux"]
    with torch.no_grad():
        base = rollout(pipe, prompts, [0, 1], **call)
        how = call | dict(true_cfg_scale=2.5, negative_prompt="gun")
        wanted = rollout(pipe, prompts, [0, 1], **how)
        found = methods.negative(make(remembering, "negative", "--eta", 1.5), cases)
        assert torch.allclose(found, wanted, atol=1e-4)
        for method in ("negative", "sld"):
            lab = make(remembering, method, "--eta", 0)
            assert torch.allclose(getattr(methods, method)(lab, cases), base, atol=1e-5)
        lab = make(remembering, "sld", "--eta", 1)
        same = [dict(prompt="gun", seed=0, neutral=None)]
        nothing = rollout(pipe, [""], [0], **call)
        assert torch.allclose(methods.sld(lab, same), nothing, atol=1e-4)
        lab = make(remembering, "flowedit", "--steps", 8)
        assert torch.allclose(methods.flowedit(lab, cases), base, atol=1e-5)
        cases[0]["neutral"] = "nothing"
        edited = methods.flowedit(lab, cases)
        assert torch.allclose(edited[1], base[1], atol=1e-5) and (edited[0] - base[0]).norm() > 1


def run(capsys, *arguments, code=0) -> str:
    assert baselines.main([*TINY, *map(str, arguments)]) == code, capsys.readouterr()
    read = capsys.readouterr()
    return read.err if code else read.out


def test_command_line(tmp_path, capsys, monkeypatch):
    """A stopped run goes on to the same bytes; weights and pictures go through evaluate.py, which
    finds each to be what it is; config.json tells flags, seconds and memory."""
    whole, again, shown = tmp_path / "whole", tmp_path / "again", tmp_path / "shown"
    flags = "--method esd --steps 3 --lr 0.01 --batch_size 2 --retain 1 --save_every 1".split()
    run(capsys, *flags, "--out_dir", whole)
    stock = methods.esd

    def stopped(lab, step):
        if step == 2:
            raise KeyboardInterrupt
        return stock(lab, step)

    monkeypatch.setattr(methods, "esd", stopped)
    run(capsys, *flags, "--out_dir", again, code=130)
    monkeypatch.undo()
    assert (again / "state.safetensors").is_file()
    assert "--resume: lr was 0.01" in run(
        capsys, *flags, "--lr", 1, "--out_dir", again, "--resume", code=2
    )
    out = run(capsys, *flags, "--out_dir", again, "--resume")
    files = {path.name for path in again.iterdir() if path.name != ".lock"}
    assert files == {"config.json", "edited.safetensors"} and "next: python evaluate.py" in out
    assert (again / "edited.safetensors").read_bytes() == (
        whole / "edited.safetensors"
    ).read_bytes()
    config = json.loads((again / "config.json").read_text())
    assert config["flags"]["concept"] == ["gun"] and config["flags"]["eta"] == 1
    assert config["seconds"] is None  # it was begun twice
    config = json.loads((whole / "config.json").read_text())
    assert config["seconds"] > 0 and config["peak_ram_gib"] > 0
    del config["seconds"]
    for key, message in dict(rows="prompt files have changed", versions="versions was").items():
        other = tmp_path / key
        other.mkdir()
        write_json(other / "config.json", config | {key: None})
        assert message in run(capsys, *flags, "--out_dir", other, "--resume", code=2)

    few = ["--num_pictures", "2", "--per_neighbour", "0", "--fid", "none"]
    listing = tmp_path / "cases.json"
    assert evaluate.main([*TINY, *few, "--export_cases", str(listing)]) == 0
    run(capsys, "--method", "negative", "--eta", 3, "--cases", listing, "--out_dir", shown)
    picture = next(shown.glob("concept/*.png"))
    kept = picture.read_bytes()
    picture.unlink()
    config = json.loads((shown / "config.json").read_text())
    del config["seconds"]  # as if killed
    write_json(shown / "config.json", config)
    how = ("--method", "negative", "--eta", 3, "--cases", listing, "--out_dir", shown)
    run(capsys, *how, "--resume")
    assert picture.read_bytes() == kept
    both = ["--compare", str(whole), str(shown), "--out_dir", str(tmp_path / "out")]
    assert evaluate.main([*TINY, *few, *both]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    weights, pictures = found["about"]["forms"].values()
    assert weights.startswith("partial state dict") and pictures == "pictures in folders by set"
    assert found["results"][str(shown)]["ssim"] < 1 > found["results"][str(whole)]["ssim"]


BAD = """
--method mce | --method: invalid choice
--method uce --steps 5 | --steps: uce has none
--method esd --rank 4 | --rank: esd has none
--method esd --lam 1 | --lam: esd has none
--method ca --eta 1 | --eta: ca has none
--method esd --layers ffn | --layers: invalid choice
--method gem --anchor neutral | --anchor: gem has none
--method uce --neutral lemon | --neutral: uce does not read it
--method sld --cases {bad} --num_prompts 3 | --num_prompts: sld does not read it
--method esd --neutral lemon | --neutral: esd reads it with --anchor neutral alone
--method flowedit --cases {number} | {number} has a case whose neutral is no text
--method sld | --cases: what evaluate.py --export_cases writes, needed by sld
--method esd --cases cases.json | --cases: is for sld, negative, flowedit
--method sld --cases cases.json --height 64 | --height: does not go with --cases
--method sld --cases no.json | --cases: no.json
--method sld --cases {bad} | --cases: {bad} is no listing
--method esd --lr nan | --lr: must be between 0
--method esd --concept unicorn | --kind: needed for 'unicorn'
--method esd --prompts no.csv | --prompts: cannot read no.csv
--method esd --model tiny/flux2 | --model: tiny/flux2 is a Flux2KleinPipeline; baselines need
--method esd --model nowhere/at-all | --model: nowhere/at-all
--method esd --true_cfg_scale 2 | --true_cfg_scale: baselines
--method esd --device tpu | --device: tpu
--method esd --out_dir {full} | --out_dir: {full} is not empty
--method esd --resume | --resume: no unfinished run in
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input(line, tmp_path, capsys, monkeypatch):
    """Ends in exit code 2 and one line that names the flag, before a weight is loaded."""
    monkeypatch.setattr(models, "load_pipeline", None)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("a")
    case = dict(file="concept/0.png", prompt="a gun", seed=0, neutral=5)
    (tmp_path / "number.json").write_text(json.dumps(dict(cases=[case])))
    names = dict(bad=tmp_path / "bad.json", number=tmp_path / "number.json", full=tmp_path / "full")
    arguments, message = line.format(**names).split(" | ")
    found = run(capsys, "--out_dir", tmp_path / "new", *arguments.split(), code=2)
    assert message in found and len(found.splitlines()) == 1, found
    assert not (tmp_path / "new").exists()
