"""pytest on a CPU, no network. Oracles: independent counts, the stock pipeline, the run itself."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer

import attacks
import cases
import erase
import evaluate
import families
import models
import pairfilter
import probes
from artefacts import check_folder, fingerprints, listing, save_mask, write_json
from columns import random_mask, soft_gates
from conftest import PLACE, QUICK, TWO_PROCESSES, command, run
from judges import ClipJudge
from models import HERE, TINY, remember_prompts
from pictures import draw
from promptfiles import COLUMNS, of_split, read_rows
from report import unlearning
from safely import UNFINISHED, UserError, release, write_atomically
from test_judges import JUDGE, save_small

FEW = "--num_pictures 10 --per_neighbour 1 --fid none --device cpu".split()


def score(*arguments, out_dir, launch=()):
    """results.json of the real command line, without times."""
    done = run("evaluate.py", *arguments, *FEW, "--out_dir", out_dir, launch=launch)
    assert done.returncode == 0, done.stderr
    assert f"on {2 if launch else 1} processes" in done.stdout
    results = json.loads((out_dir / "results.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]).keys() == results["results"].keys()
    return results | dict(seconds=None)


def test_residue(evaluation, erased, pipe):
    """|erased - neutral|^2 / |base - neutral|^2 of final latents: as computed by hand; 1 for the
    base; its median, 95th percentile and share above a quarter are in the table."""
    out_dir, found = evaluation
    rows = of_split(read_rows(HERE / "prompts/tiny/gun.csv", "--prompts"), "test")[:10]
    prompts, neutrals = ([row[name] for row in rows] for name in ("prompt", "neutral_prompt"))
    seeds = [row["evaluation_seed"] for row in rows]
    call = models.CALLS["tiny/flux"]
    pipes = (erase.load_erased(erased, "cpu"), pipe, pipe)
    with torch.no_grad():
        texts = (prompts, prompts, neutrals)
        drawn = [erase.rollout(p, t, seeds, **call) for p, t in zip(pipes, texts, strict=True)]
    after, before, neutral = (latents.flatten(1) for latents in drawn)
    ratio = (after - neutral).square().sum(1) / (before - neutral).square().sum(1)
    figures = found["results"][str(erased)]
    assert figures["residue, median"] == pytest.approx(ratio.quantile(0.5).item(), abs=2e-4)
    assert figures["residue, 95th percentile"] == pytest.approx(
        ratio.quantile(0.95).item(), abs=2e-4
    )
    assert figures["residue above 0.25"]["rate"] == pytest.approx(
        (ratio > 0.25).float().mean().item()
    )
    assert found["results"]["base"]["residue, median"] == 1
    scores = json.loads((out_dir / "scores.json").read_text())[str(erased)]
    assert len([key for key in scores if ", residue gun" in key]) == 10
    assert "| residue, median | 1.000 |" in (out_dir / "report.md").read_text()


def refused(capsys, *arguments):
    """The last line of a run that ends in bad input."""
    assert evaluate.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(scope="session")
def evaluation(erased, tmp_path_factory):
    """(folder, results) of one evaluation with controls."""
    out_dir = tmp_path_factory.mktemp("evaluation")
    return out_dir, score(erased, "--controls", out_dir=out_dir)


def test_figures_of_an_evaluation(erased, evaluation):
    """The base drawn again is the base; as many gates closed at random are as many, at each site;
    binary gates leave no gap to the soft ones. ACC is what a bare SiglipModel sees in the PNG
    files, its own logits above 0; prompts longer than each text tower are counted."""
    out_dir, found = evaluation
    base, ours, again, random, soft = found["results"].values()
    assert again == base and base["ssim"] == 1 and ours["ssim"] < 1
    mask = load_file(erased / "mask.safetensors")
    for site, gates in random_mask(mask).items():
        assert gates.sum() == mask[site].sum()
    assert random["closed"] == ours["closed"] > 0 and random["ssim"] != ours["ssim"]
    assert (soft["acc"], soft["closed"]) == (ours["acc"], ours["closed"])

    judge = AutoModel.from_pretrained(JUDGE)
    processor = AutoProcessor.from_pretrained(JUDGE)
    text = dict(text=["a gun"], padding="max_length", max_length=12, return_tensors="pt")
    for figures, name in ((base, "base"), (ours, "*gun")):
        shown = [Image.open(file) for file in out_dir.glob(f"{name}/concept/*.png")]
        inputs = processor(images=shown, **text)
        logits = judge(inputs.input_ids, inputs.pixel_values).logits_per_image
        assert len(shown) == 10 and figures["acc"]["hits"] == (logits > 0).sum().item()

    listed = json.loads((out_dir / "base/cases.json").read_text())["cases"]
    about = found["about"]
    for name, folder, limit, sets in (
        ("T5", "flux/tokenizer_2", 24, ""),
        ("CLIP", "flux/tokenizer", 32, ""),
        ("CLIP score", "judge", 12, ("concept", "retain")),
    ):
        tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny" / folder)
        texts = [case["prompt"] for case in listed if case["file"].startswith(sets)]
        cut = sum(len(tokenizer(text).input_ids) > limit for text in texts)
        assert about["prompts_cut"][name] == cut
    assert 0 < cut < 20 and len(about["prompts_cut"]) == 3
    near = {case["prompt"] for case in listed if case["file"].startswith("neighbours")}
    assert about["different_prompts"]["neighbours"] == len(near)


def test_the_same_evaluation_gives_the_same_results(erased, evaluation, tmp_path):
    """Run again where a picture is lost, or killed while drawing, it draws only what is missing, in
    the same bits, and ends in the same figures; so do two CPU processes (torchrun, gloo) after a
    kill."""
    out_dir, results = evaluation
    before = {}
    for file in out_dir.glob("*/*/*.png"):
        before[file] = file.read_bytes(), file.stat().st_mtime_ns
    lost = min((out_dir / "base/concept").glob("*.png"))
    lost.unlink()
    leftover = lost.with_name(f"{UNFINISHED}x")  # of a killed run
    leftover.mkdir()
    (leftover / lost.name).write_bytes(before[lost][0][:100])
    killed = tmp_path / "killed"
    line = command("evaluate.py", erased, "--controls", *FEW, "--out_dir", killed)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **PLACE)
    while not list(killed.glob("*gun/concept/*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 38 < len(list(killed.glob("*/*/*.png"))) < 5 * 38 == len(before)
    assert not (killed / "results.json").exists()
    for folder, launch in ((out_dir, ()), (killed, TWO_PROCESSES)):
        assert score(erased, "--controls", out_dir=folder, launch=launch) == results
    assert not leftover.exists()
    for file, (content, written) in before.items():
        assert file.read_bytes() == (killed / file.relative_to(out_dir)).read_bytes() == content
        assert file == lost or file.stat().st_mtime_ns == written


def test_pictures_there_are_whole_and_of_these_weights(erased, evaluation, capsys, pipe):
    """A picture cut short or exchanged is no picture to score; pictures drawn under an earlier mask
    are not those of the mask that is there now."""
    picture = min((evaluation[0] / "base/concept").glob("*.png"))
    mask = erased / "mask.safetensors"
    before = {file: file.read_bytes() for file in (picture, mask)}
    again = (erased, *FEW, "--out_dir", evaluation[0])
    try:
        picture.write_bytes(before[picture][:-40])
        assert f"{picture.name}: is no whole picture" in refused(capsys, *again)
        picture.write_bytes(max(picture.parent.glob("*.png")).read_bytes())
        assert f"{picture.name}: was changed since it was drawn" in refused(capsys, *again)
        picture.write_bytes(before[picture])
        opposite = {site: 1 - gates for site, gates in load_file(mask).items()}
        save_mask(mask, opposite, fingerprints(pipe), ["ffn", "norm"])
        assert "pictures of other prompts, sizes or weights" in refused(capsys, *again)
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def test_unparsable_answers_are_counted(erased, tmp_path, capsys):
    """A random LLaVA hardly ever says yes or no: a whole evaluation by it, with NudeNet, counts
    every answer that is neither, and stores every box."""
    save_small("llava", tmp_path / "llava")
    line = f"{erased} --judge {tmp_path}/llava --nudenet --num_pictures 3 --per_neighbour 0"
    assert evaluate.main(f"{line} --fid none --device cpu --out_dir {tmp_path}".split()) == 0
    assert "unparsable" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for figures, name in zip(results.values(), ("base", "*gun"), strict=True):
        (boxes,) = tmp_path.glob(f"nudenet_{name}.json")
        assert len(json.loads(boxes.read_text())) == figures["nude, 9 classes at 0.6"]["n"] == 3
        assert figures["acc"]["n"] + figures["acc"]["unparsable"] == 3


def test_names_and_neighbours_of_several_concepts():
    """A name outside the vocabulary keeps its capitals, and so has no article; a word near two
    concepts is asked for once; a palm tree is a tree, no neighbour of it."""
    clip = ClipJudge(JUDGE)
    words = cases.read_words(cases.Subject(["Taylor Swift", "GUN", "knife"], TINY, {}, "person"))
    found = cases.make_cases(words, num_pictures=2)[0] + cases.neighbour_cases(words, clip, 2)
    near = [(case.prompt, case.seed) for case in found if case.set == "neighbours"]
    asked = [word for name in words.concepts for word in cases.nearest_words(name, words, clip)]
    assert len(near) == len(set(near)) == 2 * len(set(asked)) < 2 * len(asked)
    prompts = [case.prompt for case in found if ("acc", "Taylor Swift") in case.asks]
    assert prompts and not [p for p in prompts if "a Taylor" in p or "Taylor Swift" not in p]
    about = {word: dict(kind="object", question=word) for word in ("van", "tree", "palm tree")}
    assert cases.nearest_words("tree", cases.Words(["tree"], about, HERE), clip) == ["van"]


def test_neutral_and_question(erased, tmp_path, monkeypatch):
    """Residue is measured to what --neutral said; the filter asks what the judge is to be asked."""
    config = json.loads((erased / "config.json").read_text())
    write_json(tmp_path / "config.json", config | dict(neutral="lemon"))
    (tmp_path / "mask.safetensors").write_text("")
    for folder, neutral in ((erased, "nothing"), (tmp_path, "a lemon")):
        words = cases.read_words(cases.read_subject([folder], None, None, {}))
        rows = cases.concept_rows(words.concepts[0], words)
        assert all(neutral in row["neutral_prompt"] for row in rows)
    write_json(tmp_path / "config.json", config | dict(concept=["knife"], neutral="lemon"))
    both = cases.read_words(cases.read_subject([Path(f"{erased}+{tmp_path}")], None, None, {}))
    for concept, neutral in ((config["concept"][0], "nothing"), ("knife", "a lemon")):
        rows = cases.concept_rows(concept, both)
        assert all(neutral in row["neutral_prompt"] for row in rows)
    asked = []

    def none_passes(pipe, rows, question, panel):
        asked.append(question)
        return []

    monkeypatch.setattr(pairfilter, "filter_pairs", none_passes)
    panel = SimpleNamespace(judge=SimpleNamespace(form="Is there {} in it?"))
    words = words._replace(concepts=words.concepts[:1])
    with pytest.raises(UserError, match="no pair passes"):
        pairfilter.write_pairs(tmp_path / "x.csv", dict(train=rows), words, panel, None)
    assert asked == ["Is there a gun in it?"]


def test_compare_takes_baselines(erased, evaluation, tmp_path):
    """--compare puts a transformer folder, a whole pipeline and a folder of pictures beside ours,
    each with its own figures."""
    out_dir, results = evaluation
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/transformer").symlink_to(erased / "transformer")
    same = models.load_pipeline(TINY, "cpu")
    same.vae.encoder.conv_in.bias[0] += 1  # which draws nothing
    same.save_pretrained(tmp_path / "same")
    ours = [erased, tmp_path / "ours", erased / "transformer"]
    folders = [*ours, tmp_path / "same", out_dir / "base"]
    compared = score("--compare", *folders, out_dir=tmp_path / "out")["results"]
    assert compared[str(erased)] == results["results"][str(erased)]
    base, ours, inside, transformer, pipeline, shown = compared.values()
    assert ours == inside == transformer and pipeline == base | dict(closed=0.0)
    left = {metric: figure for metric, figure in base.items() if "residue" in metric}
    assert len(left) == 3 and shown | left == base and shown.keys() == base.keys() - left


def copies(file):
    """The file under two folders."""
    for name in ("one", "two"):
        (file.parent / name).mkdir()
        yield Path(shutil.copy(file, file.parent / name))


def test_what_is_there_stays(erased, tmp_path, capsys):
    """Another script's results or a report of the user are not overwritten; of a neutral prompt
    that has changed the base's latents, and nothing else, are drawn again."""
    few = ["--num_pictures", "1", "--per_neighbour", "0", "--fid", "none", "--device", "cpu"]
    (tmp_path / "report.md").write_text("mine")
    found = refused(capsys, erased, *few, "--out_dir", tmp_path)
    assert "report.md is of something else; choose another folder" in found
    write_json(tmp_path / "results.json", dict(union_text_asr={}))
    assert "results.json is of something else" in refused(
        capsys, erased, *few, "--out_dir", tmp_path
    )
    prompts = tmp_path / "prompts.csv"
    line = [str(erased), *few, "--out_dir", str(tmp_path / "out"), "--prompts", str(prompts)]
    prompts.write_text("prompt,neutral_prompt,evaluation_seed\na gun,nothing,1\n")
    files = tmp_path / "out/base/latents.safetensors", tmp_path / "out/base/concept/00000_1.png"
    left = []
    for neutral in ("nothing", "nothing", "a dog"):
        prompts.write_text(f"prompt,neutral_prompt,evaluation_seed\na gun,{neutral},1\n")
        assert evaluate.main(line) == 0
        found = json.loads((tmp_path / "out/results.json").read_text())["results"][str(erased)]
        left.append((found["residue, median"], *(file.stat().st_mtime_ns for file in files)))
    assert left[0] == left[1] and left[2][2] == left[0][2]
    assert left[2][0] != left[0][0] and left[2][1] > left[0][1]


def test_other_tools(pipe, tmp_path, capsys):
    """--export_cases says what to draw: pictures that a tool drew from it, flat, by name or in
    order, have the figures of its state dict. A second --compare adds its columns to those that are
    there; under another threshold, or of other cases, it is refused."""
    listing, weights = tmp_path / "cases.json", tmp_path / "esd.safetensors"
    few = "--num_pictures 2 --per_neighbour 1 --fid none --device cpu --concept gun".split()
    few += ["--model", TINY]
    assert evaluate.main(["--export_cases", str(listing), *few]) == 0
    told = json.loads(listing.read_text())
    edited = {"context_embedder.weight": pipe.transformer.context_embedder.weight * 0.5}
    save_file(edited, weights)
    tool = models.load_pipeline(TINY, "cpu")
    tool.transformer.load_state_dict(edited, strict=False)
    prompts, seeds = ([case[key] for case in told["cases"]] for key in ("prompt", "seed"))
    by_name, in_order = tmp_path / "by_name", tmp_path / "in_order"
    by_name.mkdir()
    in_order.mkdir()
    for i, picture in enumerate(draw(tool, prompts, seeds, 32, **told["call"])):
        picture.save(by_name / told["cases"][i]["file"].replace("/", "_"))
        picture.save(in_order / f"{i}.png")

    compare = [*few, "--out_dir", str(tmp_path / "out"), "--compare"]
    assert evaluate.main([*compare, str(weights)]) == 0
    assert "esd.safetensors (partial state dict, 1 of 172 tensors" in capsys.readouterr().out
    assert evaluate.main([*compare, str(by_name), str(in_order)]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    base, ours, named, ordered = found["results"].values()
    assert ours.items() > named.items() and named == ordered and named["ssim"] < 1
    assert ours["closed"] == 0 and ours["residue, median"] != 1 == base["residue, median"]
    assert list(found["about"]["forms"].values())[1:] == [
        "pictures matched by name",
        "pictures matched in sorted order",
    ]
    assert "pictures matched by name; " in (tmp_path / "out/report.md").read_text()
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores.keys() == found["results"].keys() and all(scores.values())
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<li ") == 14 and page.count("<img ") == 14 * 4
    assert "whose threshold is another" in refused(capsys, *compare, by_name, "--threshold", "0.9")
    assert "--lora_scale: no LoRA of" in refused(capsys, *compare, weights, "--lora_scale", "2")
    first = by_name / told["cases"][0]["file"].replace("/", "_")
    first.rename(by_name / "misnamed.png")
    assert f"none is named {first.name}" in refused(capsys, *compare, by_name)
    (by_name / "misnamed.png").rename(first)
    call = told["call"] | dict(num_inference_steps=99)
    write_json(by_name / "cases.json", told | dict(call=call))
    assert "its cases.json is of the call" in refused(capsys, *compare, by_name)
    twice = refused(capsys, *few, *copies(weights))
    assert "would both go to results/esd/eval; evaluate them one by one" in twice
    (in_order / "3.png").unlink()
    assert "13 pictures for 14 cases, none is named" in refused(capsys, *compare, in_order)
    told["cases"][0]["seed"] += 1
    write_json(by_name / "cases.json", told)
    assert "its cases.json has no concept/00000" in refused(capsys, *compare, by_name)
    unused = refused(capsys, "--export_cases", tmp_path / "x.json", *few, "--controls")
    assert "--controls: does not go with --export_cases" in unused
    again = refused(capsys, "--export_cases", listing, *few)
    assert f"--export_cases: {listing} is there already" in again


def test_figure_that_ranks():
    """UA, IRA and CRA as by hand; what is drawn more often than by the base counts as 1, and what
    is lost altogether makes the mean 0; without neighbours there is none."""
    base = dict(acc=1.0, neighbours=0.8, others=0.5, background=1.0)
    erased = dict(acc=0.2, neighbours=0.4, others=0.6, background=0.5)
    base, erased = ({k: dict(rate=rate) for k, rate in x.items()} for x in (base, erased))
    found = unlearning(erased, base)
    assert found == {"UA": 0.8, "IRA": 0.5, "CRA": 0.75, "harmonic mean": 0.65455}
    assert unlearning(base, base) == {"UA": 0.0, "IRA": 1.0, "CRA": 1.0, "harmonic mean": 0.0}
    del erased["neighbours"]
    assert unlearning(erased, base) == {}


def test_other_families(bad, tmp_path, capsys):
    """Of any family, the pictures are the stock pipeline's with the mask folded in. Several folders
    end in one table, the last line has all of them; what is wrong with the last stops the run
    before the first is drawn."""
    calls = {}
    for family in (families.sd3, families.z_image):
        pipe, call = family()
        call |= dict(height=32, width=32, num_inference_steps=2)
        folder = tmp_path / family.__name__
        pipe.save_pretrained(folder / "model")
        config = dict(concept=["gun"], model=f"{folder}/model", call=call, modules=["ffn"])
        write_json(folder / "config.json", config)
        sites = erase.gate_sites(pipe.transformer, ["ffn"])
        mask = {name: (torch.arange(site.units) % 3 > 0).float() for name, site in sites.items()}
        save_mask(folder / "mask.safetensors", mask, fingerprints(pipe), ["ffn"])
        calls[str(folder)] = call
    options = f"--judge {JUDGE} --num_pictures 2 --per_neighbour 0 --device cpu".split()
    assert "made for other base weights (" in refused(
        capsys, *calls, bad / "foreign", *options, *FEW
    )
    assert not list(tmp_path.glob("*/eval"))
    assert evaluate.main([*calls, *options]) == 0
    *_, row, last = capsys.readouterr().out.splitlines()
    assert list(json.loads(last)) == list(calls)
    assert row.startswith(str(folder)) and row.count(" > ") == 5
    for folder, call in calls.items():
        (listing,) = Path(folder, "eval").glob("tmp*/cases.json")
        case = json.loads(listing.read_text())["cases"][0]
        pipe = erase.load_erased(folder, "cpu")
        remember_prompts(pipe)
        (wanted,) = draw(pipe, [case["prompt"]], [case["seed"]], **call)
        assert Image.open(listing.parent / case["file"]).tobytes() == wanted.tobytes()


def test_filter_keeps_the_pairs_that_show_the_concept(tmp_path, capsys):
    """--filter writes training pairs that the judge tells apart, the most alike backgrounds first,
    then the test pairs; erase.py takes the file."""
    out, source = tmp_path / "out.csv", tmp_path / "in.csv"
    here = ["--concept", "gun", "--model", TINY, "--device", "cpu"]
    assert evaluate.main([*here, "--filter", str(out)]) == 0
    rows = read_rows(out, "")
    train = of_split(rows, "train")
    gaps = [float(row["background_gap"]) for row in train]
    assert 95 <= len(train) <= 104 and len(rows) == len(train) + 250
    assert gaps == sorted(gaps) and gaps[-1] > 0
    dry = f"--prompts {out} --out_dir {tmp_path}/run --dry_run"
    assert erase.main([*here, *dry.split()]) == 0

    shown, neutral, seed = (train[0][name] for name in COLUMNS[1:4])
    header = ",".join(COLUMNS)
    unseen = f"0,gun of a red background,{neutral},1,train"
    both = f"1,{shown},{shown} and a box,{seed},train"
    good = f"2,{shown},{neutral},{seed},train"
    again = [*here, "--prompts", str(source), "--filter", str(out)]
    out.unlink()
    source.write_text(f"{header}\n{unseen}\n{both}\n{good}\n")
    assert evaluate.main(again) == 0
    assert [row["case_number"] for row in read_rows(out, "")] == ["2"]
    out.unlink()
    source.write_text(f"{header}\n0,no gun,{shown},1,train\n")
    assert "no pair passes" in refused(capsys, *again) and not out.exists()


LINKS = [(evaluate, "eval"), (evaluate, "eval/report.md"), (evaluate, "eval/.lock")]
LINKS += [(evaluate, "eval/base"), (evaluate, "eval/base/concept"), (evaluate, "eval/*gun")]
LINKS += [(attacks, "attacks"), (attacks, "attacks/attacks.jsonl"), (probes, "probes/.lock")]
LINKS += [(erase, "metrics.jsonl"), (erase, "preview.png"), (erase, "transformer")]


def arguments_of(script, folder) -> list[str]:
    """Of a small run in that folder."""
    if script is erase:
        return [*QUICK, "--resume", "--out_dir", str(folder)]
    return [str(folder), "--device", "cpu", *(FEW if script is evaluate else ())]


@pytest.fixture
def copied(erased, tmp_path):
    """The erased folder in a place of its own."""
    without = shutil.ignore_patterns("transformer", ".lock")
    return shutil.copytree(erased, tmp_path / "gun", ignore=without)


@pytest.mark.parametrize("script, name", LINKS)
def test_nothing_is_written_through_a_link(script, name, copied, tmp_path, capsys):
    """A link in an output folder is refused by name, and what it points to stays as it was."""
    target = tmp_path / "target"
    if Path(name).suffix:
        target.write_text("mine")
    else:
        target.mkdir()
    if script is erase:
        (copied / "mask.safetensors").unlink()
    link = copied / name.replace("*gun", str(copied).replace("/", "_").strip("_").replace("-", "_"))
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    assert script.main(arguments_of(script, copied)) == 2
    assert f"{link}: is a link" in capsys.readouterr().err.splitlines()[-1]
    assert target.read_text() == "mine" if target.is_file() else not list(target.iterdir())


@pytest.mark.parametrize("script", [erase, evaluate, attacks, probes])
def test_one_process_writes_to_a_folder(script, copied, capsys):
    """Another is refused while the first one's lock is held, whoever holds it."""
    folder = copied
    if script is erase:
        (copied / "mask.safetensors").unlink()
    else:
        folder = copied / dict(evaluate="eval").get(script.__name__, script.__name__)
        folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert script.main(arguments_of(script, copied)) == 2
    wanted = f"--out_dir: another process is writing to {folder}"
    assert wanted in capsys.readouterr().err.splitlines()[-1]


def test_folders_and_files_are_claimed_and_written_whole(tmp_path):
    """A failure leaves the old file and nothing beside it; a folder without results goes again, and
    one that was empty or holds what a kill leaves is as good as new, also to --resume."""
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_atomically(file, lambda path: path.write_text(f"new {1 / 0}"))
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    config, transformer = dict(model="tiny/flux", save="mask"), torch.nn.Linear(1, 1)
    new, empty = tmp_path / "new", tmp_path / "empty"
    (empty / f"{UNFINISHED}x").mkdir(parents=True)
    for folder in (new, empty):
        for resume in (False, True):
            check_folder(folder, config, resume, transformer, {})
            assert [path.name for path in folder.iterdir()] == [".lock"]
    release()
    assert not new.exists() and listing(empty) == ""
    with pytest.raises(UserError, match="no run to go on with in .*new"):
        check_folder(new, config, True, transformer, {})


SOFT = [(dict(gate="step"), 7168, "gate is 'step'"), (dict(max_closed="1"), 7168, "closed '1'")]
SOFT += [({}, 7167, "is damaged .not 7168 finite logits")]


@pytest.mark.parametrize("changes, size, message", SOFT)
def test_soft_gates_of_another_run_are_refused(changes, size, message, copied, pipe):
    """By the key of config.json, or by their number."""
    config = json.loads((copied / "config.json").read_text())
    write_json(copied / "config.json", config | changes)
    save_file(dict(logits=torch.ones(size)), copied / "state.safetensors")
    with pytest.raises(UserError, match=message):
        soft_gates(copied, {}, pipe.transformer)


# Arguments | message; --out_dir comes before, and is taken where there is no other.
BAD = """
{erased} --num_pictures 0 | --num_pictures: must be between 1 and
{erased} --num_pictures 20 | --fid: 20 pictures, but covariances of 128 features need more
{erased} --judge no/such | --judge: cannot load no/such
{erased} --judge tiny/flux/text_encoder_2 | is a t5, which neither compares pictures with texts
{erased} --judge= | --judge: is empty
{erased} --clip no/such | cannot load no/such
{erased} --clip none --fid none | --clip none: the nearest concepts
{erased} --clip none --fid judge --per_neighbour 0 | --fid judge: takes the features of a SigLIP or
{erased} --threshold 2 | --threshold: must be between 0 and 1
{erased} --threshold 1 | --threshold: must be below 1
{erased} --concept _ | --concept: is empty
{erased} --concept gun GUN | --concept: 'gun' is there twice
{erased} --concept gun,knife | --concept: 'gun,knife' has a comma
--filter new.csv --concept gun --prompts /dev/zero | --prompts: /dev/zero is no regular file
--filter= --concept gun | --filter: is empty
{erased} --concept unicorn | --kind: needed for 'unicorn'
{erased} --prompts prompts/gun.csv --concept gun octopus | gun.csv has no prompt for 'octopus'
{erased} --prompts {bad}/pipe.csv | pipe.csv is no regular file
{erased} --retain /dev/zero | --retain: /dev/zero is no regular file
{erased} --nudenet_v2 {bad}/pipe.csv | --nudenet_v2: {bad}/pipe.csv is no regular file
{erased} --num_pictures 1e3 | --num_pictures: invalid int value
{erased} --threshold nan | --threshold: must be between 0 and 1, not nan
{erased} --model {erased} | is an erased folder; erase.py alone goes on from one
{erased} --model LICENSE | LICENSE is a file; wanted is a hub id
{erased} --prompts= | --prompts: is empty
{erased} --where n>1 | --where: goes with --prompts
{erased} --retain {bad}/minors.csv | --retain: no prompt is left after dropping those about minors
{erased} --retain {bad}/guns.csv | --retain: every prompt names the concept
{erased} --device nowhere | --device: nowhere
{erased} --out_dir README.md/eval | README.md is a file
{erased} --out_dir README.md | README.md is a file
{erased} --real {bad}/real | b.jpg: is no whole picture
{erased} --real {bad}/shown/concept | --fid: 1 pictures, but covariances of 128 features
{erased} --real no_such_folder | --real: no_such_folder is no folder
{erased} --real {bad}/shown/concept --fid none | --real: goes with --fid
{erased} --nudenet_v2 v2.onnx | --nudenet_v2: cannot load v2.onnx
| name a folder that erase.py wrote
no_such_folder | no_such_folder: no such file or folder
{bad}/empty | --concept: needed
{bad}/unfinished | no mask.safetensors
{bad}/broken | config.json: Expecting
{erased} --compare {erased} | --compare: takes all folders, none before it
{erased} {erased} | --out_dir: goes with one folder
--compare {erased} {erased} | two columns of the same name
--compare {erased} {bad}/empty | is empty, or holds neither
--compare {erased} {bad}/torn | torn: cannot load
--compare {erased} {bad}/z_image | is a ZImagePipeline, the base a FluxPipeline
--compare {bad}/shown {one} | is 32 x 32 pixels, not 64 x 64
--compare {bad}/shown {one} --num_pictures 2 | no such picture
--filter new.csv | --filter: takes one --concept
{erased} --filter new.csv --concept gun | --filter: takes one --concept, no folder
--filter README.md --concept gun | --filter: README.md is there already
--filter no/such.csv --concept gun | --filter: no folder no
--export_cases new.json | --export_cases: takes --concept
{erased} --export_cases new.json --concept gun | --export_cases: takes --concept, no folder
--export_cases no/such.json --concept gun | --export_cases: no folder no
--filter new.csv --concept gun --clip none | --filter: compares backgrounds by --clip
"""
ONE = "--concept gun --model tiny/flux --fid none --num_pictures 1 --per_neighbour 0"


@pytest.fixture(scope="session")
def bad(erased, tmp_path_factory):
    """A folder of files and folders that are wrong."""
    bad = tmp_path_factory.mktemp("bad")
    for name in ("empty", "unfinished", "foreign", "broken", "torn/transformer", "real"):
        (bad / name).mkdir(parents=True)
    config = (erased / "config.json").read_text()
    for name, text in {
        "unfinished/config.json": config,
        "foreign/config.json": config,
        "broken/config.json": "{",
        "torn/transformer/config.json": (erased / "transformer/config.json").read_text(),
        "torn/transformer/diffusion_pytorch_model.safetensors": "torn",
        "minors.csv": "prompt\na boy\n",
        "guns.csv": "prompt\ntwo guns\n",
    }.items():
        (bad / name).write_text(text)
    save_mask(bad / "foreign/mask.safetensors", dict(a=torch.ones(2)), dict(vae="0"), ["ffn"])
    os.mkfifo(bad / "pipe.csv")
    Image.effect_noise((64, 64), 50).save(bad / "real/a.jpg")
    (bad / "real/b.jpg").write_bytes((bad / "real/a.jpg").read_bytes()[:1000])
    families.z_image()[0].save_pretrained(bad / "z_image")
    for name, seed, size in (("concept", 1024, 64), ("synonyms", 1024, 64), ("retain", 1400, 32)):
        (bad / "shown" / name).mkdir(parents=True)
        Image.new("RGB", (size, size)).save(bad / f"shown/{name}/00000_{seed}.png")
    return bad


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input(line, erased, bad, tmp_path, capsys):
    """Bad input ends in exit code 2 and one line, before any picture is drawn."""
    arguments, message = line.split("|")
    arguments = arguments.format(erased=erased, bad=bad, one=ONE).split()
    found = refused(capsys, "--device", "cpu", "--out_dir", tmp_path, *arguments)
    message = message.strip().format(bad=bad)
    assert message in found and not list(tmp_path.glob("**/*.png"))
