"""An evaluation's scores in, rates, tables and a report out."""

import hashlib
import json
import math
import textwrap
from importlib.metadata import version
from pathlib import Path

import models  # first: it keeps transformers quiet

# isort: split
import torch

from cases import Case, listed, neutral_digest
from columns import Column
from judges import rate
from pictures import open_pictures, save_preview
from safely import write_text

RANKING = ("UA", "IRA", "CRA", "harmonic mean")


def share(found: dict, base: dict) -> float | None:
    """A rate as a share of the base's."""
    known = base["rate"] and found["rate"] is not None
    return round(found["rate"] / base["rate"], 5) if known else None


def rates(scores: dict, threshold: float, base: dict | None) -> dict:
    """What judged() gave for a column -> its rates, those of bystanders also as shares of the
    base's. base: what this gave for the base; None if it is the base."""
    seen = {}  # {metric: {word: [1, 0 or NaN]}}
    for (_, _, metric, word), score in scores.items():
        sighting = score if math.isnan(score) else float(score > threshold)
        seen.setdefault(metric, {}).setdefault(word, []).append(sighting)
    out = {}
    for metric in ("acc", "synonyms", "beside", "background", "others", "neighbours"):
        words = seen.get(metric)
        if not words:
            continue
        out[metric] = rate([sighting for each in words.values() for sighting in each])
        out[f"{metric} by word"] = {word: rate(each) for word, each in words.items()}
        if metric in ("beside", "others", "neighbours"):
            out[f"{metric}, of base"] = share(out[metric], (base or out)[metric])
    left = [score for (_, _, metric, _), score in scores.items() if metric == "residue"]
    if left:
        out |= residue_figures(torch.tensor(left))
    if "neighbours" in out:
        before = (base or out)["neighbours by word"]
        shares = [share(found, before[w]) for w, found in out["neighbours by word"].items()]
        shares = [one for one in shares if one is not None]
        out["worst neighbour, of base"] = min(shares, default=None)
    return out | unlearning(out, base or out)


def unlearning(figures: dict, base: dict) -> dict:
    """UnlearnCanvas' figures (Zhang et al., NeurIPS 2024, arXiv 2402.11846), higher is better, and
    their harmonic mean, which ranks methods. Each is 1 at most; {} unless all can be had.

    UA   unlearning accuracy: share of the concept's pictures in which it is not seen
    IRA  in-domain retain accuracy: the nearest concepts of its kind (neighbours), of the base's
    CRA  cross-domain: what unrelated prompts name (others; for a style these are objects) and the
         backgrounds of the concept's pictures, of the base's; the mean of those that are asked

    differs from the source: shares of the base's rates, as the base itself does not draw all.
    """
    acc = figures.get("acc", {}).get("rate")
    kept = {}
    for metric in ("neighbours", "others", "background"):
        if figures.get(metric) and share(figures[metric], base[metric]) is not None:
            kept[metric] = min(1.0, share(figures[metric], base[metric]))
    inside = kept.pop("neighbours", None)
    if acc is None or inside is None or not kept:
        return {}
    out = dict(UA=1 - acc, IRA=inside, CRA=sum(kept.values()) / len(kept))
    mean = 3 / sum(1 / value for value in out.values()) if all(out.values()) else 0.0
    out["harmonic mean"] = mean
    return {name: round(value, 5) for name, value in out.items()}


def residue_figures(left: torch.Tensor) -> dict:
    """Of residues (N,), see columns.residues(); a rate of those above a quarter."""
    return {
        "residue, median": round(left.quantile(0.5).item(), 4),
        "residue, 95th percentile": round(left.quantile(0.95).item(), 4),
        "residue above 0.25": rate((left > 0.25).float().tolist()),
    }


def cell(metric: str, value, interval: bool = True) -> str:
    if value is None:
        return "-"
    if not isinstance(value, dict):
        is_share = metric in ("closed", *RANKING) or metric.endswith("of base")
        return f"{value:.1%}" if is_share else f"{value:.3f}"
    text = f"{value['rate']:.1%}" if value["n"] else "-"
    if interval and value["n"]:
        text += f" [{value['low']:.1%}, {value['high']:.1%}] n={value['n']}"
    if "unparsable" in value:
        text += f", {value['unparsable']} unparsable"
    return text


def table(results: dict) -> list[list[str]]:
    """{column: its figures} -> rows of cells: a metric, then one cell a column."""
    metrics = []
    for figures in results.values():
        metrics += [metric for metric in figures if not metric.endswith("by word")]
    rows = [["", *results]]
    for metric in dict.fromkeys(metrics):
        cells = [cell(metric, figures.get(metric)) for figures in results.values()]
        rows.append([metric, *cells])
    for word, before in results["base"].get("neighbours by word", {}).items():
        cells = []
        for figures in results.values():
            after = figures["neighbours by word"][word]
            cells.append(f"{cell('', after)}, {cell('of base', share(after, before))} of base")
        rows.append([f"  {word}", *cells])
    return rows


def summary(evaluations: dict[str, dict]) -> list[list[str]]:
    """{folder: results} -> rows of cells: one row for each erased model, base > erased."""
    pairs = ("acc", "synonyms", "beside", "background", "others")
    single = ("residue, median", "residue, 95th percentile")
    single += ("others, of base", "worst neighbour, of base", "ssim", "fid to base", "closed")
    single += RANKING
    rows = [["", *pairs, *single]]
    for name, results in evaluations.items():
        before, after = results["base"], results[name]
        row = [name]
        for metric in pairs:
            cells = [cell(metric, figures.get(metric), False) for figures in (before, after)]
            row.append(" > ".join(cells))
        rows.append(row + [cell(metric, after.get(metric)) for metric in single])
    return rows


def layout(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def headline(results: dict) -> dict:
    """{column: its figures} with rates as numbers, and without those by word."""
    short = {}
    for name, figures in results.items():
        short[name] = {}
        for metric, value in figures.items():
            if not metric.endswith("by word"):
                short[name][metric] = value["rate"] if isinstance(value, dict) else value
    return short


def readable(scores: dict) -> dict:
    """What judged() gave for each column, as JSON can have it."""
    out = {}
    for name, each in scores.items():
        out[name] = {}
        for (set_, case, metric, word), score in each.items():
            score = None if math.isnan(score) else score
            out[name][f"{set_}/{case}.png, {metric} {word}"] = score
    return out


def counts(numbers: dict, word: str = "") -> str:
    return ", ".join(f"{n} {word}{name}" for name, n in numbers.items())


def versions(*names: str) -> dict:
    """{library: its version}; by default of those that draw."""
    return {name: version(name) for name in names or ("torch", "diffusers", "transformers")}


def provenance(model: str, cases: list[Case], files: list[Path]) -> dict:
    """What results.json says of where the pictures come from. files: of prompts."""
    prompts = {}
    for case in cases:
        prompts.setdefault(case.set, []).append(case.prompt)
    digests = {}
    for file in filter(Path.is_file, files):
        digests[models.portable_name(str(file))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return dict(
        model_revision=models.address(model)[1],
        pictures={name: len(texts) for name, texts in prompts.items()},
        different_prompts={name: len(set(texts)) for name, texts in prompts.items()},
        cases_sha256=hashlib.sha256(json.dumps(listed(cases)).encode()).hexdigest(),
        neutral_sha256=neutral_digest(cases),
        prompt_files=digests,
        seeds="each prompt's evaluation_seed, + 100,000 for each repetition",
        versions=versions("torch", "diffusers", "transformers", "torchmetrics"),
    )


REPORT = """# {title}

Judge {judge}, seen above {threshold}; CLIP score by {clip_backbone}; FID features: {fid_features};
model {model}. Rates with 95 % Wilson intervals; base and erased from the same noise; seeds:
{seeds}.

{forms}.

Different prompts: {different}; the intervals take every picture for independent, and are too narrow
where the same prompts come again. Prompts cut, as longer than the encoder takes: {cut}.

{table}

![pairs](grid.png)

Worst failures (last rows of grid.png): highest scores of the concept, largest residues, and largest
falls of the score of a bystander. Residue: |erased - neutral|^2 / |base - neutral|^2 of the final
latents from the same noise; 0 is the neutral picture, 1 the base's.

{worst}
"""


def write_report(
    results: dict,
    about: dict,
    columns: list[Column],
    cases: list[Case],
    scores: dict,
    out_dir: Path,
) -> None:
    """report.md and grid.png: same-seed pairs, and for each model the worst failures by the judge's
    score. columns: the base, then the erased; scores: {column's name: what judged() gave}."""
    base, *erased = columns

    def score(column, case, ask):
        found = scores[column.name][case.set, case.name, *ask]
        return 0.0 if math.isnan(found) else found

    def sheet_row(title, column, some):
        name = textwrap.fill("/".join(Path(column.name).parts[-2:]), 18)
        return f"{title}\n{name}", open_pictures(column.files(some))

    sheet = []
    for title, name in (("concept", "concept"), ("others", "retain")):
        first = [case for case in cases if case.set == name][:6]
        sheet += [sheet_row(title, column, first) for column in columns]
    worst = []
    for column in erased:
        left = []
        traces = []
        lost = []
        for case in cases:
            if case.set == "concept":
                left.append((score(column, case, case.asks[0]), case))
                key = (case.set, case.name, "residue", case.asks[0][1])
                if key in scores[column.name]:
                    traces.append((scores[column.name][key], case))
            if case.set in ("retain", "neighbours"):
                falls = [score(base, case, a) - score(column, case, a) for a in case.asks]
                lost.append((max(falls, default=-1), case))
        kinds = {"most of it left": left, "largest residue": traces, "most lost": lost}
        for title, found in kinds.items():
            found = sorted(found, key=lambda pair: -pair[0])[:6]
            some = [case for _, case in found]
            if not some:
                continue
            sheet += [sheet_row(title, each, some) for each in (base, column)]
            for value, case in found:
                worst.append(f"* {column.name}, {title} ({value:.2f}): {case.file}, {case.prompt}")
    save_preview(out_dir / "grid.png", sheet)
    lines = ["| " + " | ".join(row) + " |" for row in table(results)]
    lines.insert(1, "|" + "---|" * (len(results) + 1))
    words = dict(
        title=f"{', '.join(about['concept'])}: {', '.join(column.name for column in erased)}",
        forms="; ".join(f"{name}: {form}" for name, form in about["forms"].items()),
        different=counts(about["different_prompts"]),
        cut=counts(about["prompts_cut"], "for "),
        table="\n".join(lines),
        worst="\n".join(worst),
    )
    report = REPORT.format(**about | words)
    write_text(out_dir / "report.md", report)
