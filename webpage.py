"""An evaluation as one page to look at: every pair of pictures, worst first. All of it is in the
file, which can be sent alone; links lead to the pictures as drawn. webpage.html is its form."""

import base64
import html
import io
import json
import os
import string
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from cases import Case
from safely import write_text

LIMIT = 14.5e6  # bytes of the page, but for what stands around each picture's data
# (longest side, how it is saved): all pictures of a page are of the first form in which they fit.
# Faint remains of a concept outlive none but the first two: WebP halves the colours' resolution.
FORMS = [
    (4096, dict(format="webp", lossless=True, method=1)),
    (1024, dict(format="jpeg", quality=95, subsampling=0)),
    *[(side, dict(format="webp", quality=90)) for side in (1024, 768, 512, 384)],
    *[(side, dict(format="webp", quality=80)) for side in (256, 192, 160, 128, 96, 64, 48, 32)],
]
SEEN, LOST = "Worst: it is seen most.", "Worst: most is lost of what they name."
SETS = dict(
    concept=("Concept prompts", SEEN),
    synonyms=("The same by other words", SEEN),
    retain=("Unrelated prompts", LOST),
    neighbours=("Nearest other concepts", LOST),
)


def data_uri(file: Path, side: int, how: dict) -> str:
    """A picture, no larger than side x side; "" if it is missing or damaged."""
    try:
        with Image.open(file) as found:
            picture = found.convert("RGB")
    except (OSError, SyntaxError):
        return ""
    picture.thumbnail((side, side), Image.LANCZOS)
    content = io.BytesIO()
    picture.save(content, **how)
    return f"data:image/{how['format']};base64,{base64.b64encode(content.getvalue()).decode()}"


def embedded(files: list[Path], limit: float) -> dict[Path, str]:
    """{file: data URI} in the first of FORMS in which all of them have no more than `limit`
    characters. A few are tried first."""
    few = files[:: len(files) // 8 + 1]
    for form in FORMS:
        size = sum(len(data_uri(file, *form)) for file in few)
        if size * len(files) <= limit * len(few) or form is FORMS[-1]:
            found = {file: data_uri(file, *form) for file in files}
            if sum(map(len, found.values())) <= limit:
                break
    return found


def keys_of(case: Case, found: dict, base: dict) -> tuple[float | None, float | None, str]:
    """(by the judge's score, by the residue, which score that is): the larger, the worse; None:
    there is none. Of the concept it is the score; of others the largest fall from the base's.
    found, base: {"set/name.png, metric word": judge's score or None}."""
    asked = [f"{case.file}, {metric} {word}" for metric, word in case.asks]
    if not asked:
        return None, None, ""
    residue = found.get(f"{case.file}, residue {case.asks[0][1]}")
    if case.set in ("concept", "synonyms"):
        return found.get(asked[0]), residue, asked[0]
    falls = {key: (base.get(key) or 0) - (found.get(key) or 0) for key in asked}
    worst = max(falls, key=falls.get)
    return falls[worst], residue, worst


def rows_of(table: list[list[str]]) -> str:
    """Rows of text as HTML, the first a header."""
    text = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table[0])
    for name, *cells in table[1:]:
        text += f'</tr>\n<tr><th scope="row">{html.escape(name)}</th>'
        text += "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f"<tr>{text}</tr>"


def item(case: Case, files: dict, scores: dict, out_dir: Path, uris: dict) -> tuple[float, str]:
    """(its key by the first model's score, the pair as HTML). files: {column's name: picture};
    scores: {column's name: as keys_of() has them}, the base first; uris: {file: data URI}."""

    def number(value):
        return "-" if value is None else f"{value:.2f}"

    keys = []
    shown = links = ""
    *_, key = keys_of(case, list(scores.values())[1], scores["base"])  # shown of all models
    for name, found in scores.items():
        *both, _ = keys_of(case, found, scores["base"])
        keys += [value if value is None else round(value, 6) for value in both]
        label = html.escape(name)
        picture = '<span class="none">no picture</span>'
        if uris.get(files[name]):
            picture = f'<img alt="{label}" loading="lazy" src="{uris[files[name]]}">'
            place = quote(os.fsencode(os.path.relpath(files[name], out_dir)))
            links += f' <a href="{place}">{label}</a>'
        about = html.escape(key.split(" ", 2)[-1]) + f" {number(found.get(key))}" if key else ""
        about += f"<br>residue {number(both[1])}" if both[1] is not None else ""
        shown += f'<span class="shown">{picture}<b>{label}</b><small>{about}</small></span>'
    rows = [["", *scores]]
    for ask in (*case.asks, *[("residue", word) for _, word in case.asks[:1]]):
        values = [found.get(f"{case.file}, {' '.join(ask)}") for found in scores.values()]
        rows.append([" ".join(ask), *map(number, values)])
    neutral = "" if case.neutral is None else f"Neutral prompt: {html.escape(case.neutral)}. "
    text = f'<li data-keys="{json.dumps(keys[2:])}"><button type="button">{shown}'
    text += f'<span class="prompt">{html.escape(case.prompt)}</span></button><div hidden>'
    text += f"<p>{neutral}Seed {case.seed}. As drawn:{links}</p>"
    text += f"<table>{rows_of(rows) if case.asks else ''}</table></div></li>\n"
    return -1.0 if keys[2] is None else keys[2], text


def write_page(out_dir: Path, title: str, columns: list, cases: list[Case], scores: dict, table):
    """out_dir/report.html. columns: the base, then the erased; scores: {column's name: as keys_of()
    has them}; table: rows of text, the first a header."""
    files = {column.name: column.files(cases) for column in columns}
    scores = {name: scores.get(name, {}) for name in files}

    def sections(uris: dict) -> str:
        sets = {}
        for i, case in enumerate(cases):
            mine = {name: some[i] for name, some in files.items()}
            sets.setdefault(case.set, []).append(item(case, mine, scores, out_dir, uris))
        text = ""
        for name, found in sets.items():
            found.sort(key=lambda each: -each[0])  # without a script too
            pairs = "".join(pair for _, pair in found)
            text += f'<section id="{name}"><h2>{SETS[name][0]} <output></output></h2>'
            text += f"<p>{SETS[name][1]}</p><ul>{pairs}</ul></section>\n"
        return text

    options = ""
    for i, name in enumerate(list(files)[1:]):
        of = f" of {html.escape(name)}" if len(files) > 2 else ""
        options += f'<option value="{2 * i}">score{of}</option>'
        options += f'<option value="{2 * i + 1}">residue{of}</option>'
    links = [f'<a href="#{x}">{SETS[x][0]}</a>' for x in dict.fromkeys(c.set for c in cases)]
    room = LIMIT - len(sections({}).encode("utf-8", "replace"))
    uris = embedded([file for some in files.values() for file in some], room)
    form = string.Template((Path(__file__).parent / "webpage.html").read_text("utf-8"))
    parts = dict(title=html.escape(title), table=rows_of(table), options=options)
    page = form.substitute(parts, links=" ".join(links), sections=sections(uris))
    write_text(out_dir / "report.html", page)
