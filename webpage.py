"""An evaluation as one page to look at: every pair of pictures, worst first. It holds small copies
of the pictures and needs no server; the full ones are the files beside it, where they still are.
webpage.html is its form.
"""

import base64
import html
import io
import os
import string
from pathlib import Path

from PIL import Image

from cases import Case
from safely import write_text

SMALL = 10.5e6  # bytes of all small copies, before base64
SIDES = (256, 128, 96, 64, 48)  # of a copy, the largest that fits

SETS = dict(
    concept="Concept prompts",
    synonyms="The same by other words",
    retain="Unrelated prompts",
    neighbours="Nearest other concepts",
)


def small(file: Path, budget: float) -> str:
    """A picture as a data URI of no more than so many bytes, if any size fits."""
    with Image.open(file) as picture:
        picture = picture.convert("RGB")
    for side in SIDES:
        copy = picture.copy()
        copy.thumbnail((side, side))
        content = io.BytesIO()
        copy.save(content, "WEBP", quality=80)
        if len(content.getvalue()) <= budget:
            break
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def score_of(case: Case, scores: dict, base: dict) -> float:
    """See the page. scores, base: {"set/name.png, metric word": judge's score or None}, of erased
    and base."""
    asked = [f"{case.file}, {metric} {word}" for metric, word in case.asks]
    if case.set in ("concept", "synonyms"):
        return (scores.get(asked[0]) or 0.0) if asked else 0.0
    return max([(base.get(key) or 0) - (scores.get(key) or 0) for key in asked], default=0.0)


def write_page(out_dir: Path, title: str, columns: list, cases: list[Case], scores: dict, table):
    """out_dir/report.html. columns: the base, then the erased, whose pictures are there; scores:
    {column's name: as score_of() has it}; table: rows of text, the first a header."""
    escape = html.escape
    files = [column.files(cases) for column in columns]
    budget = SMALL / (len(cases) * len(columns))
    base, *erased = [scores[column.name] for column in columns]
    sections = {}
    for case, *pictures in zip(cases, *files, strict=True):
        score = max(score_of(case, found, base) for found in erased)
        keys = [f"{case.file}, residue {word}" for _, word in case.asks[:1]]
        traces = [found[key] for found in erased for key in keys if found.get(key) is not None]
        data = f'data-prompt="{escape(case.prompt)}" data-score="{score:.4f}"'
        about = f"score {score:.2f}"
        if traces:
            data += f' data-residue="{max(traces):.4f}"'
            about += f", residue {max(traces):.2f}"
        images = ""
        for column, file in zip(columns, pictures, strict=True):
            place = Path(os.path.relpath(file, out_dir)).as_posix()
            alt = escape(f"{column.name}: {case.prompt}")
            images += f'<img loading="lazy" alt="{alt}" title="{escape(column.name)}" '
            images += f'data-file="{escape(place)}" src="{small(file, budget)}">'
        caption = f"{escape(case.prompt)}<br><span>{about}</span>"
        figure = f"<figure {data}><button>{images}</button><figcaption>{caption}</figcaption>"
        sections.setdefault(case.set, []).append((score, f"{figure}</figure>\n"))
    text = ""
    for name, found in sections.items():
        found.sort(key=lambda pair: -pair[0])  # without a script too
        text += f'<h2>{SETS.get(name, name)}</h2>\n<div class="pairs">\n'
        text += "".join(figure for _, figure in found) + "</div>\n"
    head, *rows = table
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    with Image.open(files[0][0]) as first:
        rendering = "pixelated" if max(first.size) < 128 else "auto"
    form = string.Template((Path(__file__).parent / "webpage.html").read_text("utf-8"))
    page = form.substitute(
        title=escape(title),
        count=len(columns),
        rendering=rendering,
        table="".join(f"<tr>{line}</tr>\n" for line in lines),
        columns=escape(", ".join(column.name for column in columns)),
        sections=text,
    )
    write_text(out_dir / "report.html", page)
