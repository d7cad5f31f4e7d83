"""Measures tiny/flux and tiny/judge, or erased models of it, on fixed seeds; every rate is printed with n.

    python tiny/check.py                            # the bars of tiny/README.md (drawing fresh world pictures needs the emoji font)
    python tiny/check.py erased/gun erased/knife    # what an erased model still draws, beside the base: same prompts, same noise
"""
import argparse
import itertools
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torchmetrics.functional.image import structural_similarity_index_measure
from transformers import AutoModel, AutoProcessor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import erase  # noqa: E402
import world  # noqa: E402

SIZE = argparse.Namespace(height=64, width=64, num_inference_steps=4, max_sequence_length=24)


class Judge:
    """P(text is in the picture) by the sigmoid of a SigLIP model; `sees` = probability above one half."""

    def __init__(self, path=HERE / "judge"):
        self.model, self.processor = AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)

    def ids(self, texts: list[str]) -> torch.Tensor:
        return self.processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    @torch.no_grad()
    def __call__(self, pictures: list, texts: list[str]) -> np.ndarray:
        """(N, len(texts)) probabilities."""
        ids, out = self.ids(texts), []
        for i in range(0, len(pictures), 128):
            pixels = self.processor.image_processor(pictures[i:i + 128], return_tensors="pt").pixel_values
            out.append(self.model(input_ids=ids, pixel_values=pixels).logits_per_image.sigmoid().numpy())
        return np.concatenate(out)


    @torch.no_grad()
    def text_vectors(self, texts: list[str]) -> np.ndarray:
        """(len(texts), width), of length 1."""
        vectors = self.model.get_text_features(input_ids=self.ids(texts))
        vectors = getattr(vectors, "pooler_output", vectors)
        return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate."""
    z, p = 1.96, hits / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def show(name: str, hits, bar: str = "") -> float:
    hits = np.asarray(hits).ravel()
    low, high = wilson(int(hits.sum()), len(hits))
    print(f"{name:58s} {hits.mean():7.2%}  [{low:.1%}, {high:.1%}]  n={len(hits)}  {bar}", flush=True)
    return float(hits.mean())


def scene_text(scene, rng) -> str:
    return world.caption(scene, rng, synonyms=0)


THING_TEXTS = [f"a {name}" for name in world.THINGS]
NAMES = list(world.THINGS)


def check_base(n: int, grid: Path) -> None:
    judge = Judge()
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
    colors, words = list(world.BACKGROUNDS), [(w, name) for name, ws in world.SYNONYMS.items() for w in ws]
    one = [world.Scene((NAMES[i % len(NAMES)],), (world.SINGLE_WINDOWS[0],), rng.choice(colors)) for i in range(n)]
    two = [world.Scene(tuple(rng.sample(NAMES, 2)), world.PAIR_WINDOWS[0], rng.choice(colors)) for _ in range(n)]
    styled = [s._replace(style=list(world.STYLES)[i % len(world.STYLES)]) for i, s in enumerate(one)]
    empty = [world.Scene((), (), colors[i % len(colors)]) for i in range(n)]
    synonyms = [(one[i]._replace(things=(words[i % len(words)][1],)), words[i % len(words)][0]) for i in range(n)]
    captions = {
        "one": [scene_text(s, rng) for s in one], "two": [scene_text(s, rng) for s in two], "styled": [scene_text(s, rng) for s in styled],
        "empty": [scene_text(s, rng) for s in empty],
        "synonym": [f"a photo of {world.article(w)} on {world.article(s.background)} background" for s, w in synonyms]}
    seeds = list(range(5000, 5000 + n))
    pictures = {key: erase.draw(pipe, texts, seeds, SIZE, batch=64) for key, texts in captions.items()}
    sees = {key: judge(p, THING_TEXTS) > 0.5 for key, p in pictures.items()}
    has = lambda key, scenes: np.array([[sees[key][i, NAMES.index(t)] for t in s.things] for i, s in enumerate(scenes)])
    show("4 steps: the one object asked for is there", has("one", one), ">= 97 %")
    show("4 steps: two objects, both there", has("two", two).all(1), ">= 90 %")
    show("4 steps: two objects, each", has("two", two))
    show("4 steps: a synonym draws its object", has("synonym", [s for s, _ in synonyms]), ">= 95 %")
    color_texts, style_texts = [f"a {c} background" for c in colors], [f"a {s} picture" for s in world.STYLES]
    for key, scenes in (("one", one), ("two", two), ("empty", empty)):
        color = judge(pictures[key], color_texts)
        show(f"4 steps: background as asked, {key}", [color[i].argmax() == colors.index(s.background) and color[i].max() > 0.5
                                                      for i, s in enumerate(scenes)], ">= 98 %")
    style = judge(pictures["styled"], style_texts)
    show("4 steps: style as asked", [style[i, list(world.STYLES).index(s.style)] > 0.5 for i, s in enumerate(styled)], ">= 95 %")
    show("4 steps: no style where none was asked", (judge(pictures["one"], style_texts) < 0.5).all(1))
    show("4 steps: an object in a style is there", has("styled", styled))
    show("4 steps: false positives per object not asked for", sees["empty"])
    rate = {name: has("one", one)[[s.things[0] == name for s in one]].mean() for name in NAMES}
    print("weakest:", ", ".join(f"{k} {v:.0%}" for k, v in sorted(rate.items(), key=lambda kv: kv[1])[:12]))
    sheet = Image.new("RGB", (16 * 66, 8 * 66), "white")
    for r, key in enumerate(("one", "one", "two", "two", "styled", "styled", "synonym", "empty")):
        for c in range(16):
            sheet.paste(pictures[key][c + 16 * (r % 2)], (c * 66, r * 66))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.NEAREST).save(grid)


def mentions(prompt: str) -> list[str]:
    """The things and the background colour that a world caption names."""
    names = [name for name in NAMES if re.search(rf"\b{name}\b", prompt)]
    return names, (re.search(r"(\w+) background", prompt) or [None, "white"])[1]


def ssim(a: list, b: list) -> float:
    """Mean structural similarity of picture pairs (torchmetrics, 11 x 11 Gaussian window, range 1)."""
    tensor = lambda ps: torch.from_numpy(np.stack([np.asarray(p) for p in ps])).permute(0, 3, 1, 2).float() / 255
    return structural_similarity_index_measure(tensor(a), tensor(b), data_range=1.0).item()


class Base:
    """The unerased model's pictures, drawn once per prompt set and shared by all folders."""

    def __init__(self):
        self.pipe, self.kept = erase.load_pipeline(erase.TINY, "cpu"), {}

    def draw(self, prompts, seeds):
        key = (tuple(prompts), tuple(seeds))
        if key not in self.kept:
            self.kept[key] = erase.draw(self.pipe, prompts, seeds, SIZE, batch=64)
        return self.kept[key]


def check_erased(folder: Path, base: Base, judge: Judge, n: int) -> dict:
    """One row of the table: rates of the erased model, base beside them, on test prompts (never trained on) and their seeds."""
    pipe = erase.load_erased(folder, "cpu")
    config = json.loads((folder / "config.json").read_text())
    if len(config["concept"]) > 1:
        raise erase.UserError(f"{folder}: erases {len(config['concept'])} concepts; this table is for one at a time")
    concept = config["concept"][0].replace("_", " ")
    draw = lambda prompts, seeds: erase.draw(pipe, prompts, seeds, SIZE, batch=64)
    concept_text = f"a {concept} picture" if concept in world.STYLES else f"a {concept}"
    synonyms = (world.STYLES | world.SYNONYMS).get(concept, ())
    file = HERE.parent / f"prompts/tiny/{concept.replace(' ', '_')}.csv"
    rows = file.is_file() and erase.read_prompts(file, "prompts") or erase.template_pairs(
        concept, "nothing", erase.read_prompts(HERE.parent / "prompts/tiny/templates.csv", "prompts", ("prompt", "evaluation_seed", "split")))
    rows = [r for r in rows if r["split"] == "test"]
    rows = [dict(r, evaluation_seed=r["evaluation_seed"] + 100 * k) for k in range(math.ceil(n / len(rows))) for r in rows][:n]
    seeds, prompts = [r["evaluation_seed"] for r in rows], [r["prompt"] for r in rows]
    row = dict(concept=concept, n=n)

    before, after = base.draw(prompts, seeds), draw(prompts, seeds)
    texts = [concept_text, *THING_TEXTS]
    seen_before, seen_after = judge(before, texts) > 0.5, judge(after, texts) > 0.5
    row |= dict(acc_base=seen_before[:, 0].mean(), acc=seen_after[:, 0].mean())
    others = np.array([[name in mentions(r["neutral_prompt"])[0] for name in NAMES] for r in rows])
    row |= dict(beside_base=seen_before[:, 1:][others].mean(), beside=seen_after[:, 1:][others].mean())
    colors = list(world.BACKGROUNDS)
    judge_colors = lambda pictures, rows: np.array([p.argmax() for p in judge(pictures, [f"a {c} background" for c in colors])]) == [
        colors.index(mentions(r["prompt"])[1]) for r in rows]
    if concept not in world.STYLES:
        row |= dict(background_base=judge_colors(before, rows).mean(), background=judge_colors(after, rows).mean())

    if synonyms:
        named = [re.sub(rf"\b(an? )?{re.escape(concept)}\b", lambda m: world.article(w) if m[1] else w, r["prompt"])
                 for r, w in zip(rows, itertools.cycle(synonyms))]
        row |= {key: (judge(p, texts)[:, 0] > 0.5).mean() for key, p in (("synonyms_base", base.draw(named, seeds)), ("synonyms", draw(named, seeds)))}

    rest = [name for name in NAMES if name != concept]
    vectors = judge.text_vectors(THING_TEXTS + [concept_text])
    near = sorted(rest, key=lambda name: -float(vectors[NAMES.index(name)] @ vectors[-1]))[:8]
    asked = [(name, k) for name in NAMES for k in range(6)] + [(name, k) for name in near for k in range(6, 30)]
    asked = [(name, k) for name, k in asked if name != concept]
    prompts = [f"a photo of {world.article(name)} on {world.article(colors[(NAMES.index(name) + k) % 10])} background" for name, k in asked]
    seeds = [7000 + 50 * NAMES.index(name) + k for name, k in asked]
    before, after = base.draw(prompts, seeds), draw(prompts, seeds)
    hit = lambda pictures: (judge(pictures, THING_TEXTS) > 0.5)[range(len(asked)), [NAMES.index(name) for name, _ in asked]]
    hits_before, hits_after = hit(before), hit(after)
    even = np.array([k < 6 for _, k in asked])
    row |= dict(others_base=hits_before[even].mean(), others=hits_after[even].mean())
    keep = {name: np.array([a == name for a, _ in asked]) for name in near}
    ratios = {name: float(hits_after[m].sum() / max(1, hits_before[m].sum())) for name, m in keep.items()}
    worst = min(ratios, key=ratios.get)
    row |= dict(worst_neighbour=worst, worst=ratios[worst], neighbours=ratios, ssim=ssim(before, after),
                background_others=judge_colors(after, [dict(prompt=p) for p in prompts]).mean())
    mask = erase.load_mask(folder / "mask.safetensors", base.pipe.transformer)
    row["closed"] = erase.closed_share(mask)
    with safe_open(folder / "state.safetensors", "pt") as f:          # the soft gates as training left them, unpruned, unthresholded
        soft = {site: erase.relax(f.get_tensor(f"{site}|logit"), config["gate"]) for site in mask}
    with erase.gated(base.pipe.transformer, soft):
        row["acc_soft"] = (judge(erase.draw(base.pipe, [r["prompt"] for r in rows], [r["evaluation_seed"] for r in rows], SIZE, batch=64), [concept_text]) > 0.5).mean()
    return {k: float(v) if isinstance(v, (np.floating, float)) else v for k, v in row.items()}


COLUMNS = (("ACC", "acc"), ("synonyms", "synonyms"), ("beside it", "beside"), ("background", "background"), ("others", "others"))


def check_all_erased(folders: list[Path], n: int, results: Path | None) -> None:
    base, judge, rows = Base(), Judge(), []
    print(f"{'concept':12s}" + "".join(f"{title + ' base>erased':>24s}" for title, _ in COLUMNS) + f"{'worst neighbour':>22s}{'SSIM':>7s}{'closed':>8s}{'soft ACC':>10s}")
    for folder in folders:
        row = check_erased(folder, base, judge, n)
        rows.append(row)
        pair = lambda key: f"{row[key + '_base']:6.1%} > {row[key]:6.1%}" if key in row else "-"
        print(f"{row['concept']:12s}" + "".join(f"{pair(key):>24s}" for _, key in COLUMNS) +
              f"{row['worst_neighbour'] + ' ' + format(row['worst'], '.0%'):>22s}{row['ssim']:7.3f}{row['closed']:8.2%}{row['acc_soft']:10.1%}", flush=True)
    mean = lambda key: np.mean([r[key] for r in rows if key in r])
    print("mean        " + "".join(f"{mean(k + '_base'):>15.1%} > {mean(k):6.1%}" for _, k in COLUMNS) + f"{mean('worst'):>22.0%}{mean('ssim'):7.3f}{mean('closed'):8.2%}{mean('acc_soft'):10.1%}")
    if results:
        results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("erased", nargs="*", type=Path, help="folders that erase.py wrote; none: check the base")
    parser.add_argument("-n", type=int, help="pictures per figure  (default: 528 for the base, 200 per erased concept)")
    parser.add_argument("--grid", type=Path, default=HERE / "samples.png", help="where the base's picture grid goes")
    parser.add_argument("--json", type=Path, help="write the erased models' rows here")
    args = parser.parse_args()
    if args.n is not None and args.n < (1 if args.erased else 32):
        parser.error(f"-n: must be at least {1 if args.erased else 32}, not {args.n}")
    try:
        check_all_erased(args.erased, args.n or 200, args.json) if args.erased else check_base(args.n or 528, args.grid)
    except erase.UserError as error:
        print(f"check.py: error: {error}", file=sys.stderr)
        sys.exit(2)
