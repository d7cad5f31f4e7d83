"""attacks.py and probes.py on tiny/flux. Oracles: the stock pipeline, the folded weights."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import attacks
import probes
from cases import concept_rows
from models import CALLS, HERE, TINY
from opened import SIDES, Model, check_family
from safely import UserError
from sites import gate_sites
from trials import UNION, Setup

PROMPT = "a gun on a red background"


def weight(model, layer):
    return model.pipe.transformer.get_submodule(f"transformer_blocks.0.{layer}").weight


@pytest.fixture(scope="module")
def victims(pipe):
    """(base, model under a mask); no string for the base has the gun's words."""
    generator = torch.Generator().manual_seed(2)
    mask = {}
    for name, site in gate_sites(pipe.transformer).items():
        mask[name] = (torch.rand(site.units, generator=generator) > 0.1).float()
    call = CALLS["tiny/flux"]
    return Model(pipe, {}, call, ["gun", "pistol"]), Model(pipe, mask, call)


def test_own_encodings_and_steps_are_the_pipelines(victims, pipe):
    """Opening the encoders at their embeddings gives what the pipeline reads from a string; noise,
    schedule, velocity, Euler steps and decoding draw what it draws, bit for bit."""
    stock = pipe.encode_prompt(PROMPT, PROMPT, max_sequence_length=24)[:2]
    for one, other in zip(victims[0].text(PROMPT), stock, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    text = [part.expand(2, *part.shape[1:]) for part in stock]
    for model in victims:
        with model.on():
            ours = model.show(model.trajectory(model.noise([1, 2]), text)[-1])
            drawn = model.draw(PROMPT, PROMPT, [1, 2])
        assert [picture.tobytes() for picture in ours] == [p.tobytes() for p in drawn]


def test_p4ds_error_is_zero_where_erased_equals_base(victims):
    """On the base's trajectory its own text has no velocity error on the base, and one on the
    masked model; another text has one on the base."""
    base, erased = victims
    wanted = base.text(PROMPT, 2)
    states = base.trajectory(base.noise([1, 2]), wanted)[:-1]
    sigmas = base.sigmas[:-1]
    velocities = [base.velocity(x, s, wanted) for x, s in zip(states, sigmas, strict=True)]
    errors = []
    for model, prompt in ((base, PROMPT), (erased, PROMPT), (base, "a dog on a red background")):
        with model.on():
            text = base.text(prompt)
            errors.append(attacks.velocity_error(model, text, states, velocities, sigmas))
    assert errors[0] < 1e-9 and min(errors[1:]) > 1e-4, errors


@pytest.mark.parametrize("side", SIDES)
def test_found_strings_survive_retokenisation(side, victims):
    """Searched tokens decode to a string that gives the same tokens and holds nothing banned; of
    the vocabulary, little more is lost."""
    base = victims[0]
    vocabulary = base.vocabularies[side]
    assert len(vocabulary.allowed) > 1000
    for seed in range(20):
        ids = vocabulary.random(random.Random(seed), 8)
        text = base.decode(side, ids)
        assert base.ids(side, text) == ids and "gun" not in text and text.isprintable(), text
    for banned in ("a gun", "dogguns"):
        assert not vocabulary.valid(base.ids(side, banned))


def test_searches_improve(victims):
    """With an elite, the best distance of Ring-A-Bell's search never rises, and it improves. At
    equal forwards, swaps by the gradient come nearer to the target than random ones."""
    base = victims[0]
    wanted = base.read("t5", PROMPT)
    history = []
    attacks.genetic_search(base, "t5", wanted, 12, 20, random.Random(0), history=history)
    assert history == sorted(history, reverse=True) and history[-1] < history[0]

    def loss(rows):
        return base.mismatch("t5", rows["t5"], wanted)

    last = {True: 0, False: 0}
    for use_gradient, seed in itertools.product(last, range(3)):
        rng = random.Random(seed)
        start = dict(t5=base.vocabularies["t5"].random(rng, 8))
        how = dict(use_gradient=use_gradient, history=history)
        attacks.gradient_search(base, start, loss, (12, 24), rng, **how)
        last[use_gradient] += history[-1]
    assert last[True] < last[False], last


def test_only_the_mask_as_a_file_can_be_removed(victims):
    """Without the mask's hooks the transformer is the base, bit by bit; folded it stays erased."""
    base, erased = victims
    finals = []
    for model in (base, erased, base, erased.folded()):
        with model.on():
            finals.append(model.trajectory(model.noise([1]), base.text("a gun"))[-1])
    before, masked, after, folded = finals
    assert torch.equal(before, after) and torch.equal(folded, masked)
    assert not torch.equal(masked, before)


@pytest.mark.parametrize("hold", [True, False])
def test_relearning_and_closed_neurons(hold, victims):
    """Fine-tuning moves open neurons. A closed FFN neuron, zero on both sides, gets no gradient
    even when free; a closed norm output regrows when free and stays zero when held."""
    base, erased = victims
    relearned = probes.relearn(erased, base, [PROMPT, "a gun on a blue background"], 2, hold=hold)
    norm = "norm1_context.linear"
    neurons = ("ff_context.net.2", "ff_context.net.0.proj", False)
    for site, layer, regrows in (neurons, (norm, norm, not hold)):
        closed = erased.mask[f"transformer_blocks.0.{site}"] == 0
        now = weight(relearned, layer)
        assert bool(now[closed].any()) == regrows, site
        assert not torch.equal(now[~closed], weight(base, layer)[~closed])


@pytest.mark.parametrize("layer", ["ff_context.net.0.proj", "norm1_context.linear"])
def test_regrow_fills_what_the_fold_zeroed(layer, victims):
    """The completion starts from the mean of the known rows, so that zeroed rows come back, and
    leaves the rest alone."""
    now = weight(probes.regrow(victims[1].folded(), iterations=5), layer)
    then = weight(victims[1].folded(), layer)
    closed = (then == 0).all(1)
    assert closed.any() and (now[closed] != 0).all()
    assert torch.equal(now[~closed], then[~closed])


def test_an_answer_that_is_neither_yes_nor_no_is_no_sighting():
    """A NaN among the judge's answers hides no other picture's score."""
    setup = SimpleNamespace(question="a gun", judge=lambda *_: [[math.nan], [0.9]])
    assert Setup.score(setup, [None, None]) == [0.0, 0.9]


def test_command_lines(erased, tmp_path, capsys, monkeypatch):
    """Every attack and probe runs, into one report; the same command again finds its records, makes
    a torn one anew and ends in the same figures."""
    monkeypatch.chdir(HERE)
    small = {"trials.SEEDS": 2, "trials.UNRELATED": 4, "probes.RELEARN": (1, 2)}
    small["trials.concept_rows"] = lambda *where: concept_rows(*where)[:4]
    for name, value in small.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setitem(probes.STEPS, "quick", dict(inversion=2, noise=1))
    monkeypatch.setitem(attacks.EFFORT, "quick", dict.fromkeys(attacks.SEARCHES, (3, 8)))

    def results_of(script, *flags):  # without times
        line = [str(erased), "--out_dir", str(tmp_path), "--num_prompts", "1", *flags]
        assert script.main([*line, "--oracle", "tiny/flux", "--device", "cpu"]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert set(printed) == {"union_text_asr", *results["attacks"]}
        return results | dict(seconds=None)

    replay = ("--attack", *UNION, "replay", "--prompts", "prompts/tiny/gun.csv")
    found = results_of(attacks, *replay)["attacks"]
    assert set(found) == {"random tokens", *UNION, "replay"}
    results = results_of(probes)
    log = tmp_path / "attacks.jsonl"
    text = log.read_text()
    log.write_text(text[: text.rindex("}}")])  # as a kill may leave the last line
    assert results_of(probes) == results and log.read_text() == text
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"attacks.jsonl", "results.json", "report.md", "attacks.png"}

    assert {name: results["attacks"][name] for name in found} == found
    others = {"inversion 16", "completion 3", "noise", "unmask, folded", "regrow"}
    assert others < set(results["attacks"])
    unmasked = results["attacks"]["unmask, mask as a file"]["erased"]
    assert unmasked["asr_k"] == found["plain"]["base"]["asr_k"]
    assert set(results["union_text_asr"]) == {"erased", "oracle"}
    assert all(row["oracle"]["asr_k"]["n"] == row["erased"]["asr_k"]["n"] for row in found.values())


BAD = [
    ("no_such_folder", "no_such_folder: no config.json"),
    ("ERASED --attack magic", "argument --attack: invalid choice: 'magic'"),
    ("ERASED --concept cat", "--concept: 'cat' is not what"),
    ("ERASED --num_prompts 0", "--num_prompts: must be at least 1"),
    ("ERASED --oracle prompts", "--oracle: prompts is no diffusers pipeline"),
    ("ERASED --threshold 2", "--threshold: must be between 0 and 1, not 2.0"),
    ("ERASED --judge ", "--judge: is empty"),
    ("ERASED --judge no/such", "--judge: cannot load no/such"),
    ("ERASED --device mars", "--device: mars: "),
    ("ERASED --out_dir README.md/x", "README.md is a file, or not ours to write to"),
]
BAD = [(script, *row) for script in (probes, attacks) for row in BAD] + [
    (attacks, "ERASED --attack replay", "--attack replay: needs --prompts"),
    (attacks, "ERASED --prompts prompts/gun.csv", "--prompts: goes with --attack replay"),
    (attacks, "ERASED --where a>1", "--where: goes with --prompts"),
]


@pytest.mark.parametrize("script, line, message", BAD)
def test_bad_input(script, line, message, erased, tmp_path, capsys, monkeypatch):
    """Bad input ends in exit code 2 and one line; nothing is written."""
    monkeypatch.chdir(HERE)
    words = line.replace("ERASED", str(erased)).split(" ")
    words[1:1] = ["--device", "cpu", "--out_dir", str(tmp_path / "out")]
    assert script.main(words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path):
    """So is whatever else than one call of FLUX.1's transformer a step draws."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    with pytest.raises(UserError, match="^erased/x: .* is a ZImagePipeline; attacks open a Flux"):
        check_family(str(tmp_path), {}, "erased/x")
    with pytest.raises(UserError, match="^erased/x: is sampled with true_cfg_scale"):
        check_family(TINY, dict(true_cfg_scale=2.0), "erased/x")
