"""Text in, rows out: prompt files, templates and the words in them. No tensor here."""

import csv
import difflib
import hashlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from safely import UserError, check_regular, first_line, number

PAIRS = 200  # at most; 20 are learned by heart
FLAGS = ("concept", "kind", "neutral", "prompts", "retain", "num_prompts")
KINDS = ("object", "style", "person")
COLUMNS = ("case_number", "prompt", "neutral_prompt", "evaluation_seed", "split")
NEEDED = ("prompt", "neutral_prompt", "split")


# Objects without an article: what is not counted, and plurals that do not end in s.
UNCOUNTED = """alcohol ammunition art beer blood bread butter cash cattle cheese children chocolate
clothing cocaine coffee corn crime cruelty death dirt fire fog food fur furniture garbage gasoline
glitter gold gore graffiti grass hair hate heroin ice jewelry jewellery lightning lingerie makeup
marijuana meat men milk money mud music nudity oil people police poison pollution porn pornography
rain rice salad sand sex smoke snow soup spaghetti sunlight terrorism tobacco torture traffic trash
underwear violence vodka vomit war water weed whisky whiskey wine women wood""".split()
# Words that are spoken with a vowel first, whatever they are written with.
VOWEL = re.compile(
    r"(?!uni[cfoqstv]|us[ae]|eu|ewe|one\b|ufo|ukulele)[aeiou]|hour|heir|honest", re.I
)


def add_kind(parser) -> None:
    help = "what concepts are that no file of prompts/ knows: templates depend on it"
    parser.add_argument("--kind", choices=KINDS, help=help)


def add_flags(parser) -> None:
    add = parser.add_argument
    add(
        "--concept",
        nargs="+",
        help="what to erase, one or several: a file of prompts/ by name, or any words",
    )
    add_kind(parser)
    add("--neutral", help='what templates have instead of the concept; "": the empty prompt')
    add("--prompts", type=Path, help="CSV of prompt pairs (prompts/<concept>.csv, or templates)")
    help = "retain prompts: CSV like prompts/retain.csv, its default, or a set with its column as "
    add("--retain", help=f"{help}evaluate.py takes it, e.g. hf:owner/dataset:train[:400]#caption")
    add(
        "--num_prompts",
        type=number(int, 1),
        help=f"training pairs per concept ({PAIRS}, or all; --preset paper and official: 20)",
    )


def check_row(row: dict, columns) -> None:
    """Raises ValueError saying what is wrong with one row."""
    if row["split"] not in ("train", "test"):
        raise ValueError(f"split is {row['split']!r}, not train or test")
    if not row["prompt"].strip():
        raise ValueError("prompt is empty")
    if "neutral_prompt" in columns and row["prompt"] == row["neutral_prompt"]:
        raise ValueError("prompt and neutral_prompt are the same")
    if not re.fullmatch(r"[0-9]{1,18}", row.get("evaluation_seed", "0")):
        raise ValueError(f"evaluation_seed is {row['evaluation_seed']!r}, not a whole number")


def read_rows(path: Path, flag: str, columns=NEEDED) -> list[dict]:
    """Rows of a prompt CSV; evaluation_seed as a number, without that column from 1000 on. Raises
    UserError with column or line."""
    rows = []
    check_regular(path, flag)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            header = reader.fieldnames or ()
            for column in columns:
                if column not in header:
                    raise UserError(f"{flag}: {path} has no column {column!r}")
            for row in reader:
                where = f"{flag}: {path}, line {reader.line_num}"
                extra = row.pop(None, [])
                if extra or None in row.values():
                    fields = sum(value is not None for value in row.values()) + len(extra)
                    raise UserError(f"{where}: {fields} fields, the header has {len(header)}")
                try:
                    check_row(row, columns)
                except ValueError as error:
                    raise UserError(f"{where}: {error}") from None
                seed = int(row.get("evaluation_seed", 1000 + len(rows)))
                rows.append(row | dict(evaluation_seed=seed))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag}: cannot read {path}: {error}") from None
    if not rows:
        raise UserError(f"{flag}: {path} holds no prompts")
    return rows


def of_split(rows: list[dict], split: str) -> list[dict]:
    return [row for row in rows if row["split"] == split]


def noun_phrase(words: str) -> str:
    """ "apple" -> "an apple"; names, plurals and what has an article stay as they are."""
    first = words.split()[0]
    is_plural = re.search(r"[^su]s$", words)
    if words == "nothing" or first[0].isupper() or first in ("a", "an", "the", "some") or is_plural:
        return words
    return f"{'an' if VOWEL.match(words) else 'a'} {words}"


def bare(concept: str) -> str:
    """The concept's words without underscores and without their article."""
    words = " ".join(concept.replace("_", " ").split())
    return re.sub(r"^(an?|the|some)\s+", "", words, flags=re.I)


def distinct(concepts) -> list[str]:
    """Each once, however it is written."""
    found = {}
    for name in concepts:
        found.setdefault(bare(name).lower(), name)
    return list(found.values())


def check_concept(name, where: str = "--concept") -> None:
    """Raises UserError, which begins with `where`, unless it is words: no path, no list."""
    if not isinstance(name, str) or not bare(name):
        raise UserError(f"{where}: is empty")
    if not re.search(r"\w", bare(name)):
        raise UserError(f"{where}: {name!r} is no word")
    if not name.isprintable():
        raise UserError(f"{where}: {ascii(name)} has characters that cannot be printed")
    if "," in name:
        raise UserError(f"{where}: {name!r} has a comma; several concepts stand apart by blanks")
    if re.search(r"[/\\]", name):
        raise UserError(f"{where}: {name!r} has a slash")


def check_concepts(concepts: list[str]) -> None:
    """Raises UserError for what is no word, or there twice."""
    for name in concepts:
        check_concept(name)
    words = [bare(name).lower() for name in concepts]
    for name, word in zip(concepts, words, strict=True):
        if words.count(word) > 1:
            raise UserError(f"--concept: {name!r} is there twice")


def mentions(concept: str, text: str) -> bool:
    """Whether the concept's words occur in the text as whole words, plural or not."""
    return bool(re.search(rf"\b{re.escape(bare(concept))}(e?s)?\b", text, re.I))


def names_any(concepts: list[str], text: str) -> bool:
    return any(mentions(concept, text) for concept in concepts)


def without(concepts: list[str], rows: list[dict], column: str = "prompt") -> list[dict]:
    """The rows whose prompt, or other column, names none of the concepts."""
    return [row for row in rows if not names_any(concepts, row[column])]


def phrase(words: str, kind: str, vocabulary: dict) -> str:
    """How templates name it: a person or a style as it is, an object with its article."""
    known = vocabulary.get(words.lower())
    head = words.lower().strip().partition(" of ")[0].split()[-1]  # a glass of water is a glass
    if kind != "object":
        return words
    if known:
        return known["question"]
    return words if head in UNCOUNTED else noun_phrase(words)


def kind_of(concept: str, kind: str | None, vocabulary: dict) -> str:
    """`kind`, see kinds_of(), else what the vocabulary says. Raises UserError if neither does."""
    known = vocabulary.get(bare(concept).lower(), {}).get("kind")
    if not kind and not known:
        near = difflib.get_close_matches(concept, vocabulary, 1)
        meant = f" (or did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"--kind: needed for {concept!r}: object, style or person?{meant}")
    kind = kind or known
    return kind if kind in KINDS else "object"


def kinds_of(concepts: list[str], kind, vocabulary: dict) -> dict:
    """{concept: its kind, None where the vocabulary says it} of what --kind says: it is of the
    concepts that the vocabulary has not, and where it has all of them it may make persons of
    objects. kind may be such a dict already. Raises UserError where it contradicts the
    vocabulary."""
    if not isinstance(kind, str):
        return {name: (kind or {}).get(name) for name in concepts}
    known = {name: vocabulary.get(bare(name).lower(), {}).get("kind") for name in concepts}
    if not all(known.values()):
        return {name: None if known[name] else kind for name in concepts}
    for name, found in known.items():
        if kind != found and (kind, found) != ("person", "object"):
            raise UserError(f"--kind: {name!r} is known, as {found}")
    return dict.fromkeys(concepts, kind)


def is_style(concept: str, kind: str | None, vocabulary: dict) -> bool:
    return (kind or vocabulary.get(bare(concept).lower(), {}).get("kind")) == "style"


def template_pairs(
    concept: str, kind: str, neutral: str | None, templates: list[dict], vocabulary: dict
) -> list[dict]:
    """Prompt pairs for any concept: {x} becomes the concept in one prompt and `neutral` in the
    other; a neutral of "" is the paper's empty prompt, of None the template's own."""
    pairs = []
    name = phrase(concept, kind, vocabulary)
    for row in without([concept], templates):
        neutral_prompt = row["neutral_prompt"] if neutral is None else ""
        if neutral:
            neutral_prompt = row["prompt"].replace("{x}", phrase(neutral, kind, vocabulary))
        prompt = row["prompt"].replace("{x}", name)
        pairs.append(row | dict(prompt=prompt, neutral_prompt=neutral_prompt))
    return pairs


def concept_pairs(
    concept: str, folder: Path, neutral: str | None = None, file=None, kind: str | None = None
) -> list[dict]:
    """Rows of `file`, or of <folder>/<concept>.csv, or made from <folder>/templates_<kind>.csv,
    where there is one, else from <folder>/templates.csv.

    neutral: what the templates have instead of the concept; None: the concept's own file, if there
    is one, else of styles the same prompt without it, of others "nothing" (tiny) or the empty
    prompt. Raises UserError.
    """
    if file:
        rows = read_rows(file, "--prompts")
        # nudity is what no one calls by its name
        if concept != "nudity" and not any(mentions(concept, row["prompt"]) for row in rows):
            raise UserError(f"--concept: {concept!r} occurs in no prompt of {file}")
        return rows
    own = folder / f"{concept.lower().replace(' ', '_')}.csv"
    is_inside = own.parent == folder  # a concept is no path to other files
    if is_inside and own.is_file() and neutral is None:
        return read_rows(own, "--concept")
    concept = concept.replace("_", " ")
    vocabulary = known_words(folder)
    kind = kind_of(concept, kind, vocabulary)
    source = folder / f"templates_{kind}.csv"
    if not source.is_file():
        source = folder / "templates.csv"
    if neutral is None and kind != "style":
        neutral = "nothing" if folder.name == "tiny" else ""
    columns = ("prompt", "split")
    return template_pairs(
        concept, kind, neutral, read_rows(source, "--concept", columns), vocabulary
    )


def digest(rows) -> str:
    """Of Rows, in hexadecimal."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def as_pairs(rows: list[dict]) -> list[tuple[str, str]]:
    """[(prompt, neutral prompt, or the prompt itself where there is none)]."""
    return [(row["prompt"], row.get("neutral_prompt", row["prompt"])) for row in rows]


class Rows(NamedTuple):
    """The rows that a training takes, and those of the test split, which it does not. What each of
    `pairs` and `tests` is for, its "concept" says."""

    pairs: list[dict]
    retain: list[dict]
    tests: list[dict]
    retain_tests: list[dict]

    def held_out(self) -> dict[str, list]:
        """{kind: test rows}, 32, of concept prompts 8 a concept if that is more; the same whatever
        the run's seed."""
        rng = random.Random("held out")

        def pick(rows: list, most: int) -> list:
            return rng.sample(rows, min(most, len(rows)))

        names = dict.fromkeys(row["concept"] for row in self.tests)
        picked = []
        for name in names:
            mine = [row for row in self.tests if row["concept"] == name]
            picked.append(pick(mine, max(8, 32 // len(names))))
        in_turn = [row for rows in itertools.zip_longest(*picked) for row in rows if row]
        return {"concept prompts": in_turn, "other prompts": pick(self.retain_tests, 32)}


def retain_rows(spec: str) -> list[dict]:
    """Of a CSV with splits; of a set as in load_prompts(), without splits every fifth is for
    tests."""
    if "#" not in spec and not spec.startswith("hf:"):
        return read_rows(Path(spec), "--retain", ("prompt", "split"))
    rows = load_prompts(spec, "--retain", splits=("train", "test"))
    rows, _ = drop_minors(rows, "--retain")
    return [dict(split="train" if i % 5 else "test") | row for i, row in enumerate(rows)]


def training_rows(
    folder: Path, *, concept: list[str], num_prompts=None, kind=None, neutral=None, prompts=None,
    retain=None,
) -> Rows:  # fmt: skip
    """The rows that these FLAGS ask for; where a file has no test rows, training rows stand in for
    them. Raises UserError."""
    check_concepts(concept)
    if neutral is not None and prompts:
        raise UserError("--neutral: goes with template prompts, not with --prompts")
    if neutral and neutral != neutral.strip():
        raise UserError("--neutral: starts or ends with a blank")
    if neutral and any(mentions(name, neutral) for name in concept):
        raise UserError(f"--neutral: {neutral!r} contains the concept")
    vocabulary = known_words(folder)
    kinds = kinds_of(concept, kind, vocabulary)
    pairs = []
    tests = []
    for name in concept:
        rows = concept_pairs(name, folder, neutral, prompts, kinds[name])
        rows = [row | dict(concept=name) for row in rows]
        if prompts and len(concept) > 1:
            rows = [row for row in rows if mentions(name, row["prompt"])]
        train = of_split(rows, "train")
        if not train:
            flag = "--prompts" if prompts else "--concept"
            raise UserError(f"{flag}: no training pairs for {name!r}")
        pairs += train[: num_prompts or PAIRS]
        tests += of_split(rows, "test")
    if len(concept) > 1:
        pairs, tests = apart(concept, pairs, tests)
    rows = without(concept, retain_rows(str(retain or folder / "retain.csv")))
    others = of_split(rows, "train")
    if not others:
        raise UserError(f"--retain: {retain} has no training prompt without the concept")
    tested = {row["concept"] for row in tests}
    tests += [row for row in pairs if row["concept"] not in tested]
    return Rows(pairs, others, tests, of_split(rows, "test") or others)


def apart(concepts: list[str], pairs: list[dict], tests: list[dict]) -> tuple[list, list]:
    """Both without the rows whose neutral prompt names a concept: no picture of one is the target
    for another. Raises UserError where nothing is left to train a concept on."""
    kept = without(concepts, pairs, "neutral_prompt")
    lost = {row["concept"] for row in pairs} - {row["concept"] for row in kept}
    if lost:
        found = f"every neutral prompt of {min(lost)!r} names what is to be erased beside it"
        raise UserError(f"--concept: {found}")
    return kept, without(concepts, tests, "neutral_prompt")


def together(found: list[Rows], concepts: list[str]) -> Rows:
    """Of several concepts: no pair whose neutral prompt, and no retain prompt, names one of them.
    Raises UserError if none is left."""
    pairs, tests = apart(
        concepts,
        [row for rows in found for row in rows.pairs],
        [row for rows in found for row in rows.tests],
    )
    retain = without(concepts, found[0].retain)
    retain_tests = without(concepts, found[0].retain_tests)
    if not (retain and retain_tests):
        raise UserError(f"--retain: no prompt is left without {', '.join(concepts)}")
    return Rows(pairs, retain, tests, retain_tests)


# --------------------------------------------------------------------------- prompts to evaluate on
MINORS = re.compile(
    r"\b(child(ren)?|kids?|boys?|girls?|schoolgirls?|schoolboys?|schoolchild(ren)?|"
    r"teen(s|ager|agers|age)?|pre-?teens?|adolescents?|toddlers?|bab(y|ies)|infants?|minors?|"
    r"juveniles?|under-?age[d]?|loli\w*|shota\w*|preschoolers?|kindergart\w+|high[- ]school\w*|"
    r"(?<!ty[- ])([1-9]|1[0-7]|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"(thir|four|fif|six|seven)teen)[- ]?((year|yr)s?[- ]?old|y/?o))\b",
    re.I,
)


def read_table(source: str, has_header: bool, flag: str):
    """The pandas table of a file or hub set, see load_prompts(). Raises UserError."""
    import pandas

    is_hub = source.startswith("hf:")
    is_csv = Path(source).suffix == ".csv"
    if not is_hub:
        check_regular(Path(source), flag)
    try:
        if is_hub:
            from datasets import load_dataset

            source, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))
            split = rest.pop() if rest else "train"
            table = load_dataset(source, *rest, split=split).to_pandas()
        elif is_csv or has_header:
            form = dict(keep_default_na=False, encoding="utf-8-sig")
            table = pandas.read_csv(source, sep="," if is_csv else "\t", **form)
        else:
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
            table = pandas.DataFrame(dict(prompt=[line.split("\t")[0] for line in lines]))
    except Exception as error:  # both libraries raise their own kinds: gated, absent, offline, torn
        message = f"{flag}: cannot {'load' if is_hub else 'read'} {source}: {first_line(error)}"
        if is_hub:
            page = f"https://huggingface.co/datasets/{source}"
            message += f"; a gated set needs its terms accepted on {page} and `hf auth login`"
        raise UserError(message) from None
    # pandas takes a surplus first field for an index
    if not isinstance(table.index, pandas.RangeIndex):
        raise UserError(f"{flag}: {source}: rows have more fields than the header")
    return table


def load_prompts(spec: str, flag: str, where: str | None = None, splits=("test",)) -> list[dict]:
    """[{prompt, evaluation_seed, ...}] from a CSV, a text or TSV file (first column, no header), or
    hf:owner/dataset[:config][:split] (one name between the colons is the split, which may be a
    slice such as train[:400]; without, "train").

    #column at the end names the prompts' column, of a header then. Without seeds of their own, rows
    count from 1000. Of a split column `splits` are kept; `where` is a condition on the columns,
    as pandas reads it. Raises UserError.
    """
    source, _, column = spec.partition("#")
    table = read_table(source, bool(column), flag)
    column = column or "prompt"
    if column not in table:
        columns = ", ".join(map(str, table))
        raise UserError(f"{flag}: {source} has no column {column!r}; it has {columns}")
    table["prompt"] = table[column]
    named_seeds = [name for name in ("evaluation_seed", "sd_seed") if name in table]
    if named_seeds:
        seeds = table[named_seeds[0]]
        for seed in seeds:
            if not re.fullmatch(r"[0-9]{1,18}", str(seed)):
                raise UserError(f"{flag}: {source}: {seeds.name} {seed!r} is not a whole number")
        table["evaluation_seed"] = seeds.astype(int)
    else:
        table["evaluation_seed"] = range(1000, 1000 + len(table))
    if where:
        try:
            kept = table.eval(where)
            if str(getattr(kept, "dtype", "")) != "bool":  # a column's name would pick by number
                raise ValueError("neither true nor false for each row")
            table = table[kept]
        except Exception as error:  # any of Python's own
            columns = ", ".join(map(str, table))
            what = f"{where!r} is no condition on {columns}: {first_line(error)}"
            raise UserError(f"--where: {what}") from None
    rows = []
    for row in table.dropna(subset="prompt").to_dict("records"):
        row["prompt"] = str(row["prompt"]).strip()
        if row["prompt"] and row.get("split", splits[0]) in splits:
            rows.append(row)
    if not rows:
        raise UserError(f"{flag}: {spec} holds no ({' or '.join(splits)}) prompts")
    return rows


def drop_minors(rows: list[dict], flag: str = "--prompts") -> tuple[list[dict], int]:
    """(the rows whose prompt is not about minors, how many were). Raises UserError if none is."""
    kept = [row for row in rows if not MINORS.search(row["prompt"])]
    if not kept:
        raise UserError(f"{flag}: no prompt is left after dropping those about minors")
    return kept, len(rows) - len(kept)


def cycle(rows: list[dict], n: int) -> list[dict]:
    """n rows: the list again and again, each time with other noise."""
    out = []
    for i in range(n):
        row = rows[i % len(rows)]
        seed = row["evaluation_seed"] + 100_000 * (i // len(rows))
        out.append(row | dict(evaluation_seed=seed))
    return out


def known_words(folder: Path) -> dict:
    """{word: {kind, question, synonyms}} of the folder's vocabulary.csv."""
    with open(folder / "vocabulary.csv", newline="", encoding="utf-8") as f:
        words = {row["word"]: row for row in csv.DictReader(f)}
    for row in words.values():
        row["synonyms"] = [word for word in row["synonyms"].split("|") if word]
    return words


def read_vocabulary(
    folder: Path, concepts: list[str], kind: str | dict | None = None
) -> tuple[list[str], dict]:
    """(concepts as the vocabulary spells them, the vocabulary with those that it has not).

    The vocabulary is what a judge can be asked about, and how; kind: see kinds_of(); a person is
    asked about as an object. Raises UserError for what is no concept or of no known kind.
    """
    check_concepts(concepts)
    words = known_words(folder)
    kinds = kinds_of(concepts, kind, words)
    spelled = []
    vocabulary = {}
    for concept in concepts:
        check_concept(concept)
        name = concept.replace("_", " ")
        if name.lower() in words:
            name = name.lower()
        spelled.append(name)
        found = kind_of(name, kinds[concept], words)
        question = phrase(name, found, {})
        if found == "style":
            question = f"a picture in the style of {name}"
        found = "style" if found == "style" else "object"
        vocabulary[name] = dict(kind=found, question=question, synonyms=[])
    return spelled, vocabulary | words


def said(concept: str) -> str:
    """What its prompts call it."""
    return "nude" if concept == "nudity" else concept


def rename(prompt: str, concept: str, word: str) -> str:
    """The prompt with the concept's name replaced, article included."""

    def replacement(match):
        return noun_phrase(word) if match[1] else word

    name = rf"\b(an? )?{re.escape(said(concept))}(?:e?s)?\b"
    return re.sub(name, replacement, prompt, flags=re.I)


def named(prompt: str, vocabulary: dict) -> list[str]:
    """The words of the vocabulary that the prompt names, the longest first, and each only once: the
    "van" of "van gogh" is no van."""
    found = []
    for word in sorted(vocabulary, key=len, reverse=True):
        if mentions(word, prompt):
            found.append(word)
            prompt = re.sub(rf"\b{re.escape(word)}(e?s)?\b", "", prompt, flags=re.I)
    return found
