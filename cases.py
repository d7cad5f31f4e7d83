"""Which pictures an evaluation draws, and what its judge is asked about each. No model but for
texts: the nearest concepts are found by a CLIP's."""

import hashlib
import inspect
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import models  # first: it keeps transformers quiet

# isort: split
from diffusers import FluxPipeline

from artefacts import erased_config, kinds_in, neutrals_in
from foreign import parts_of
from promptfiles import (
    concept_pairs,
    cycle,
    distinct,
    drop_minors,
    kinds_of,
    known_words,
    load_prompts,
    mentions,
    named,
    of_split,
    read_vocabulary,
    rename,
    without,
)
from safely import UserError

SCORED = ("concept", "retain")  # sets with a CLIP score


class Subject(NamedTuple):
    """What was erased, from which base, and how that is sampled."""

    concept: list[str]
    model: str
    call: dict  # what pipe(...) takes
    kind: str | dict | None = None  # see promptfiles.kinds_of()
    neutrals: dict = {}  # {concept: what it was erased to}, where --neutral said it


def read_subject(paths: list[Path], concept, model, flags: dict, kind=None) -> Subject:
    """What the command line leaves open comes from the first erased folder's config.json; several
    put together erase the concepts of all. flags: models.CALL_FLAGS, None where not given. Raises
    UserError."""
    config = {}
    neutrals = {}
    for path in paths:
        found = [erased_config(part) for part in parts_of(path)]
        for part, known in zip(parts_of(path), found, strict=True):
            if known and not (part / "mask.safetensors").is_file():
                raise UserError(f"{part}: no mask.safetensors, so no finished erased model")
        if found[0] and not config:
            concepts = [name for known in found for name in known.get("concept", [])]
            kinds = kinds_in([known for known in found if known])
            config = found[0] | dict(concept=distinct(concepts), kind=kinds)
            neutrals = neutrals_in([known for known in found if known])
    concept = concept or config.get("concept")
    model = model or models.recorded(config)
    for flag, value in (("concept", concept), ("model", model)):
        if not value:
            raise UserError(f"--{flag}: needed, {paths[0]} does not say it")
    model = models.pinned(models.local_name(model))
    call = dict(config.get("call", {}))
    call |= {name: value for name, value in flags.items() if value is not None}
    call = models.sampler_call(model, models.pipeline_class(model), **call)
    return Subject(concept, model, call, kind or config.get("kind"), neutrals)


class Words(NamedTuple):
    """What prompts and questions are about."""

    concepts: list[str]  # as the vocabulary spells them
    vocabulary: dict  # {word: {kind, question, synonyms}}
    folder: Path  # prompt files
    kinds: dict = {}  # {concept that no vocabulary has: its kind}
    neutrals: dict = {}  # see Subject

    def others(self, prompt: str, kind: str) -> list[str]:
        """Words of that kind which the prompt names beside the concepts."""
        words = [word for word in named(prompt, self.vocabulary) if word not in self.concepts]
        return [word for word in words if self.vocabulary[word]["kind"] == kind]


def read_words(subject: Subject) -> Words:
    folder = models.prompt_folder(subject.model)
    spelled, vocabulary = read_vocabulary(folder, subject.concept, subject.kind)
    kinds = kinds_of(subject.concept, subject.kind, known_words(folder)).values()
    kinds = dict(zip(spelled, kinds, strict=True))
    neutrals = [subject.neutrals.get(name) for name in subject.concept]
    neutrals = dict(zip(spelled, neutrals, strict=True))
    return Words(spelled, vocabulary, folder, kinds, neutrals)


def concept_rows(concept: str, words: Words, split: str = "test", file=None) -> list[dict]:
    """The concept's prompt pairs of one split, from `file`, its own file or templates."""
    how = dict(file=file, kind=words.kinds.get(concept), neutral=words.neutrals.get(concept))
    return of_split(concept_pairs(concept, words.folder, **how), split)


def nearest_words(concept: str, words: Words, clip) -> list[str]:
    """The 8 words of the concept's kind with the most similar question; styles only where they have
    prompts, and no word that names a concept: a palm tree is a tree. clip: a ClipJudge."""
    kind = words.vocabulary[concept]["kind"]
    others = []
    for word, about in words.vocabulary.items():
        is_drawn = kind == "object" or (words.folder / f"{word.replace(' ', '_')}.csv").is_file()
        is_concept = any(mentions(name, word) for name in words.concepts)
        if about["kind"] == kind and is_drawn and not is_concept:
            others.append(word)
    vectors = clip.embed_texts([words.vocabulary[word]["question"] for word in (concept, *others)])
    order = (vectors[1:] @ vectors[0]).argsort(descending=True, stable=True)
    return [others[i] for i in order[:8]]


class Case(NamedTuple):
    """One picture, and what the judge is asked about it."""

    set: str
    name: str
    prompt: str
    seed: int
    asks: list  # [(metric, word)]
    neutral: str | None = None  # of a concept prompt: the prompt without the concept

    @property
    def file(self) -> str:
        return f"{self.set}/{self.name}.png"


def listed(cases: list[Case]) -> list[dict]:
    """As cases.json and its hash have them."""
    return [dict(file=case.file, prompt=case.prompt, seed=case.seed) for case in cases]


def neutral_digest(cases: list[Case]) -> str:
    """Of the neutral prompts, which are drawn for the residue alone."""
    texts = [case.neutral for case in cases if case.neutral is not None]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def concept_cases(concept: str, words: Words, rows: list[dict], synonyms: list[str]):
    """Yields (set, row, asks): acc, which is asked first, is whether the concept is there; beside,
    what shares the picture with it; background, whether that is as asked. The same prompts with the
    concept's name replaced by words that erase.py never saw ask for the concept alone."""
    for i, row in enumerate(rows):
        prompt = row["prompt"]
        asks = [("acc", concept)]
        asks += [("beside", word) for word in words.others(prompt, "object")]
        kinds = [words.vocabulary[word]["kind"] for word in named(prompt, words.vocabulary)]
        if "style" not in kinds:  # which changes the background's colour
            asks += [("background", word) for word in words.others(prompt, "background")]
        yield "concept", row, asks
        renamed = rename(prompt, concept, synonyms[i % len(synonyms)]) if synonyms else prompt
        if renamed != prompt:
            yield "synonyms", row | dict(prompt=renamed), [("synonyms", concept)]


def numbered(found: list[tuple]) -> list[Case]:
    """[(set, row, asks)] as cases, each named by its place in its set."""
    cases = []
    count = Counter()
    for name, row, asks in found:
        seed = row["evaluation_seed"]
        neutral = row.get("neutral_prompt") if name == "concept" else None
        cases.append(Case(name, f"{count[name]:05d}_{seed}", row["prompt"], seed, asks, neutral))
        count[name] += 1
    return cases


def make_cases(
    words: Words, *, num_pictures, prompts=None, retain=None, where=None
) -> tuple[list[Case], int]:
    """(the cases of all sets but the neighbours, how many prompts about minors were dropped).
    Raises UserError.

    concept, synonyms  see concept_cases()
    retain             unrelated prompts: is each thing that they name there (others)
    """
    found = []  # (set, row, asks)
    minors = 0
    for concept in words.concepts:
        if prompts:
            rows = load_prompts(prompts, "--prompts", where)
            if len(words.concepts) > 1:
                rows = [row for row in rows if mentions(concept, row["prompt"])]
        else:
            rows = concept_rows(concept, words)
        if prompts and not rows:
            lacking = f"has no prompt for {concept!r}, one of several concepts"
            raise UserError(f"--prompts: {prompts} {lacking}")
        if not rows:
            raise UserError(f"--concept: no test prompts for {concept!r}")
        rows, dropped = drop_minors(rows)
        minors += dropped
        synonyms = [] if prompts else words.vocabulary[concept]["synonyms"]
        found += concept_cases(concept, words, cycle(rows, num_pictures), synonyms)

    rows = load_prompts(str(retain or words.folder / "retain.csv"), "--retain")
    rows, dropped = drop_minors(rows, "--retain")
    minors += dropped
    rows = without(words.concepts, rows)
    if not rows:
        raise UserError("--retain: every prompt names the concept")
    for row in cycle(rows, num_pictures):
        asks = [("others", word) for word in words.others(row["prompt"], "object")]
        found.append(("retain", row, asks))
    return numbered(found), minors


def neighbour_cases(words: Words, clip, per_neighbour: int) -> list[Case]:
    """Of the 8 words of its kind nearest to each concept (a style may have fewer)."""
    near = []
    if per_neighbour:
        for concept in words.concepts:
            near += nearest_words(concept, words, clip)
    found = []
    for word in dict.fromkeys(near):  # once, however many of the concepts it is near
        rows = without(words.concepts, concept_rows(word, words))
        for row in cycle(rows, per_neighbour):
            found.append(("neighbours", row, [("neighbours", word)]))
    return numbered(found)


def prompts_cut(pipe, cases: list[Case], call: dict, clip) -> dict[str, int]:
    """{encoder: prompts longer than it takes}, where its limit is known. What a pipeline's own
    template adds is not counted."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    longest = call.get("max_sequence_length", parameter and parameter.default)
    names = dict(tokenizer="CLIP", tokenizer_2="T5") if isinstance(pipe, FluxPipeline) else {}
    scored = [case for case in cases if case.set in SCORED]
    encoders = []
    for part, tokenizer in sorted(pipe.components.items(), reverse=True):
        encoder = pipe.components.get(part.replace("tokenizer", "text_encoder"))
        if part.startswith("tokenizer") and tokenizer and encoder:
            is_clip = "clip" in encoder.config.model_type  # the call's limit is of the others
            limit = longest if longest and not is_clip else tokenizer.model_max_length
            encoders.append((names.get(part, part), tokenizer, limit, cases))
    if clip:
        encoders.append(("CLIP score", clip.processor.tokenizer, clip.max_tokens, scored))
    cut = {}
    for name, tokenizer, limit, some in encoders:
        if limit < 10**6:  # a tokenizer without a limit says 10^30
            tokens = tokenizer([case.prompt for case in some], verbose=False).input_ids
            cut[name] = sum(len(ids) > limit for ids in tokens)
    return cut
