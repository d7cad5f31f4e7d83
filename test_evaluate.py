"""pytest on a CPU, no network. Oracles: independent counts, the stock pipeline, the run itself."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import artefacts
import cases
import columns
import erase
import evaluate
import families
import judges
import models
import pictures
import promptfiles
from conftest import PLACE, TWO_PROCESSES, command, run
from models import HERE, TINY
from test_judges import save_small

FEW = "--num_pictures 10 --per_neighbour 1 --fid none --device cpu".split()
JUDGE = str(HERE / "tiny/judge")


def score(*arguments, out_dir, launch=()):
    """results.json of the real command line, without times."""
    done = run("evaluate.py", *arguments, *FEW, "--out_dir", out_dir, launch=launch)
    assert done.returncode == 0, done.stderr
    assert f"on {2 if launch else 1} processes" in done.stdout
    results = json.loads((out_dir / "results.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]).keys() == results["results"].keys()
    return results | dict(seconds=None)


def refused(capsys, *arguments):
    """The last line of a run that ends in bad input."""
    assert evaluate.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture(autouse=True)
def in_the_kit(monkeypatch):
    monkeypatch.chdir(HERE)


@pytest.fixture(scope="session")
def evaluation(erased, tmp_path_factory):
    """(folder, results) of one evaluation with controls."""
    out_dir = tmp_path_factory.mktemp("evaluation")
    return out_dir, score(erased, "--controls", out_dir=out_dir)


def test_controls(erased, evaluation):
    """The base drawn again is the base; as many gates closed at random are as many, at each site;
    binary gates leave no gap to the soft ones."""
    base, ours, again, random, soft = evaluation[1]["results"].values()
    assert again == base and base["ssim"] == 1 and ours["ssim"] < 1
    mask = load_file(erased / "mask.safetensors")
    for site, gates in columns.random_mask(mask).items():
        assert gates.sum() == mask[site].sum()
    assert random["closed"] == ours["closed"] > 0 and random["ssim"] != ours["ssim"]
    assert (soft["acc"], soft["closed"]) == (ours["acc"], ours["closed"])


def test_acc_agrees_with_an_independent_count(evaluation):
    """ACC is what a bare SiglipModel sees in the PNG files: its own logits above 0."""
    judge = transformers.AutoModel.from_pretrained(JUDGE)
    processor = transformers.AutoProcessor.from_pretrained(JUDGE)
    form = dict(padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    for figures, name in zip(evaluation[1]["results"].values(), ("base", "*gun"), strict=False):
        shown = [Image.open(file) for file in evaluation[0].glob(f"{name}/concept/*.png")]
        inputs = processor(images=shown, text=["a gun"], **form)
        parts = dict(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values)
        hits = (judge(**parts).logits_per_image > 0).sum().item()
        assert len(shown) == 10 and figures["acc"]["hits"] == hits


def test_the_same_evaluation_gives_the_same_results(erased, evaluation):
    """Run again, it draws only what is missing, in the same bits, and ends in the same figures."""
    out_dir, results = evaluation
    lost = min((out_dir / "base/concept").glob("*.png"))
    kept = [*(out_dir / "base/retain").glob("*.png")]
    picture = lost.read_bytes()
    times = [file.stat().st_mtime_ns for file in kept]
    lost.unlink()
    lost.with_name(lost.name + ".tmp").write_bytes(picture[:100])  # what a killed run leaves
    assert score(erased, "--controls", out_dir=out_dir) == results
    assert lost.read_bytes() == picture and times == [file.stat().st_mtime_ns for file in kept]


def test_killed_evaluation_goes_on(erased, evaluation, tmp_path):
    """Killed while drawing, the same command ends in the pictures and figures of a whole one."""
    out_dir, results = evaluation
    line = command("evaluate.py", erased, "--controls", *FEW, "--out_dir", tmp_path)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **PLACE)
    while not list(tmp_path.glob("*gun/concept/*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 38 < len(list(tmp_path.glob("*/*/*.png"))) < 5 * 38
    assert not (tmp_path / "results.json").exists()
    assert score(erased, "--controls", out_dir=tmp_path) == results
    for file in tmp_path.glob("*/*/*.png"):
        assert file.read_bytes() == (out_dir / file.relative_to(tmp_path)).read_bytes()


def test_two_processes_score_as_one(erased, evaluation, tmp_path):
    """Two CPU processes (torchrun, gloo) draw and judge one half each: the figures of one."""
    found = score(erased, "--controls", out_dir=tmp_path, launch=TWO_PROCESSES)
    assert found == evaluation[1]


def test_pictures_there_are_whole_and_of_these_weights(erased, evaluation, capsys, pipe):
    """A picture cut short is no picture to score; pictures drawn under an earlier mask are not
    those of the mask that is there now."""
    picture = min((evaluation[0] / "base/concept").glob("*.png"))
    mask = erased / "mask.safetensors"
    before = {file: file.read_bytes() for file in (picture, mask)}
    gates = artefacts.load_mask(mask, pipe.transformer)
    opposite = {site: 1 - gate for site, gate in gates.items()}
    again = (erased, *FEW, "--out_dir", evaluation[0])
    try:
        picture.write_bytes(before[picture][:-40])
        assert f"{picture.name}: is no whole picture" in refused(capsys, *again)
        picture.write_bytes(before[picture])
        base = artefacts.fingerprint(pipe.transformer)
        artefacts.save_mask(mask, opposite, base, ["ffn", "norm"])
        assert "pictures of other prompts, sizes or weights" in refused(capsys, *again)
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def test_texts_cut_short_are_counted(evaluation):
    """results.json says how many prompts are longer than each text tower, by another count."""
    listed = json.loads((evaluation[0] / "base/cases.json").read_text())["cases"]
    about = evaluation[1]["about"]
    for name, folder, limit, sets in (
        ("T5", "flux/tokenizer_2", 24, ""),
        ("CLIP", "flux/tokenizer", 32, ""),
        ("CLIP score", "judge", 12, ("concept", "retain")),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "tiny" / folder)
        texts = [case["prompt"] for case in listed if case["file"].startswith(sets)]
        cut = sum(len(tokenizer(text).input_ids) > limit for text in texts)
        assert about["prompts_cut"][name] == cut
    assert 0 < cut < 20 and len(about["prompts_cut"]) == 3
    near = {case["prompt"] for case in listed if case["file"].startswith("neighbours")}
    assert about["different_prompts"]["neighbours"] == len(near)


def test_unparsable_answers_are_counted(erased, tmp_path, capsys):
    """A random LLaVA hardly ever says yes or no: a whole evaluation by it, with NudeNet, counts
    every answer that is neither, and stores every box."""
    save_small("llava", tmp_path / "llava")
    line = f"{erased} --judge {tmp_path}/llava --nudenet --num_pictures 3 --per_neighbour 0"
    assert evaluate.main(f"{line} --fid none --device cpu --out_dir {tmp_path}/out".split()) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert "unparsable" in capsys.readouterr().out
    for figures, name in zip(results.values(), ("base", "*gun"), strict=True):
        acc = figures["acc"]
        assert acc["n"] + acc["unparsable"] == figures["nude, 9 classes at 0.6"]["n"] == 3
        (boxes,) = (tmp_path / "out").glob(f"nudenet_{name}.json")
        assert len(json.loads(boxes.read_text())) == 3


def test_names_and_neighbours_of_several_concepts():
    """A name outside the vocabulary keeps its capitals, and so has no article; a word near two
    concepts is asked for once; a palm tree is a tree, no neighbour of it."""
    clip = judges.ClipJudge(JUDGE)
    words = cases.read_words(cases.Subject(["Taylor Swift", "GUN", "knife"], TINY, {}))
    assert words.concepts == ["Taylor Swift", "gun", "knife"]
    found, _ = cases.make_cases(words, clip, num_pictures=2, per_neighbour=2)
    near = [(case.prompt, case.seed) for case in found if case.set == "neighbours"]
    asked = [word for name in words.concepts for word in cases.nearest_words(name, words, clip)]
    assert len(near) == len(set(near)) == 2 * len(set(asked)) < 2 * len(asked)
    prompts = [case.prompt for case in found if ("acc", "Taylor Swift") in case.asks]
    assert all(re.search(r"(?<!a )Taylor Swift", prompt) for prompt in prompts) and prompts
    about = {word: dict(kind="object", question=word) for word in ("van", "tree", "palm tree")}
    assert cases.nearest_words("tree", cases.Words(["tree"], about, HERE), clip) == ["van"]


def test_compare_takes_baselines(erased, evaluation, tmp_path):
    """--compare puts a transformer folder, a whole pipeline and a folder of pictures beside ours,
    each with its own figures."""
    out_dir, results = evaluation
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/transformer").symlink_to(erased / "transformer")
    folders = [erased, tmp_path / "ours", erased / "transformer", "tiny/flux", out_dir / "base"]
    compared = score("--compare", *folders, out_dir=tmp_path / "out")["results"]
    assert compared[str(erased)] == results["results"][str(erased)]
    del compared[str(erased)]["closed"]
    base, ours, inside, transformer, pipeline, shown = compared.values()
    assert ours == inside == transformer and pipeline == shown == base


def test_other_families(tmp_path, capsys):
    """Of any family, the pictures are the stock pipeline's with the mask folded in. Several folders
    end in one table; the last line has all of them."""
    folders = {}
    for family in (families.sd3, families.z_image):
        pipe, call = family()
        call |= dict(height=32, width=32, num_inference_steps=2)
        folder = tmp_path / family.__name__
        pipe.save_pretrained(folder / "model")
        config = dict(concept=["gun"], model=str(folder / "model"), call=call)
        artefacts.write_json(folder / "config.json", config)
        mask = {}
        for name, site in erase.gate_sites(pipe.transformer, ["ffn"]).items():
            mask[name] = (torch.arange(site.units) % 3 > 0).float()
        base = artefacts.fingerprint(pipe.transformer)
        artefacts.save_mask(folder / "mask.safetensors", mask, base, ["ffn"])
        folders[str(folder)] = call
    options = f"--judge {JUDGE} --num_pictures 2 --per_neighbour 0 --device cpu"
    assert evaluate.main([*folders, *options.split()]) == 0
    *_, row, last = capsys.readouterr().out.splitlines()
    assert list(json.loads(last)) == list(folders)
    assert row.startswith(str(folder)) and row.count(" > ") == 5
    for folder, call in folders.items():
        (listing,) = Path(folder, "eval").glob("tmp*/cases.json")
        case = json.loads(listing.read_text())["cases"][0]
        pipe = erase.load_erased(folder, "cpu")
        models.remember_prompts(pipe)
        (wanted,) = pictures.draw(pipe, [case["prompt"]], [case["seed"]], **call)
        assert Image.open(listing.parent / case["file"]).tobytes() == wanted.tobytes()


def test_filter_keeps_the_pairs_that_show_the_concept(tmp_path, capsys):
    """--filter writes training pairs that the judge tells apart, the most alike backgrounds first,
    then the test pairs; erase.py takes the file."""
    here = ["--concept", "gun", "--model", TINY, "--device", "cpu"]

    def filtered(pairs, code=0):
        """Rows left of the training pairs in CSV, or of prompts/tiny/gun.csv."""
        (tmp_path / "out.csv").unlink(missing_ok=True)
        (tmp_path / "in.csv").write_text(",".join(promptfiles.COLUMNS) + f"\n{pairs}")
        source = ["--prompts", str(tmp_path / "in.csv")] if pairs else []
        assert evaluate.main(["--filter", str(tmp_path / "out.csv"), *source, *here]) == code
        assert (tmp_path / "out.csv").exists() == (code == 0)
        return [] if code else promptfiles.read_rows(tmp_path / "out.csv", "")

    rows = filtered("")
    train = promptfiles.of_split(rows, "train")
    gaps = [float(row["background_gap"]) for row in train]
    assert 20 <= len(train) <= 24 and len(rows) == len(train) + 250
    assert gaps == sorted(gaps) and gaps[-1] > 0
    dry = ["--prompts", str(tmp_path / "out.csv"), "--out_dir", str(tmp_path / "out"), "--dry_run"]
    assert erase.main([*here, *dry]) == 0
    shown, neutral, seed = (train[0][name] for name in promptfiles.COLUMNS[1:4])
    unseen = f"0,gun of a red background,{neutral},1,train\n"
    both = f"1,{shown},{shown} and a box,{seed},train\n"
    good = f"2,{shown},{neutral},{seed},train\n"
    assert [row["case_number"] for row in filtered(unseen + both + good)] == ["2"]
    filtered(f"0,no gun,{shown},1,train\n", code=2)
    assert "no pair passes" in capsys.readouterr().err


# Arguments | message: of an evaluation of the fixture's folder, and of these alone.
BAD_OPTIONS = """
--num_pictures 0 | --num_pictures: must be at least 1
--num_pictures 20 | --fid: 20 pictures, but covariances of 128 features need more
--judge no/such | --judge: cannot load no/such
--judge tiny/flux/text_encoder_2 | neither compares pictures with texts
--judge= | --judge: is empty
--clip no/such | cannot load no/such
--clip none --fid none | --clip none: the nearest concepts
--clip none --fid judge --per_neighbour 0 | --fid judge: takes the features of a SigLIP or CLIP
--threshold 2 | --threshold: must be between 0 and 1
--threshold 1 | --threshold: must be below 1
--prompts prompts/gun.csv --where n=1 | --where: 'n=1' is no condition on case_number
--prompts prompts/gun.csv --concept gun octopus | prompts/gun.csv has no prompt for 'octopus'
--prompts= | --prompts: is empty
--prompts none.txt | --prompts: cannot read none.txt
--prompts hf:no/such#prompt | --prompts: cannot load no/such
--where n>1 | --where: goes with --prompts
--retain {bad}/minors.csv | --retain: no prompt is left
--retain {bad}/guns.csv | --retain: every prompt names the concept
--max_sequence_length 513 | --max_sequence_length: must be between 1 and 512, not 513
--height 30 | --height: must be at least 16 and a multiple of 16
--model tiny/judge | tiny/judge is not a diffusers pipeline
--device nowhere | --device: nowhere
--out_dir README.md/eval | README.md is a file
--out_dir README.md | README.md is a file
--real {bad}/real | b.jpg: is no whole picture
--real {bad}/pictures/concept | --fid: 1 pictures, but covariances of 128 features
--real no_such_folder | --real: no_such_folder is no folder
--real {bad}/pictures/concept --fid none | --real: goes with --fid
--nudenet_v2 v2.onnx | --nudenet_v2: cannot load v2.onnx
--bogus | unrecognized arguments: --bogus
"""
BAD_FOLDERS = """
| name a folder that erase.py wrote
no_such_folder | no_such_folder: no such folder
{bad}/empty | --concept: needed
{bad}/unfinished | no mask.safetensors
{bad}/foreign | made for base weights
{bad}/broken | config.json: Expecting
{erased} --compare {erased} | --compare: takes all folders, none before it
{erased} {erased} --out_dir x | --out_dir: goes with one folder
--compare {erased} {erased} | two columns of the same name
--compare {erased} {bad}/empty | is empty, or holds neither
--compare {erased} {bad}/torn | torn: cannot load
--compare {erased} {bad}/z_image | is a ZImagePipeline, the base a FluxPipeline
--compare {bad}/sizes {one} | is 32 x 32 pixels, not 64 x 64
--compare {bad}/pictures {one} --num_pictures 2 | no such picture
--filter new.csv | --filter: takes one --concept
{erased} --filter new.csv --concept gun | --filter: takes one --concept, no folder
--filter README.md --concept gun | --filter: README.md is there already
--filter no/such.csv --concept gun | --filter: no folder no
--filter new.csv --concept gun --clip none | --filter: compares backgrounds by --clip
"""
ONE = "--concept gun --model tiny/flux --fid none --num_pictures 1 --per_neighbour 0"


@pytest.fixture(scope="session")
def bad(erased, tmp_path_factory):
    """A folder of files and folders that are wrong."""
    bad = tmp_path_factory.mktemp("bad")
    for name in ("empty", "unfinished", "foreign", "broken", "torn/transformer", "real"):
        (bad / name).mkdir(parents=True)
    for name in ("unfinished", "foreign"):
        (bad / name / "config.json").write_bytes((erased / "config.json").read_bytes())
    artefacts.save_mask(bad / "foreign/mask.safetensors", dict(a=torch.ones(2)), "0123", ["ffn"])
    transformer = (erased / "transformer/config.json").read_text()
    for name, text in {
        "broken/config.json": "{",
        "torn/transformer/config.json": transformer,
        "torn/transformer/diffusion_pytorch_model.safetensors": "torn",
        "minors.csv": "prompt\na boy\n",
        "guns.csv": "prompt\ntwo guns\n",
    }.items():
        (bad / name).write_text(text)
    Image.effect_noise((64, 64), 50).save(bad / "real/a.jpg")
    (bad / "real/b.jpg").write_bytes((bad / "real/a.jpg").read_bytes()[:1000])
    families.z_image()[0].save_pretrained(bad / "z_image")
    for file, size in (
        ("pictures/concept/00000_1024", 64),
        ("sizes/concept/00000_1024", 64),
        ("sizes/synonyms/00000_1024", 32),
        ("sizes/retain/00000_1400", 64),
    ):
        (bad / file).parent.mkdir(parents=True)
        Image.new("RGB", (size, size)).save(bad / f"{file}.png")
    return bad


BAD = [f"{{erased}} {line}" for line in BAD_OPTIONS.strip().splitlines()]
BAD += BAD_FOLDERS.strip().splitlines()


@pytest.mark.parametrize("line", BAD)
def test_bad_input(line, erased, bad, tmp_path, capsys):
    """Bad input ends in exit code 2 and one line, before any picture is drawn."""
    arguments, message = line.split("|")
    arguments = arguments.format(erased=erased, bad=bad, one=ONE).split()
    if "--out_dir" not in arguments:
        arguments += ["--out_dir", str(tmp_path)]
    assert message.strip() in refused(capsys, "--device", "cpu", *arguments)
    assert not list(tmp_path.glob("**/*.png"))


def test_all_folders_are_checked_before_any_is_drawn(erased, bad, capsys):
    """What is wrong with the last folder stops the run before the first is drawn."""
    assert "made for base weights" in refused(capsys, erased, bad / "foreign", *FEW)
    assert not (erased / "eval").exists()
