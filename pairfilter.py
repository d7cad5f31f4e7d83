"""The paper's filter of training pairs, by what the base draws: evaluate.py --filter."""

import csv
import io
from pathlib import Path

import models  # first: it keeps transformers quiet

# isort: split
from cases import Words, concept_rows
from panel import AT_ONCE, Panel
from pictures import draw
from promptfiles import COLUMNS, drop_minors
from safely import UserError, write_atomically


def filter_pairs(pipe, rows, question: str, panel: Panel, *, call, batch, device) -> list[dict]:
    """The rows that pass the paper's filter of prompt pairs, by the base's pictures: the judge must
    see the concept under the prompt and not under the neutral one; and the backgrounds must agree,
    by the CLIP scores of both pictures with the neutral prompt. The paper's limit on that is not
    known: rows come in the order of agreement, best first (background_gap)."""
    count = len(rows)
    prompts = [row["prompt"] for row in rows] + [row["neutral_prompt"] for row in rows]
    neutrals = prompts[count:] * 2
    seeds = [row["evaluation_seed"] for row in rows] * 2
    models.remember_prompts(pipe)  # encoded as in erase.py
    drawn = draw(pipe.to(device), prompts, seeds, batch, **call)
    pipe.to("cpu")
    panel.to(device)
    seen = []
    scores = []
    for start in range(0, len(drawn), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        answers = panel.judge(drawn[part], [[question]] * len(drawn[part]))
        seen += [score > panel.threshold for (score,) in answers]
        scores += panel.clip.similarity(drawn[part], neutrals[part]).tolist()
    kept = []
    for i, row in enumerate(rows):
        if seen[i] and not seen[count + i]:
            gap = abs(scores[i] - scores[count + i])
            kept.append(row | dict(background_gap=round(gap, 4)))
    return sorted(kept, key=lambda row: row["background_gap"])


def pairs_to_filter(source: Path | None, words: Words) -> dict[str, list]:
    """{split: the concept's pairs, but those about minors}. source: a file of pairs. Raises
    UserError."""
    rows = {}
    for split in ("train", "test"):
        rows[split] = concept_rows(words.concepts[0], words, split, source)
        if rows[split]:
            rows[split], dropped = drop_minors(rows[split])
            print(f"{dropped} {split} prompts about minors dropped")
    if not rows["train"]:
        raise UserError("--filter: no training pairs")
    if not all(row["neutral_prompt"] for row in rows["train"]):
        what = "a neutral prompt is empty, so that there is no background to compare"
        raise UserError(f"--filter: {what}")
    return rows


def write_pairs(file: Path, rows: dict, words: Words, panel: Panel, pipe, **how) -> None:
    """Writes the training pairs that pass filter_pairs(), then the test pairs as they are: erase.py
    takes the first --num_prompts. rows: of pairs_to_filter(); how: call, batch, device. Raises
    UserError."""
    (concept,) = words.concepts
    pairs = rows["train"]
    question = panel.judge.form.format(words.vocabulary[concept]["question"])
    kept = filter_pairs(pipe, pairs, question, panel, **how)
    print(
        f"{len(kept)} of {len(pairs)} training pairs show {concept} under the prompt and not under "
        "the neutral one",
        flush=True,
    )
    if not kept:
        raise UserError("--filter: no pair passes")
    columns = (*COLUMNS, "background_gap")
    form = dict(restval="", extrasaction="ignore", lineterminator="\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, **form)
    writer.writeheader()
    writer.writerows(kept + rows["test"])
    write_atomically(file, lambda path: path.write_text(text.getvalue(), "utf-8"))
