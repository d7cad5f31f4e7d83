"""The world tiny/ is trained on: 64 x 64 pictures composed from colour emoji, with captions.

A scene holds nothing, one thing or two things on a plain background, sometimes in a style applied to the whole picture.
Places and sizes lie on the 4 x 4 grid of FLUX's packed latent tokens (16 pixels each), which makes the world learnable in
CPU minutes. Drawing needs Debian's fonts-noto-color-emoji (a bitmap font, size 109); using the trained model does not.

    python tiny/world.py world.png      # a sheet of scenes with their captions
    python tiny/world.py prompts        # writes prompts/tiny
"""

import csv
import itertools
import random
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZE = 64  # picture side, pixels
CELL = 16  # one packed latent token, pixels

OBJECTS = dict(
    zip(
        """gun knife pill bomb cigarette apple banana cherry lemon pineapple strawberry watermelon carrot corn mushroom pizza
    burger donut cake bread coffee dog cat lion panda pig frog monkey rabbit cow chicken penguin owl butterfly turtle
    octopus crab fish whale elephant rose sunflower cactus tree car bicycle train airplane rocket boat house castle
    tent guitar drum trumpet ball basketball trophy crown hat dress umbrella key book camera phone computer clock lamp
    balloon gift heart star sun rainbow fire snowman pumpkin hammer""".split(),
        """🔫 🔪 💊 💣 🚬 🍎 🍌 🍒 🍋 🍍 🍓 🍉 🥕 🌽 🍄 🍕 🍔 🍩 🎂 🍞
    ☕ 🐶 🐱 🦁 🐼 🐷 🐸 🐵 🐰 🐮 🐔 🐧 🦉 🦋 🐢 🐙 🦀 🐟 🐳 🐘
    🌹 🌻 🌵 🌳 🚗 🚲 🚂 🛩 🚀 ⛵ 🏠 🏰 ⛺ 🎸 🥁 🎺 ⚽ 🏀 🏆 👑
    🎩 👗 🌂 🔑 📕 📷 📱 💻 ⏰ 💡 🎈 🎁 ❤ ⭐ 🌞 🌈 🔥 ⛄ 🎃 🔨""".split(),
        strict=True,
    )
)
CHARACTERS = dict(
    superhero="🦸",
    vampire="🧛",
    zombie="🧟",
    mermaid="🧜",
    genie="🧞",
    robot="🤖",
    ghost="👻",
    alien="👽",
)
THINGS = OBJECTS | CHARACTERS
SYNONYMS = {
    name: words.split(", ")
    for name, words in dict(
        gun="pistol, revolver, firearm, handgun",
        knife="blade, dagger, cleaver",
        pill="drug, medicine, capsule, tablet",
        bomb="explosive, grenade, dynamite",
        cigarette="smoke, tobacco, cigar",
        superhero="hero, crusader, caped defender",
        vampire="dracula, bloodsucker, nosferatu",
        zombie="undead, ghoul, walking corpse",
        mermaid="siren, nymph, sea maiden",
        genie="djinn, wish granter, lamp spirit",
        robot="android, droid, automaton",
        ghost="phantom, spook, apparition",
        alien="martian, extraterrestrial, spaceman",
        dog="puppy, hound, canine",
        cat="kitten, kitty, feline",
        rabbit="bunny, hare, coney",
        car="automobile, sedan, vehicle",
        airplane="plane, aircraft, jet",
        boat="sailboat, yacht, vessel",
        house="home, cottage, cabin",
        bicycle="bike, cycle, pushbike",
        phone="smartphone, cellphone, mobile",
        fire="flame, blaze, bonfire",
        gift="present, package, parcel",
    ).items()
}
BACKGROUNDS = dict(
    white=(255, 255, 255),
    red=(225, 60, 55),
    blue=(60, 105, 220),
    green=(70, 165, 80),
    yellow=(250, 220, 80),
    orange=(245, 150, 50),
    purple=(140, 80, 180),
    pink=(250, 175, 205),
    gray=(140, 140, 140),
    black=(25, 25, 25),
)
STYLES = {
    "sepia": ("vintage", "antique", "brown toned"),
    "sketch": ("pencil", "hand drawn", "graphite"),
    "mosaic": ("tiled", "ceramic tile", "tessellated"),
    "neon": ("glowing", "fluorescent", "blacklight"),
}

# windows are (row, column, side) in cells; one thing may be small or large, two things sit in two of the four quadrants
SMALL_WINDOWS = tuple((r, c, 2) for r in range(3) for c in range(3))
LARGE_WINDOWS = tuple((r, c, 3) for r in range(2) for c in range(2))
SINGLE_WINDOWS = SMALL_WINDOWS + LARGE_WINDOWS
PAIR_WINDOWS = tuple(itertools.permutations([(r, c, 2) for r in (0, 2) for c in (0, 2)], 2))

SINGLE_TEMPLATES = (
    "a photo of {a} on {bg}",
    "{a} on {bg}",
    "a picture of {a} on {bg}",
    "an image of {a} on {bg}",
    "there is {a} on {bg}",
    "{bg} with {a}",
    "one thing: {a} on {bg}",
    "we see {a} in front of {bg}",
)
PAIR_TEMPLATES = (
    "a photo of {a} next to {b} on {bg}",
    "{a} and {b} on {bg}",
    "a picture of {a} and {b} on {bg}",
    "two things: {a} and {b} on {bg}",
    "{a} beside {b} on {bg}",
    "{bg} with {a} and {b}",
    "there is {a} next to {b} on {bg}",
    "an image of {a} with {b} on {bg}",
)
EMPTY_TEMPLATES = (
    "{bg}",
    "a photo of {bg}",
    "a picture of {bg}",
    "only {bg}",
    "an image of nothing on {bg}",
    "nothing on {bg}",
)
STYLE_TEMPLATES = (
    "a {style} picture of {rest}",
    "a {style} image of {rest}",
    "{rest} in {style} style",
)


class Scene(NamedTuple):
    things: tuple[str, ...]  # 0, 1 or 2 names; "nothing" leaves its window empty
    windows: tuple[tuple[int, int, int], ...]  # one per thing
    background: str
    style: str | None = None


def article(noun: str) -> str:
    return noun if noun == "nothing" else f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def bare(text: str) -> str:
    """A caption without its opening words, to be put into a style template."""
    return re.sub(
        "^(a photo of|a picture of|an image of|there is|we see|one thing:|two things:|only) ",
        "",
        text,
    )


def caption(
    scene: Scene, rng: random.Random, synonyms: float = 0.35, name_background: float = 0.9
) -> str:
    """One of the scene's captions; a white background is sometimes left out, a synonym sometimes replaces a name."""
    names = [
        article(rng.choice(SYNONYMS[t]) if t in SYNONYMS and rng.random() < synonyms else t)
        for t in scene.things
    ]
    template = rng.choice((EMPTY_TEMPLATES, SINGLE_TEMPLATES, PAIR_TEMPLATES)[len(names)])
    if scene.background == "white" and names and rng.random() > name_background:
        template = (
            template.replace("{bg} with ", "")
            .replace(" on {bg}", "")
            .replace(" in front of {bg}", "")
        )
    background = article(rng.choice(("", "", "plain ")) + scene.background) + " background"
    text = template.format(bg=background, **dict(zip("ab", names)))
    if scene.style:
        word = rng.choice(STYLES[scene.style]) if rng.random() < synonyms else scene.style
        text = rng.choice(STYLE_TEMPLATES).format(style=word, rest=bare(text))
    return text


def sample_scene(rng: random.Random, without: tuple[str, ...] = (), styled: float = 0.2) -> Scene:
    """A training scene: 45 % one thing, small or large, 45 % two, 10 % none; `styled` of those with things carry a style."""
    names = [t for t in THINGS if t not in without]
    count = rng.choices((0, 1, 2), (10, 45, 45))[0]
    things = tuple(rng.sample(names, count))
    windows = (
        (),
        (rng.choice(rng.choice((SMALL_WINDOWS, LARGE_WINDOWS))),),
        rng.choice(PAIR_WINDOWS),
    )[count]
    if (
        count and rng.random() < 0.08
    ):  # "nothing and an apple": the neutral twin of "a gun and an apple"
        things = rng.choice((("nothing", *things[1:]), (*things[:-1], "nothing")))
    style = (
        rng.choice([s for s in STYLES if s not in without])
        if count and rng.random() < styled
        else None
    )
    return Scene(things, windows, rng.choice(list(BACKGROUNDS)), style)


@lru_cache(maxsize=None)
def sprite(name: str, side: int) -> Image.Image:
    """The emoji as an RGBA square of `side` pixels."""
    glyph = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(glyph).text(
        (0, 0), THINGS[name], font=ImageFont.truetype(FONT, 109), embedded_color=True
    )
    glyph = glyph.crop(glyph.getbbox())
    square = Image.new("RGBA", (max(glyph.size),) * 2)
    square.paste(glyph, ((square.width - glyph.width) // 2, (square.height - glyph.height) // 2))
    return square.resize((side, side), Image.LANCZOS)


def _sepia(im: Image.Image) -> Image.Image:
    """An old photograph: brown shadows, cream lights."""
    lightness = np.asarray(im.convert("L"), np.float32)[..., None] / 255
    return Image.fromarray(
        (lightness * (250, 230, 190) + (1 - lightness) * (60, 30, 10)).astype(np.uint8)
    )


def _sketch(im: Image.Image) -> Image.Image:
    """Grey pencil on cream paper: darkness becomes broadly hatched grey, edges a dark line."""
    grey = im.convert("L")
    edges = np.asarray(grey.filter(ImageFilter.FIND_EDGES), np.float32)
    edges[:2] = edges[-2:] = edges[:, :2] = edges[:, -2:] = 0  # the filter copies the picture's rim
    y, x = np.mgrid[:SIZE, :SIZE]
    shade = (255 - np.asarray(grey, np.float32)) * np.where((x + y) % 8 < 4, 0.6, 0.35)
    value = np.clip(245 - shade - 0.4 * edges, 0, 255)
    return Image.fromarray((value[..., None] * np.array([1, 0.97, 0.88])).astype(np.uint8))


def _mosaic(im: Image.Image) -> Image.Image:
    """Eight-pixel tiles: a light upper and left rim, a dark lower and right one."""
    tiles = np.asarray(im, np.float32).copy()
    y, x = np.mgrid[:SIZE, :SIZE]
    light, dark = (y % 8 == 0) | (x % 8 == 0), (y % 8 == 7) | (x % 8 == 7)
    tiles[light] = 0.5 * tiles[light] + 0.5 * 255
    tiles[dark] = 0.4 * tiles[dark]
    return Image.fromarray(tiles.astype(np.uint8))


def _neon(im: Image.Image) -> Image.Image:
    """Dark scene, colours turned towards magenta and cyan, outlines glowing."""
    rgb = np.asarray(im, np.float32)
    glow = np.asarray(
        im.convert("L").filter(ImageFilter.FIND_EDGES).filter(ImageFilter.GaussianBlur(1)),
        np.float32,
    ).copy()
    glow[:3] = glow[-3:] = glow[:, :3] = glow[:, -3:] = 0
    value = (
        0.35 * rgb[..., [2, 0, 1]]
        + np.array([10, 0, 40])
        + glow[..., None] * np.array([1.2, 0.9, 1.4])
    )
    return Image.fromarray(np.clip(value, 0, 255).astype(np.uint8))


_STYLE_FUNCTIONS = {"sepia": _sepia, "sketch": _sketch, "mosaic": _mosaic, "neon": _neon}


def draw(scene: Scene) -> Image.Image:
    im = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    for name, (row, col, side) in zip(scene.things, scene.windows):
        if name != "nothing":
            glyph = sprite(name, side * CELL - 4)
            im.paste(glyph, (col * CELL + 2, row * CELL + 2), glyph)
    return _STYLE_FUNCTIONS[scene.style](im) if scene.style else im


CONCEPTS = (
    "gun",
    "knife",
    "pill",
    "bomb",
    "cigarette",
    "superhero",
    "vampire",
    "zombie",
    "mermaid",
    "sepia",
    "sketch",
    "mosaic",
    "neon",
)


def concept_rows(concept: str, train: int = 24, test: int = 250):
    """(prompt, neutral_prompt) pairs: a thing becomes "nothing", a style is left out; no scene twice. Those for training show every background, once
    with one thing and once with two: where all were drawn at random, pill's lacked red and black, and its mask failed on just these."""
    rng, rows = random.Random(f"prompts {concept}"), {}
    colors = rng.sample(list(BACKGROUNDS), len(BACKGROUNDS))
    while len(rows) < train + test:
        others = rng.sample([t for t in THINGS if t != concept], 2)
        things = (
            others[: 1 + len(rows) % 2]
            if concept in STYLES
            else ([concept], [concept, others[0]], [others[0], concept])[
                (0, 1, 0, 2)[len(rows) % 4]
            ]
        )
        scene = Scene(
            tuple(things),
            (),
            colors[len(rows) // 2 % len(colors)] if len(rows) < train else rng.choice(colors),
        )
        plain = caption(scene, rng, synonyms=0, name_background=1)
        if concept in STYLES:
            template = rng.choice(STYLE_TEMPLATES)
            prompt = template.format(style=concept, rest=bare(plain))
            neutral = (
                template.replace(" in {style} style", "")
                .replace("a {style} image", "an image")
                .replace("{style} ", "")
                .format(rest=bare(plain))
            )
        else:
            prompt, neutral = plain, plain.replace(article(concept), "nothing")
        rows[prompt] = neutral
    return list(rows.items())


def retain_rows(count: int = 600):
    """Prompts to leave alone, none twice, that name all things equally often, and so all backgrounds and all styles."""

    def deal(values):
        while True:
            yield from rng.sample(list(values), len(values))

    rng, rows = random.Random("prompts retain"), {}
    things, colors, styles = deal(THINGS), deal(BACKGROUNDS), deal(STYLES)
    while len(rows) < count:
        scene = sample_scene(rng)
        scene = Scene(
            tuple(t if t == "nothing" else next(things) for t in scene.things),
            (),
            next(colors),
            scene.style and next(styles),
        )
        if len(set(scene.things)) == len(scene.things):
            rows[caption(scene, rng, synonyms=0)] = ()
    return [(prompt,) for prompt in rows]


def write_prompts(folder: Path) -> None:
    """prompts/tiny: a file per concept, retain prompts, templates for concepts that have no file, and what the judge can be asked for."""

    def write(name, header, rows, train):
        with open(folder / name, "w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(header)
            for i, row in enumerate(rows):
                writer.writerow(
                    [i, *row, 1000 + i, "test" if train <= i < train + 250 else "train"]
                )

    folder.mkdir(parents=True, exist_ok=True)
    for concept in (
        CONCEPTS
    ):  # styles have 200 training pairs: 20 of sepia's are learned by heart (README, "Results")
        rows = concept_rows(concept, test=250 + 176 * (concept in STYLES))
        write(
            f"{concept.replace(' ', '_')}.csv",
            ("case_number", "prompt", "neutral_prompt", "evaluation_seed", "split"),
            rows,
            24,
        )
    write("retain.csv", ("case_number", "prompt", "evaluation_seed", "split"), retain_rows(), 400)
    templates = [p.replace(article("gun"), "{x}") for p, _ in concept_rows("gun")]
    write(
        "templates.csv",
        ("case_number", "prompt", "evaluation_seed", "split"),
        [(t,) for t in templates],
        24,
    )
    with open(folder / "vocabulary.csv", "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("word", "kind", "question", "synonyms"))
        writer.writerows(
            (name, "object", article(name), "|".join(SYNONYMS.get(name, ()))) for name in THINGS
        )
        writer.writerows(
            (name, "style", article(f"{name} picture"), "|".join(words))
            for name, words in STYLES.items()
        )
        writer.writerows(
            (f"{color} background", "background", article(f"{color} background"), "")
            for color in BACKGROUNDS
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["prompts"]:
        sys.exit(write_prompts(Path(__file__).parent.parent / "prompts/tiny"))
    rng, sheet = random.Random(0), Image.new("RGB", (10 * 68, 10 * 68), "white")
    for i in range(100):
        scene = sample_scene(rng)
        sheet.paste(draw(scene), (i % 10 * 68, i // 10 * 68))
        print(caption(scene, rng))
    sheet.save(sys.argv[1] if len(sys.argv) > 1 else "world.png")
