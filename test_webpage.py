"""report.html, by Python's own parser."""

import base64
import html.parser
import io

from PIL import Image

import webpage
from cases import Case
from columns import Column


class Reader(html.parser.HTMLParser):
    """Figures, the pictures in each, and whatever is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.loaded, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [found[key] for key in ("src", "href") if key in found]
        if tag == "figure":
            self.figures.append(found | dict(pictures=[]))
        if tag == "img" and "src" in found:
            self.figures[-1]["pictures"].append(found)

    def handle_data(self, data):
        self.cells.append(data)


def test_page(tmp_path):
    """Every pair is there with its prompt, scores and both pictures, worst first in its set; what
    prompts hold is escaped; nothing is loaded from outside; 1,550 pairs of noise, which no format
    makes small, stay under 15 MB."""
    prompts = ["a gun", 'a <b>"gun"</b> & more', "a third gun", "a cat"]
    cases = [Case("concept", str(i), x, i, [("acc", "gun")], "") for i, x in enumerate(prompts[:3])]
    cases.append(Case("retain", "0", prompts[3], 9, [("others", "cat"), ("others", "hat")]))
    columns = [Column("base", tmp_path / "base"), Column("x/<erased>", tmp_path / "erased")]
    for column in columns:
        for file in column.files(cases):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((128, 128), 90).save(file)
    scores = {"concept/0.png, acc gun": 0.1, "concept/1.png, acc gun": 0.7}
    scores |= {"concept/2.png, acc gun": None, "concept/0.png, residue gun": 0.5}
    scores |= {"retain/0.png, others cat": 0.9, "retain/0.png, others hat": 0.25}
    base = {"retain/0.png, others cat": 1.0, "retain/0.png, others hat": 0.75}
    table = [["", "base", "x"], ["acc", "<1>", "0"]]
    scores = {"base": base, columns[1].name: scores}
    webpage.write_page(tmp_path, "gun & co", columns, cases, scores, table)
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    assert [x["data-prompt"] for x in page.figures] == [prompts[i] for i in (1, 0, 2, 3)]
    assert [x["data-score"] for x in page.figures] == ["0.7000", "0.1000", "0.0000", "0.5000"]
    assert [x.get("data-residue") for x in page.figures] == [None, "0.5000", None, None]
    assert page.figures[0]["pictures"][1]["alt"] == f"x/<erased>: {prompts[1]}"
    for figure in page.figures:
        assert [picture["title"] for picture in figure["pictures"]] == ["base", "x/<erased>"]
        for picture in figure["pictures"]:
            assert (tmp_path / picture["data-file"]).is_file()
            content = base64.b64decode(picture["src"].partition(",")[2])
            assert Image.open(io.BytesIO(content)).size == (128, 128)
    assert len(page.loaded) == 8 and all(x.startswith("data:image/webp;") for x in page.loaded)
    assert "<b>" not in text and "<1>" in page.cells and "://" not in text

    noise = tmp_path / "noise.png"
    Image.effect_noise((1024, 1024), 90).convert("RGB").save(noise)
    copy = webpage.small(noise, webpage.SMALL / 3100)
    assert 3100 * (len(copy) + 300) < 15e6 and len(copy) > 1000
