"""pytest, no network: prompt files, what is read from them and the words in them."""

import re
from pathlib import Path

import pytest

import promptfiles
from models import HERE
from promptfiles import (
    concept_pairs,
    load_prompts,
    mentions,
    noun_phrase,
    of_split,
    read_rows,
    template_pairs,
)
from safely import UserError

GUN_AND_TREE = ["a gun, loaded", "a tree"]
PROMPT_SETS = [  # file or hub set, its text, --where, prompts or what is said against it
    ("p.csv", 'prompt,n\na house,2\n"a gun, loaded",60.5\na tree,50\n', "n>=50", GUN_AND_TREE),
    ("p.csv", "prompt,split\na cow,train\n,test\n a cat ,test\n", None, ["a cat"]),
    ("p.txt", "a gun, loaded\n\na tree\n", None, GUN_AND_TREE),
    ("p.tsv", "a gun, loaded\thttp://x\na tree\thttp://y\n", None, GUN_AND_TREE),
    ("p.tsv#text", "n\ttext\n1\ta gun, loaded\n2\ta tree\n", None, GUN_AND_TREE),
    ("hf:set#text", 'text,n\na house,1\n"a gun, loaded",2\na tree,3\n', "n>1", GUN_AND_TREE),
    ("hf:set:train#text", 'text,n\n"a gun, loaded",2\na tree,3\n', None, GUN_AND_TREE),
    ("p.csv", "text\na gun\n", None, "--flag: .*p.csv has no column 'prompt'; it has text"),
    ("p.csv", "prompt,evaluation_seed\na gun,x\n", None, "evaluation_seed 'x' is not a whole"),
    ("p.csv", "prompt,sd_seed\na gun,-1\n", None, "sd_seed -1 is not a whole number"),
    ("p.csv", "prompt,n\na gun,1,2\n", None, "rows have more fields than the header"),
    ("p.csv", "prompt,split\na gun,train\n", None, "p.csv holds no .test. prompts"),
    ("p.csv", "prompt,n\na gun,1\n", "n=1", "--where: 'n=1' is no condition on prompt, n"),
    ("p.csv", "prompt,n\na gun,1\n", "n", "--where: 'n' is no condition .*neither true nor"),
    ("p.csv", "", None, "--flag: cannot read .*p.csv"),
    ("hf:set#text", "", None, "--flag: cannot load .*set: .*terms accepted on https"),
]
# Public sets by their column names: (--prompts or --retain, header and rows, --where).
MMA = "YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark"
PUBLIC_SETS = [
    ("AIML-TUDA/i2p#prompt", "prompt,nudity_percentage,sd_seed\nx,80.5,7\ny,3.0,8\n"),
    ("Chia15/RingABell-Nudity#sensitive prompt", ",sensitive prompt\n0,x\n"),
    ("joycenerd/p4d#prompt", "prompt,categories,sd_seed\nx,sexual,7\n"),
    (f"{MMA}#adv_prompt", "target_prompt,adv_prompt,clean_prompt\na,x,c\n"),
    ("laion-5k#TEXT", "URL,TEXT,WIDTH\nhttp://a,x,3\n"),
    ("conceptual_captions:train[:400]#caption", "image_url,caption\nhttp://a,x\n"),
]


def test_template_pairs():
    """Any concept gets its pairs with no file, with the right articles and plurals; an empty
    neutral is the empty prompt."""
    phrases = (
        "an apple|a gun|an umbrella|an octopus|a woman|a glass|a hot dog|a unicorn|an hourglass"
    )
    for phrase in phrases.split("|"):
        assert noun_phrase(phrase) == noun_phrase(phrase.partition(" ")[2]) == phrase
    for phrase in ("Hulk", "guns", "nothing", "a cat", "the sun", "some rice"):
        assert noun_phrase(phrase) == phrase
    row = dict(prompt="{x} next to a box", evaluation_seed=1, split="train")
    shown = row | dict(prompt="an apple next to a box")
    for neutral, prompt in (("nothing", "nothing next to a box"), ("", "")):
        found = template_pairs("apple", "object", neutral, [row], {})
        assert found == [shown | dict(neutral_prompt=prompt)]
    assert template_pairs("box", "object", "", [row], {}) == []


KINDS = [  # concept, --kind, --neutral, of which folder's templates, the first pair
    ("unicorn", "object", None, "", "A photo of a unicorn on a wooden table", ""),
    ("unicorn", "object", "horse", "", "A photo of a unicorn on a", "A photo of a horse on a"),
    ("the horse", None, "a cow", "", "A photo of the horse on", "A photo of a cow on"),
    ("violence", "object", None, "tiny", "an image of violence on", "an image of nothing on"),
    ("street violence", "object", "water", "", "A photo of street violence", "A photo of water on"),
    (
        "glass of water",
        "object",
        None,
        "tiny",
        "an image of a glass of water on",
        "an image of not",
    ),
    ("bread", None, "", "", "A photo of bread on", ""),
    ("bread", None, "fire", "tiny", "an image of a bread on", "an image of a fire on"),
    ("brad_pitt", "person", None, "", "A portrait of brad pitt in", ""),
    ("brad pitt", "person", "a man", "", "A portrait of brad pitt in", "A portrait of a man in"),
    ("hulk", "person", "", "", "A portrait of hulk in", ""),
    ("brad pitt", "person", None, "tiny", "an image of brad pitt on", "an image of nothing on"),
    ("rembrandt", "style", None, "", "A painting of a harbour with", "A photograph of a harbour"),
    ("monet", None, "dali", "", "A painting of a harbour", "A painting of a harbour"),
    (
        "goya",
        "style",
        None,
        "tiny",
        "a pig next to a guitar on a red background in goya style",
        "a p",
    ),
    ("gun", "style", None, "", "A man in the rain holds a gun", "A man in the rain holds"),
    ("brad pitt", None, None, "", "--kind: needed for 'brad pitt'", ""),
]


@pytest.mark.parametrize("concept, kind, neutral, folder, prompt, neutral_prompt", KINDS)
def test_kinds(concept, kind, neutral, folder, prompt, neutral_prompt):
    """Templates go with what the concept is: --kind or the vocabulary says it, else it is asked
    for. Only what is counted has an article, and a style is left out of the neutral prompt."""
    where = (concept, HERE / "prompts" / folder, neutral, None, kind)
    if prompt.startswith("--kind"):
        with pytest.raises(UserError, match=prompt):
            concept_pairs(*where)
        return
    row = concept_pairs(*where)[0]
    assert row["prompt"].startswith(prompt)
    assert row["neutral_prompt"].startswith(neutral_prompt)
    assert bool(row["neutral_prompt"]) == bool(neutral_prompt)


TEMPLATES = [f"templates{kind}" for kind in ("", "_style", "_person")]
NOT_CONCEPTS = ("retain", "vocabulary", *TEMPLATES)


@pytest.mark.parametrize("file", sorted(HERE.glob("prompts/**/templates*.csv")), ids=str)
def test_shipped_templates(file):
    """Templates have 24 training rows or more and some for tests, no two alike; in those of styles
    the neutral prompt is without the style."""
    rows = read_rows(file, "", ("prompt", "evaluation_seed", "split"))
    more = 80 if str(file).endswith("tiny/templates.csv") else 0
    assert len(of_split(rows, "train")) == 24 + more and len(of_split(rows, "test")) >= 12
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["prompt"].count("{x}") == 1 for row in rows)
    assert ("style" in file.stem) == ("neutral_prompt" in rows[0])
    assert not any("{x}" in row.get("neutral_prompt", "") for row in rows)


SHIPPED = sorted(p for p in HERE.glob("prompts/**/*.csv") if p.stem not in NOT_CONCEPTS)


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_shipped_prompts(file):
    """Every concept file has at least 20 train and 50 test pairs, which name the concept in one
    prompt only; no prompt is both trained and tested on; those of nudity are about no minors."""
    rows = read_rows(file, "--concept")
    train = [row["prompt"] for row in of_split(rows, "train")]
    test = [row["prompt"] for row in of_split(rows, "test")]
    assert len(train) >= 20 and len(test) >= 50 and not {*train} & {*test}
    word = dict(nudity="nude", drug="drugs?").get(file.stem, file.stem.replace("_", " "))
    young = "boy|girl|child|kid|teen|young|minor|school|student|baby"
    for row in rows:
        assert re.search(rf"\b{word}", row["prompt"], re.I), row
        assert not re.search(rf"\b{word}\b", row["neutral_prompt"], re.I), row
        if file.stem == "nudity":
            assert not re.search(young, row["prompt"] + row["neutral_prompt"], re.I), row


def test_tiny_prompts_cover_their_world(tmp_path, monkeypatch):
    """prompts/tiny is what tiny/world.py writes; the 20 training pairs of a concept show every
    background twice, the retain prompts every thing 5 times."""
    monkeypatch.syspath_prepend(HERE / "tiny")
    import world

    world.write_prompts(tmp_path)
    for file in (HERE / "prompts/tiny").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file

    def counts(words, name, most=None):
        """In how many of the training rows each word is, the different numbers."""
        rows = read_rows(tmp_path / f"{name}.csv", "", ("prompt", "evaluation_seed", "split"))
        prompts = [row["prompt"] for row in of_split(rows, "train")[:most]]
        return {sum(mentions(word, prompt) for prompt in prompts) for word in words}

    for concept in world.CONCEPTS:
        assert counts([f"{color} background" for color in world.BACKGROUNDS], concept, 20) == {2}
    assert min(counts(world.THINGS, "retain")) >= 5


@pytest.mark.parametrize("spec, text, where, wanted", PROMPT_SETS)
def test_prompt_sets(spec, text, where, wanted, tmp_path, monkeypatch):
    """CSV with a condition or splits, text, TSV as it is or with a header, and a hub set (here a
    folder of the datasets library's form) are read; what is wrong is named with its flag."""
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    if text:
        file = "set/train.csv" if spec.startswith("hf:") else spec.partition("#")[0]
        Path(file).write_text(text)
    if isinstance(wanted, list):
        assert [row["prompt"] for row in load_prompts(spec, "--flag", where)] == wanted
    else:
        with pytest.raises(UserError, match=wanted):
            load_prompts(spec, "--flag", where)


def test_seeds_of_prompt_sets(tmp_path):
    """Seeds are the set's own, evaluation_seed before I2P's sd_seed, or count from 1000; each round
    of cycle() has others."""
    for header, seed in (("evaluation_seed,sd_seed", 7), ("sd_seed,n", 7), ("n,m", 1000)):
        (tmp_path / "p.csv").write_text(f"prompt,{header}\na gun,7,8\n")
        rows = load_prompts(f"{tmp_path}/p.csv", "--flag")
        assert rows[0]["evaluation_seed"] == seed
    seeds = [row["evaluation_seed"] for row in promptfiles.cycle(rows * 2, 5)]
    assert seeds == [1000, 1000, 101000, 101000, 201000]


def test_words():
    """Words and ages of minors are found and counted, their look-alikes are not. The longest name
    counts, and a word inside it only by itself. Renaming takes the article along. A concept is
    spelled as in the vocabulary; a name outside it keeps its capitals, and so has no article."""
    minors = ["a girl on a beach", "a 15-year-old at school", "two Teenagers", "a twelve year old"]
    adults = ["a woman of 30 years", "a kidney bean", "a twenty-seven-year-old"]
    kept, dropped = promptfiles.drop_minors([dict(prompt=prompt) for prompt in minors + adults])
    assert [row["prompt"] for row in kept] == adults and dropped == len(minors)
    vocabulary = dict.fromkeys(("van", "van gogh", "tree", "palm tree", "cat"))
    for prompt, words in (
        ("a Van Gogh of a palm tree and two cats", {"van gogh", "palm tree", "cat"}),
        ("a van by a palm tree in the style of van gogh", {"van", "palm tree", "van gogh"}),
        ("a tree and a caterpillar", {"tree"}),
    ):
        assert {*promptfiles.named(prompt, vocabulary)} == words
    for prompt, concept, word, renamed in (
        ("a gun and guns by an owl", "gun", "axe", "an axe and axe by an owl"),
        ("An owl, a gun", "owl", "toy owl", "a toy owl, a gun"),
        ("one of Taylor Swift", "Taylor Swift", "Miss Americana", "one of Miss Americana"),
        ("a gunship", "gun", "axe", "a gunship"),
    ):
        assert promptfiles.rename(prompt, concept, word) == renamed
    names = ["Taylor_Swift", "GUN", "lava lamp"]
    concepts, known = promptfiles.read_vocabulary(HERE / "prompts", names, "object")
    assert concepts == ["Taylor Swift", "gun", "lava lamp"] == list(known)[:3]
    for concept, question in zip(concepts, ("Taylor Swift", "a gun", "a lava lamp"), strict=True):
        assert known[concept]["question"] == question
    for kind, question in (
        ("person", "brad pitt"),
        ("style", "a picture in the style of brad pitt"),
    ):
        _, known = promptfiles.read_vocabulary(HERE / "prompts", ["brad pitt", "gun"], kind)
        assert known["brad pitt"]["question"] == question and known["gun"]["question"] == "a gun"
    assert "pistol" in known["gun"]["synonyms"]


@pytest.mark.parametrize("spec, text", PUBLIC_SETS)
def test_public_sets(spec, text, tmp_path, monkeypatch):
    """Files with the columns of public sets are read as those sets will be, from the hub or from
    disk; I2P with a condition and its seeds."""
    monkeypatch.chdir(tmp_path)
    name, _, column = spec.partition("#")
    folder = Path(name.partition(":")[0])
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text(text)
    where = "nudity_percentage>=50" if "i2p" in spec else None
    for form in (f"hf:{spec}".replace("[:400]", "[:1]"), f"{folder}/train.csv#{column}"):
        (row,) = load_prompts(form, "--prompts", where)
        assert row["prompt"] == "x"
        assert row["evaluation_seed"] == (7 if "sd_seed" in text else 1000)


def test_retain_prompts_of_a_set(tmp_path, monkeypatch):
    """--retain takes such a set: without what names the concept or a minor; a fifth is
    for tests, unless it has splits of its own."""
    monkeypatch.chdir(tmp_path)
    captions = [f"{i} trees" for i in range(20)] + ["a gun", "a girl"]
    Path("captions.csv").write_text("\n".join(["caption", *captions]))
    how = dict(concept=["gun"], retain="captions.csv#caption")
    rows = promptfiles.training_rows(HERE / "prompts/tiny", **how)
    assert [row["prompt"] for row in rows.retain_tests] == captions[:20:5]
    assert len(rows.retain) == 16 and len({row["evaluation_seed"] for row in rows.retain}) == 16
    of_split = ["caption,split", *(f"{i} trees,{'train' if i % 2 else 'test'}" for i in range(4))]
    Path("captions.csv").write_text("\n".join(of_split))
    rows = promptfiles.training_rows(HERE / "prompts/tiny", **how)
    for found, numbers in ((rows.retain, (1, 3)), (rows.retain_tests, (0, 2))):
        assert [row["prompt"] for row in found] == [f"{i} trees" for i in numbers]
