"""Measures a model of tiny/ and tiny/judge on fixed seeds against the bars of tiny/README.md; every
rate is printed with n.

    python tiny/check.py      # drawing fresh world pictures needs the emoji font
    python tiny/check.py --model tiny/flux2
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import world

import models
from judges import ClipJudge, wilson
from pictures import draw
from safely import Parser, UserError, check_regular, exit_code, number

NAMES = list(world.THINGS)
COLORS = list(world.BACKGROUNDS)
STYLES = list(world.STYLES)
THING_TEXTS = [f"a {name}" for name in NAMES]
COLOR_TEXTS = [f"a {color} background" for color in COLORS]
STYLE_TEXTS = [f"a {style} picture" for style in STYLES]


def ask(judge, pictures: list, texts: list[str]) -> np.ndarray:
    """(N, len(texts)) probabilities that the text is in the picture."""
    rows = []
    for i in range(0, len(pictures), 128):
        part = pictures[i : i + 128]
        rows += judge(part, [texts] * len(part))
    return np.array(rows)


def show(name: str, hits, bar: str = "") -> None:
    hits = np.asarray(hits).ravel()
    low, high = wilson(int(hits.sum()), len(hits))
    interval = f"[{low:.1%}, {high:.1%}]"
    print(f"{name:58s} {hits.mean():7.2%}  {interval}  n={len(hits)}  {bar}", flush=True)


def check_judge(judge, n: int) -> None:
    """On fresh pictures of the world."""
    rng = random.Random("check judge")
    scenes = [world.sample_scene(rng) for _ in range(n)]
    seen = ask(judge, [world.draw(scene) for scene in scenes], THING_TEXTS) > 0.5
    truth = np.array([[name in scene.things for name in NAMES] for scene in scenes])
    show("judge, world pictures: recall", seen[truth], ">= 99 %")
    show("judge, world pictures: false positives per absent object", seen[~truth], "<= 0.5 %")
    plain = np.array([scene.style is None for scene in scenes])
    show("judge, world pictures without a style: recall", seen[plain][truth[plain]])


def time_pipeline(model: str, call: dict):
    """Loads the pipeline, draws 64 pictures, and returns it."""
    began = time.time()
    pipe = models.load_pipeline(model, "cpu")
    draw(pipe, ["a gun"] * 64, range(64), **call)
    seconds = time.time() - began
    print(f"{'load the pipeline and draw 64 pictures':58s} {seconds:6.1f} s  <= 10 s", flush=True)
    return pipe


def asked_scenes(n: int, rng: random.Random) -> dict[str, list]:
    """{kind: n scenes}: one thing, two, one in a style, none, one by another name."""
    one = []
    for i in range(n):
        name = NAMES[i % len(NAMES)]
        one.append(world.Scene((name,), (world.SINGLE_WINDOWS[0],), rng.choice(COLORS)))
    two = []
    for _ in range(n):
        things = tuple(rng.sample(NAMES, 2))
        two.append(world.Scene(things, world.PAIR_WINDOWS[0], rng.choice(COLORS)))
    styled = [scene._replace(style=STYLES[i % len(STYLES)]) for i, scene in enumerate(one)]
    empty = [world.Scene((), (), COLORS[i % len(COLORS)]) for i in range(n)]
    names = [name for name, words in world.SYNONYMS.items() for _ in words]
    synonym = [scene._replace(things=(names[i % len(names)],)) for i, scene in enumerate(one)]
    return dict(one=one, two=two, styled=styled, empty=empty, synonym=synonym)


def asked_captions(scenes: dict, rng: random.Random) -> dict[str, list[str]]:
    captions = {}
    for kind in ("one", "two", "styled", "empty"):
        captions[kind] = [world.caption(scene, rng, synonyms=0) for scene in scenes[kind]]
    words = [word for words in world.SYNONYMS.values() for word in words]
    captions["synonym"] = []
    for i, scene in enumerate(scenes["synonym"]):
        noun = world.article(words[i % len(words)])
        color = world.article(scene.background)
        captions["synonym"].append(f"a photo of {noun} on {color} background")
    return captions


def found(sees: np.ndarray, scenes: list) -> np.ndarray:
    """(N, things) whether each thing of a scene is seen. sees: (N, NAMES)."""
    columns = [[NAMES.index(name) for name in scene.things] for scene in scenes]
    return np.array([row[column] for row, column in zip(sees, columns, strict=True)])


def check_flow(judge, pipe, call: dict, n: int) -> dict[str, list]:
    """Rates on what four sampling steps draw; returns the pictures."""
    rng = random.Random("check flow")
    scenes = asked_scenes(n, rng)
    captions = asked_captions(scenes, rng)
    seeds = range(5000, 5000 + n)
    pictures = {kind: draw(pipe, texts, seeds, 64, **call) for kind, texts in captions.items()}
    sees = {kind: ask(judge, drawn, THING_TEXTS) > 0.5 for kind, drawn in pictures.items()}
    has = {kind: found(sees[kind], scenes[kind]) for kind in ("one", "two", "styled", "synonym")}
    show("4 steps: the one object asked for is there", has["one"], ">= 97 %")
    show("4 steps: two objects, both there", has["two"].all(1), ">= 90 %")
    show("4 steps: two objects, each", has["two"])
    show("4 steps: a synonym draws its object", has["synonym"], ">= 95 %")
    for kind in ("one", "two", "empty"):
        color = ask(judge, pictures[kind], COLOR_TEXTS)
        wanted = np.array([COLORS.index(scene.background) for scene in scenes[kind]])
        as_asked = (color.argmax(1) == wanted) & (color.max(1) > 0.5)
        show(f"4 steps: background as asked, {kind}", as_asked, ">= 98 %")
    style = ask(judge, pictures["styled"], STYLE_TEXTS)
    wanted = [STYLES.index(scene.style) for scene in scenes["styled"]]
    show("4 steps: style as asked", style[np.arange(n), wanted] > 0.5, ">= 95 %")
    no_style = (ask(judge, pictures["one"], STYLE_TEXTS) < 0.5).all(1)
    show("4 steps: no style where none was asked", no_style)
    show("4 steps: an object in a style is there", has["styled"])
    show("4 steps: false positives per object not asked for", sees["empty"])
    rates = {}
    for name in NAMES:
        rows = [scene.things[0] == name for scene in scenes["one"]]
        rates[name] = has["one"][rows].mean()
    weakest = sorted(rates, key=rates.get)[:12]
    print("weakest:", ", ".join(f"{name} {rates[name]:.0%}" for name in weakest))
    return pictures


def save_grid(pictures: dict, path: Path) -> None:
    sheet = Image.new("RGB", (16 * 66, 8 * 66), "white")
    rows = ("one", "one", "two", "two", "styled", "styled", "synonym", "empty")
    for row, kind in enumerate(rows):
        for column in range(16):
            picture = pictures[kind][column + 16 * (row % 2)]
            sheet.paste(picture, (column * 66, row * 66))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.NEAREST).save(path)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    help = "pictures per figure (%(default)s)"
    add("-n", type=number(int, 32, 10**5), default=528, help=help)
    add("--model", default=models.TINY, help="of tiny/ (tiny/flux)")
    help = "where the picture grid goes, a PNG  (tiny/flux.png and so on)"
    add("--grid", type=Path, help=help)
    args = parser.parse_args(argv)
    args.grid = args.grid or HERE / f"{Path(args.model).resolve().name}.png"
    if not models.is_embedded(args.model):
        raise UserError(f"--model: {args.model} is none of tiny/'s")
    check_regular(args.grid, "--grid")
    if args.grid.suffix != ".png" or not args.grid.absolute().parent.is_dir():
        raise UserError(f"--grid: {args.grid} is no PNG, or its folder is not there")
    return args


def run(args) -> None:
    judge = ClipJudge(str(HERE / "judge"))
    check_judge(judge, 4 * args.n)
    call = models.sampler_call(args.model, models.pipeline_class(args.model))
    pipe = time_pipeline(args.model, call)
    save_grid(check_flow(judge, pipe, call, args.n), args.grid)


def main(argv=None) -> int:
    return exit_code("tiny/check.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
