"""report.html, by Python's own parser."""

import base64
import html.parser
import io
import json
import urllib.parse

import pytest
from PIL import Image

import webpage
from cases import Case
from columns import Column, earlier_columns

PROMPTS = ["a gun", 'a <b>"gun"</b> & <script>more\'s', "a third gun", "a cat", "a dog"]
EMPTY = ("meta", "img", "input", "option")


class Reader(html.parser.HTMLParser):
    """The pairs, the cells and whatever is loaded or linked to."""

    def __init__(self, text):
        super().__init__()
        self.pairs, self.sources, self.links, self.cells, self.options = [], [], [], [], []
        self.open, self.said = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "li":
            self.pairs.append(dict(keys=json.loads(found["data-keys"]), alts=[], prompt=""))
        if tag == "img":
            self.pairs[-1]["alts"].append(found["alt"])
        self.said = found.get("class")
        self.sources += [found[key] for key in ("src", "srcset", "action") if key in found]
        self.links += [found["href"]] if "href" in found else []
        self.options += [found["value"]] if tag == "option" else []

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass
        self.said = None

    def handle_data(self, data):
        if self.said == "prompt" and "li" in self.open:
            self.pairs[-1]["prompt"] += data
        if self.open[-1:] in (["td"], ["th"]):
            self.cells.append(data)


@pytest.fixture
def page(tmp_path):
    """(the page's text, its folder, its columns) of five cases and two models, one without
    residues; one picture is damaged and one is missing."""
    cases = [Case("concept", str(i), x, i, [("acc", "gun")], "<i>") for i, x in enumerate(PROMPTS)]
    cases[3] = Case("retain", "0", PROMPTS[3], 9, [("others", "cat"), ("others", "hat")])
    cases[4] = Case("retain", "1", PROMPTS[4], 9, [])
    names = ("base", "x/<erased> #1", "x/lora")
    columns = [Column(name, tmp_path / name[-9:].strip("<")) for name in names]
    for column in columns:
        for file in column.files(cases):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 90).save(file)
    columns[2].files(cases)[0].unlink()
    columns[2].files(cases)[1].write_bytes(b"no picture")
    base = {"retain/0.png, others cat": 1.0, "retain/0.png, others hat": 0.75}
    ours = {"concept/0.png, acc gun": 0.1, "concept/1.png, acc gun": 0.7}
    ours |= {"concept/2.png, acc gun": None, "concept/0.png, residue gun": 0.5}
    ours |= {"retain/0.png, others cat": 0.9, "retain/0.png, others hat": 0.25}
    scores = {"base": base, names[1]: ours, names[2]: {"concept/2.png, acc gun": 0.9}}
    table = [["", *names], ["acc", "<1>", "0", "0"]]
    webpage.write_page(tmp_path, "gun & co", columns, cases, scores, table)
    return (tmp_path / "report.html").read_text(), tmp_path, columns, cases


def test_page(page):
    """Every pair is there with its prompt and its pictures, worst first in its set by the first
    model's score; a pair has for each model the keys that the select's values count; what is
    missing is said. Prompts are escaped, nothing is loaded, links lead to the files."""
    text, folder, columns, _ = page
    read = Reader(text)
    assert [pair["prompt"] for pair in read.pairs] == [PROMPTS[i] for i in (1, 0, 2, 3, 4)]
    keys = [[0.7, None, None, None], [0.1, 0.5, None, None], [None, None, 0.9, None]]
    keys += [[0.5, None, 1.0, None], [None] * 4]
    assert [pair["keys"] for pair in read.pairs] == keys and read.options == list("0123")
    names = [column.name for column in columns]
    assert [pair["alts"] for pair in read.pairs] == [names[:2], names[:2], names, names, names]
    assert text.count("no picture") == 2 and "<1>" in read.cells
    assert "<b>&" not in text and "<i>" not in text and text.count("<script>") == 1
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert len(read.sources) == 13 and all(uri.startswith("data:image/") for uri in read.sources)
    files = [link for link in read.links if not link.startswith("#")]
    assert len(files) == 13
    for file, uri in zip(files, read.sources, strict=True):
        content = base64.b64decode(uri.partition(",")[2])
        drawn = Image.open(folder / urllib.parse.unquote(file)).convert("RGB")
        assert Image.open(io.BytesIO(content)).convert("RGB").tobytes() == drawn.tobytes()


@pytest.mark.parametrize("side, count, columns", [(64, 4, 2), (64, 4, 4), (150, 2, 2)])
def test_size(side, count, columns, tmp_path):
    """1,550 pairs of noise, which no format makes small, stay under 15 MB with the text around
    them; all pictures of a page are of one size and format."""
    files = [tmp_path / f"{i}.png" for i in range(count)]
    for file in files:
        Image.effect_noise((side, side), 90).convert("RGB").save(file)
    share = count / (1550 * columns)
    found = webpage.embedded(files, (webpage.LIMIT - 1550 * 1000) * share)
    assert sum(map(len, found.values())) / share + 1550 * 1000 < 15e6
    contents = [base64.b64decode(uri.partition(",")[2]) for uri in found.values()]
    pictures = [Image.open(io.BytesIO(content)) for content in contents]
    assert len({(picture.size, picture.format) for picture in pictures}) == 1
    assert pictures[0].width >= 48


def test_text_is_small(page):
    """Around its pictures a pair takes a kilobyte or so."""
    text, *_ = page
    form = len((webpage.Path(webpage.__file__).parent / "webpage.html").read_text())
    assert len(text) - form - sum(map(len, Reader(text).sources)) < 5 * 1500


def test_columns_of_before(page, tmp_path):
    """Columns of earlier evaluations are shown as long as pictures of theirs are there, drawn in
    the folder or flat elsewhere; those of other cases are not."""
    *_, cases = page
    flat, other = tmp_path / "flat", tmp_path / "other"
    for folder, number in ((flat, 5), (other, 4)):
        folder.mkdir()
        for i in range(number):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    found = earlier_columns(["x/gone", str(flat), "base", str(other)], tmp_path, cases, {}, {})
    assert [column.name for column in found] == [str(flat), "base"]
    assert found[0].files(cases)[4] == flat / "4.png"
    known = {str(flat): found[0].weights}
    assert earlier_columns([str(flat)], tmp_path, cases, {}, known)
    Image.new("RGB", (8, 8), "red").save(flat / "2.png")  # exchanged since it was scored
    assert not earlier_columns([str(flat)], tmp_path, cases, {}, known)
