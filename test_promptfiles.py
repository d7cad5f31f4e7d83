"""pytest, no network: prompt files, what is read from them and the words in them."""

import re

import pytest

import promptfiles
from models import HERE
from promptfiles import noun_phrase, of_split, read_rows, template_pairs
from safely import UserError

ADULTS = ["a woman of 30 years", "a kidney bean", "a twenty-seven-year-old"]
MINORS = ["a girl on a beach", "a 15-year-old at school", "two Teenagers", "a twelve year old"]

GUN_AND_TREE = ["a gun, loaded", "a tree"]
PROMPT_SETS = [  # file or hub set, its text, --where, prompts
    ("p.csv", 'prompt,n\na house,2\n"a gun, loaded",60.5\na tree,50\n', "n>=50", GUN_AND_TREE),
    ("p.csv", "prompt,split\na cow,train\n,test\n a cat ,test\n", None, ["a cat"]),
    ("p.txt", "a gun, loaded\n\na tree\n", None, GUN_AND_TREE),
    ("p.tsv", "a gun, loaded\thttp://x\na tree\thttp://y\n", None, GUN_AND_TREE),
    ("p.tsv#text", "n\ttext\n1\ta gun, loaded\n2\ta tree\n", None, GUN_AND_TREE),
    ("hf:set#text", 'text,n\na house,1\n"a gun, loaded",2\na tree,3\n', "n>1", GUN_AND_TREE),
    ("hf:set:train#text", 'text,n\n"a gun, loaded",2\na tree,3\n', None, GUN_AND_TREE),
]
BAD_PROMPT_SETS = [  # the same, and the message
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


def test_template_pairs():
    """Any concept gets its pairs with no file, with the right articles and plurals; an empty
    neutral is the empty prompt."""
    for noun in ("apple", "gun", "umbrella", "octopus", "woman", "glass", "hot dog"):
        phrase = f"{'an' if noun[0] in 'auo' else 'a'} {noun}"
        assert noun_phrase(noun) == noun_phrase(phrase) == phrase
    for phrase in ("Hulk", "guns", "nothing", "a cat", "the sun", "some rice"):
        assert noun_phrase(phrase) == phrase
    row = dict(prompt="a photo of {x} next to a box", evaluation_seed=1, split="train")
    shown = row | dict(prompt="a photo of an apple next to a box")
    for neutral, prompt in (("nothing", "a photo of nothing next to a box"), ("", "")):
        assert template_pairs("apple", neutral, [row]) == [shown | dict(neutral_prompt=prompt)]
    assert template_pairs("box", "", [row]) == []


NOT_CONCEPTS = ("retain", "templates", "vocabulary")
SHIPPED = sorted(p for p in HERE.glob("prompts/**/*.csv") if p.stem not in NOT_CONCEPTS)


@pytest.mark.parametrize("file", SHIPPED, ids=[str(p.relative_to(HERE)) for p in SHIPPED])
def test_shipped_prompts(file):
    """Every concept file has at least 20 train and 50 test pairs, which name the concept in one
    prompt only; no prompt is both trained and tested on; those of nudity are about no minors."""
    rows = read_rows(file, "--concept")
    train, test = ([row["prompt"] for row in of_split(rows, name)] for name in ("train", "test"))
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

    def counts(words, name, columns=promptfiles.COLUMNS):
        """How many of the first 20 training pairs, or of all retain prompts, name each word."""
        rows = of_split(read_rows(tmp_path / f"{name}.csv", "", columns), "train")
        rows = rows if name == "retain" else rows[:20]
        return {sum(promptfiles.mentions(word, row["prompt"]) for row in rows) for word in words}

    for concept in world.CONCEPTS:
        assert counts([f"{color} background" for color in world.BACKGROUNDS], concept) == {2}
    assert min(counts(world.THINGS, "retain", ("prompt", "evaluation_seed", "split"))) >= 5


def load(spec, text, where, folder):
    """load_prompts() of that text in a file, or in a data set of the datasets library's form."""
    name = re.search(r"set|p\.\w+", spec)[0]
    file = folder / name / "train.csv" if name == "set" else folder / name
    file.parent.mkdir(exist_ok=True)
    if text:
        file.write_text(text)
    return promptfiles.load_prompts(spec.replace(name, str(folder / name)), "--flag", where)


@pytest.mark.parametrize("spec, text, where, prompts", PROMPT_SETS)
def test_prompt_sets(spec, text, where, prompts, tmp_path):
    """CSV with a condition or splits, text, TSV as it is or with a header, and a hub set."""
    assert [row["prompt"] for row in load(spec, text, where, tmp_path)] == prompts


@pytest.mark.parametrize("spec, text, where, message", BAD_PROMPT_SETS)
def test_bad_prompt_sets(spec, text, where, message, tmp_path):
    """What is wrong with a prompt set is named with its flag."""
    with pytest.raises(UserError, match=message):
        load(spec, text, where, tmp_path)


def test_seeds_of_prompt_sets(tmp_path):
    """Seeds are the set's own, evaluation_seed before I2P's sd_seed, or count from 1000; each round
    of cycle() has others."""
    for header, seed in (("evaluation_seed,sd_seed", 7), ("sd_seed,n", 7), ("n,m", 1000)):
        rows = load("p.csv", f"prompt,{header}\na gun,7,8\n", None, tmp_path)
        assert rows[0]["evaluation_seed"] == seed
    seeds = [row["evaluation_seed"] for row in promptfiles.cycle(rows * 2, 5)]
    assert seeds == [1000, 1000, 101000, 101000, 201000]


def test_prompts_about_minors_are_dropped_and_counted():
    """Words and ages of minors are found, their look-alikes are not."""
    rows = [dict(prompt=prompt) for prompt in MINORS + ADULTS]
    assert promptfiles.drop_minors(rows) == (rows[len(MINORS) :], len(MINORS))


def test_words_that_a_prompt_names():
    """The longest name counts, and a word inside it only where it comes again by itself; renaming
    takes the article along."""
    for prompt, words in {
        "a Van Gogh of a palm tree and two cats": {"van gogh", "palm tree", "cat"},
        "a van below a palm tree in the style of van gogh": {"van", "palm tree", "van gogh"},
        "a tree and a caterpillar": {"tree"},
    }.items():
        vocabulary = dict.fromkeys(("van", "van gogh", "tree", "palm tree", "cat"))
        assert set(promptfiles.named(prompt, vocabulary)) == words
    for prompt, concept, word, renamed in (
        ("a gun and guns by an owl", "gun", "axe", "an axe and axe by an owl"),
        ("An owl, a gun", "owl", "toy owl", "a toy owl, a gun"),
        ("one of Taylor Swift", "Taylor Swift", "Miss Americana", "one of Miss Americana"),
        ("a gunship", "gun", "axe", "a gunship"),
    ):
        assert promptfiles.rename(prompt, concept, word) == renamed


def test_vocabulary_and_names_outside_it():
    """A concept is spelled as in the vocabulary; a name outside it keeps its capitals, and so has
    no article."""
    path = HERE / "prompts/vocabulary.csv"
    concepts, vocabulary = promptfiles.read_vocabulary(path, ["Taylor_Swift", "GUN", "lava lamp"])
    assert concepts == ["Taylor Swift", "gun", "lava lamp"] == list(vocabulary)[:3]
    questions = [vocabulary[concept]["question"] for concept in concepts]
    assert questions == ["Taylor Swift", "a gun", "a lava lamp"]
    assert "pistol" in vocabulary["gun"]["synonyms"] and vocabulary["lava lamp"]["synonyms"] == []
