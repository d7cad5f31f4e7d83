"""Tensors in, PNG and Markdown out."""

import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from models import for_prompts, refused
from safely import UserError, first_line, write_atomically, write_text


def sample(pipe, prompt: list, **arguments) -> list:
    """PIL pictures by the stock pipeline. Raises RuntimeError for latents that are not finite,
    which would be drawn black: no concept is seen in black."""
    final = {}

    def keep(pipe, step, timestep, tensors):
        final.update(tensors)
        return {}

    with refused(pipe):
        images = pipe(prompt=prompt, callback_on_step_end=keep, **arguments).images
    if not final["latents"].isfinite().all():
        raise RuntimeError(f"latents of {prompt[0]!r} are not finite: damaged weights?")
    return images


@torch.no_grad()
def draw(pipe, prompts, seeds, batch: int = 16, **call) -> list:
    """One PIL picture for each (prompt, seed), by sample(). A seed means the same noise on every
    device and in any batch. call: what pipe(...) takes."""
    drawn = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        drawn += sample(pipe, generator=generators, **for_prompts(call, prompts[part]))
    return drawn


def draw_rows(pipe, name: str, rows: dict, call: dict, batch: int) -> list:
    """Labelled rows for save_preview: the first six pictures of each kind of prompts, with the
    rows' own seeds, `batch` at a time. rows: {kind: prompt rows}."""
    drawn = []
    for kind, some in rows.items():
        prompts = [row["prompt"] for row in some[:6]]
        seeds = [row["evaluation_seed"] for row in some[:6]]
        drawn.append((f"{kind}\n{name}", draw(pipe, prompts, seeds, batch, **call)))
    return drawn


def open_pictures(files) -> list:
    """PIL pictures, RGB."""
    return [Image.open(file).convert("RGB") for file in files]


def check_picture(file: Path, size: tuple | None = None) -> None:
    """Raises UserError if the file is missing, damaged or of another size (width, height)."""
    if not file.is_file():
        raise UserError(f"{file}: no such picture")
    try:
        with Image.open(file) as picture:
            found = picture.size
            if picture.format == "PNG":
                picture.verify()
            else:  # verify() looks into no other format
                picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: is no whole picture: {first_line(error)}") from None
    if size and found != size:
        wanted = f"{size[0]} x {size[1]}"
        raise UserError(f"{file}: is {found[0]} x {found[1]} pixels, not {wanted}")


def save_preview(path: Path, rows: list, side: int = 128) -> None:
    """A sheet of rows (title, pictures). Small pictures are enlarged without smoothing, so that
    pixels stay what they are."""
    label, gap = 150, 4
    columns = max(len(row) for _, row in rows)
    sheet = Image.new("RGB", (label + (side + gap) * columns, (side + gap) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, row) in enumerate(rows):
        top = i * (side + gap)
        pen.text((6, top + side // 2 - 12), title, fill="black", font_size=15)
        for j, picture in enumerate(row):
            resample = Image.NEAREST if picture.width <= side else Image.LANCZOS
            small = picture.resize((side, side), resample)
            sheet.paste(small, (label + j * (side + gap), top))
    write_atomically(path, lambda temporary: sheet.save(temporary, format="png"))


def save_curves(path: Path, metrics: list[dict]) -> None:
    """Losses and the share of closed gates by step, from rows of metrics.jsonl."""
    os.environ["MPLBACKEND"] = "agg"  # whatever a notebook's is
    from matplotlib.figure import Figure  # slow to import, and evaluate.py has no use for it

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in metrics]
    for key in ("erase_loss", "preserve_loss"):
        left.semilogy(steps, [row[key] for row in metrics], label=key, linewidth=1)
    left.legend()
    left.set(xlabel="step", ylabel="mean squared error of latents", ylim=(1e-4, None))
    closed = [row for row in metrics if "closed" in row]  # while gates were learnt
    right.plot([row["step"] for row in closed], [100 * row["closed"] for row in closed])
    right.set(xlabel="step", ylabel="gates closed, %", ylim=0)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


MODEL_CARD = """---
base_model: {model}
library_name: diffusers
tags: [concept-erasure, text-to-image]
---
# {model} without: {concepts}

{summary}

Made by Minimalist Concept Erasure (ICML 2025, arXiv 2507.13386): {masked}; then {healed}.
The errors are mean squared errors of the final latents over {held_out} test prompts (of a file
without any, training prompts) and noises that training never had. Whether the concept is still
*seen* is for a judge to say, not for this loss.

```python
from erase import load_erased  # a stock diffusers pipeline
pipe = load_erased({out_dir!r})
pipe("a photo", {call}).images[0]
```
`mask.safetensors` is the mask alone, `heal.safetensors`, if it is there, the LoRA under it; both
fit only base weights with these fingerprints: {base};
`config.json` is the exact run; `preview.png` shows same-seed pairs on those prompts;
`metrics.jsonl` and `curves.png` are the losses; `state.safetensors` the optimiser's state;
`transformer/`, if it is there, loads by its class's from_pretrained, and beside `model_index.json`
the whole folder by DiffusionPipeline.from_pretrained.
"""


def summary(mask: dict, errors: dict, held_out: dict, seconds: float, device) -> str:
    """What a run did, in a line. errors: {before or erased: (N,)} of held_out, {kind: rows}."""
    concepts = len(held_out["concept prompts"])  # which come first
    hardware = f"{torch.get_num_threads()} CPU threads"
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    closed = sum(int((gate == 0).sum()) for gate in mask.values())
    total = sum(gate.numel() for gate in mask.values())
    before = errors["before"][:concepts].mean().item()
    after = errors["erased"][:concepts].mean().item()
    others = errors["erased"][concepts:].mean().item()
    left = errors["erased"][:concepts] / errors["before"][:concepts].clamp(min=1e-12)
    middle, high = left.quantile(torch.tensor([0.5, 0.95]).to(left)).tolist()
    return (
        f"{closed:,} of {total:,} gates closed ({closed / total:.2%}) in {seconds / 60:.1f} "
        f"minutes on {hardware}; error on test prompts: to the neutral picture {before:.4f} -> "
        f"{after:.4f} (residue {middle:.2f}, 95th percentile {high:.2f}), "
        f"to the base on retain prompts 0 -> {others:.4f}"
    )


def not_erased(errors: dict, held_out: dict) -> list[str]:
    """The concepts of whose error on test prompts more than half is left. errors: as summary's."""
    rows = {}
    for i, row in enumerate(held_out["concept prompts"]):
        rows.setdefault(row["concept"], []).append(i)
    return [
        concept
        for concept, mine in rows.items()
        if errors["erased"][mine].sum() > 0.5 * errors["before"][mine].sum()
    ]


def masked_by(facts: dict) -> str:
    """How a run came to its mask. facts: as save_card's."""
    if facts.get("import_mask"):
        return f"the mask of {facts['import_mask']}"
    if facts.get("parts"):
        return f"the masks of {', '.join(facts['parts'])}"
    text = "{steps} steps on {pairs} prompt pairs and {retain} retain prompts, gates `{gate}` on "
    text += "{modules}, beta {beta}, seed {seed}"
    return text.format(**facts | dict(modules=" and ".join(facts["modules"])))


def healed_by(facts: dict) -> str:
    """What followed the mask. facts: as save_card's."""
    if not facts["heal"]:
        return "no LoRA (`--heal 0`)"
    done = []
    if facts["reopen"]:
        done.append("{reopen:.0%} of the closed gates, the most harmful, opened again")
    if facts["heal_steps"]:
        done.append("{heal_steps} steps on a LoRA of rank {heal_rank}")
    if facts["refit"]:
        done.append("a LoRA of rank {refit_rank} fitted with strength {refit}")
    return "; ".join(done).format(**facts)


def save_card(folder: Path, line: str, base: dict, facts: dict) -> None:
    """A model card, README.md. base: its parts' fingerprints; facts: the run's config.json and what
    MODEL_CARD names beside."""
    call = ", ".join(f"{name}={value!r}" for name, value in facts["call"].items())
    words = dict(call=call, concepts=", ".join(facts["concept"]), out_dir=str(folder), summary=line)
    base = ", ".join(f"{part} `{fingerprint}`" for part, fingerprint in base.items())
    words |= dict(masked=masked_by(facts), healed=healed_by(facts), base=base)
    write_text(folder / "README.md", MODEL_CARD.format(**facts | words))
