"""Measures tiny/flux and tiny/judge on fixed seeds against the bars of tiny/README.md; every rate is printed with n.

python tiny/check.py      # drawing fresh world pictures needs the emoji font
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import erase  # noqa: E402
import evaluate  # noqa: E402
import world  # noqa: E402

SIZE = argparse.Namespace(height=64, width=64, num_inference_steps=4, max_sequence_length=24)


_judge = evaluate.ClipJudge(str(HERE / "judge"), "cpu", torch.float32)


def judge(pictures: list, texts: list[str]) -> np.ndarray:
    """(N, len(texts)) probabilities that the text is in the picture."""
    return np.array(
        [
            row
            for i in range(0, len(pictures), 128)
            for row in _judge(pictures[i : i + 128], [texts] * len(pictures[i : i + 128]))
        ]
    )


def show(name: str, hits, bar: str = "") -> float:
    hits = np.asarray(hits).ravel()
    low, high = evaluate.wilson(int(hits.sum()), len(hits))
    print(
        f"{name:58s} {hits.mean():7.2%}  [{low:.1%}, {high:.1%}]  n={len(hits)}  {bar}", flush=True
    )
    return float(hits.mean())


def scene_text(scene, rng) -> str:
    return world.caption(scene, rng, synonyms=0)


THING_TEXTS = [f"a {name}" for name in world.THINGS]
NAMES = list(world.THINGS)


def check_base(n: int, grid: Path) -> None:
    rng = random.Random("check judge")
    scenes = [world.sample_scene(rng) for _ in range(4 * n)]
    seen = judge([world.draw(s) for s in scenes], THING_TEXTS) > 0.5
    truth = np.array([[name in s.things for name in NAMES] for s in scenes])
    show("judge, world pictures: recall", seen[truth], ">= 99 %")
    show("judge, world pictures: false positives per absent object", seen[~truth], "<= 0.5 %")
    plain = np.array([s.style is None for s in scenes])
    show("judge, world pictures without a style: recall", seen[plain][truth[plain]])

    began = time.time()
    pipe = erase.load_pipeline(erase.TINY, "cpu")
    erase.draw(pipe, ["a gun"] * 64, list(range(64)), SIZE)
    seconds = time.time() - began
    print(f"{'load the pipeline and draw 64 pictures':58s} {seconds:6.1f} s  <= 10 s", flush=True)

    rng = random.Random("check flow")
    colors, words = (
        list(world.BACKGROUNDS),
        [(w, name) for name, ws in world.SYNONYMS.items() for w in ws],
    )
    one = [
        world.Scene((NAMES[i % len(NAMES)],), (world.SINGLE_WINDOWS[0],), rng.choice(colors))
        for i in range(n)
    ]
    two = [
        world.Scene(tuple(rng.sample(NAMES, 2)), world.PAIR_WINDOWS[0], rng.choice(colors))
        for _ in range(n)
    ]
    styled = [
        s._replace(style=list(world.STYLES)[i % len(world.STYLES)]) for i, s in enumerate(one)
    ]
    empty = [world.Scene((), (), colors[i % len(colors)]) for i in range(n)]
    synonyms = [
        (one[i]._replace(things=(words[i % len(words)][1],)), words[i % len(words)][0])
        for i in range(n)
    ]
    captions = {
        "one": [scene_text(s, rng) for s in one],
        "two": [scene_text(s, rng) for s in two],
        "styled": [scene_text(s, rng) for s in styled],
        "empty": [scene_text(s, rng) for s in empty],
        "synonym": [
            f"a photo of {world.article(w)} on {world.article(s.background)} background"
            for s, w in synonyms
        ],
    }
    seeds = list(range(5000, 5000 + n))
    pictures = {
        key: erase.draw(pipe, texts, seeds, SIZE, batch=64) for key, texts in captions.items()
    }
    sees = {key: judge(p, THING_TEXTS) > 0.5 for key, p in pictures.items()}
    has = lambda key, scenes: np.array(
        [[sees[key][i, NAMES.index(t)] for t in s.things] for i, s in enumerate(scenes)]
    )
    show("4 steps: the one object asked for is there", has("one", one), ">= 97 %")
    show("4 steps: two objects, both there", has("two", two).all(1), ">= 90 %")
    show("4 steps: two objects, each", has("two", two))
    show("4 steps: a synonym draws its object", has("synonym", [s for s, _ in synonyms]), ">= 95 %")
    color_texts, style_texts = (
        [f"a {c} background" for c in colors],
        [f"a {s} picture" for s in world.STYLES],
    )
    for key, scenes in (("one", one), ("two", two), ("empty", empty)):
        color = judge(pictures[key], color_texts)
        show(
            f"4 steps: background as asked, {key}",
            [
                color[i].argmax() == colors.index(s.background) and color[i].max() > 0.5
                for i, s in enumerate(scenes)
            ],
            ">= 98 %",
        )
    style = judge(pictures["styled"], style_texts)
    show(
        "4 steps: style as asked",
        [style[i, list(world.STYLES).index(s.style)] > 0.5 for i, s in enumerate(styled)],
        ">= 95 %",
    )
    show(
        "4 steps: no style where none was asked", (judge(pictures["one"], style_texts) < 0.5).all(1)
    )
    show("4 steps: an object in a style is there", has("styled", styled))
    show("4 steps: false positives per object not asked for", sees["empty"])
    rate = {name: has("one", one)[[s.things[0] == name for s in one]].mean() for name in NAMES}
    print(
        "weakest:",
        ", ".join(f"{k} {v:.0%}" for k, v in sorted(rate.items(), key=lambda kv: kv[1])[:12]),
    )
    sheet = Image.new("RGB", (16 * 66, 8 * 66), "white")
    for r, key in enumerate(("one", "one", "two", "two", "styled", "styled", "synonym", "empty")):
        for c in range(16):
            sheet.paste(pictures[key][c + 16 * (r % 2)], (c * 66, r * 66))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.NEAREST).save(grid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=528, help="pictures per figure (%(default)s)")
    parser.add_argument(
        "--grid", type=Path, default=HERE / "samples.png", help="where the picture grid goes"
    )
    args = parser.parse_args()
    if args.n < 32:
        parser.error(f"-n: must be at least 32, not {args.n}")
    check_base(args.n, args.grid)
