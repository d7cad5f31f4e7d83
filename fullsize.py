"""What erasing costs at FLUX.1-schnell's size, with random weights: an optimiser step on a GPU,
folding and saving on any machine. bench.py --full and --fold run it."""

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import models  # first: it keeps transformers quiet

# isort: split
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

import artefacts
import erase
import lowmem
import memory
import realmodels
from costs import PASSES, anonymous_peak, clock, measure, show
from safely import UserError

SCHNELL = realmodels.FLUX
MATMUL = 8192  # its bf16 product is the peak that a step is compared with


def random_transformer(device) -> FluxTransformer2DModel:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(**SCHNELL).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def random_pipeline(device, kind: str, compiled: bool) -> FluxPipeline:
    """A pipeline around it without text encoders, whose prompts are random tensors."""
    # quantised on the way to the GPU, as by erase.py
    transformer = random_transformer(device if kind == "none" else "cpu")
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline.from_pretrained(models.TINY, transformer=transformer, **absent)
    pipe.set_progress_bar_config(disable=True)
    lowmem.place(pipe, device, kind, compiled=compiled)

    def encode_prompt(prompt, max_sequence_length, **others):
        config = transformer.config
        like = dict(device=device, dtype=torch.bfloat16)
        shape = (len(prompt), max_sequence_length, config.joint_attention_dim)
        pooled = torch.randn(len(prompt), config.pooled_projection_dim, **like)
        return torch.randn(shape, **like), pooled, torch.zeros(max_sequence_length, 3, **like)

    pipe.encode_prompt = encode_prompt
    return pipe


def bench_full(rows: list[dict], modes: list[dict], *, repeats: int, limit: float, device) -> dict:
    """A row a mode, projected to steps of 4 concept and 4 retain prompts. Rows that are there
    already are kept; after `limit` seconds no new mode begins."""
    began = time.perf_counter()
    matrix = torch.randn(MATMUL, MATMUL, device=device, dtype=torch.bfloat16)
    (seconds,) = clock(10, lambda: matrix @ matrix)
    flops = 2 * MATMUL**3 / statistics.median(seconds)
    not_measured = []
    meta = random_transformer("meta")
    pipe = made = None
    for mode in modes:
        if any(mode.items() <= row.items() for row in rows):
            continue
        left = limit - (time.perf_counter() - began)
        if left < 0:
            not_measured.append(mode)
            continue
        form, size, batch = mode["form"], mode["size"], mode["micro_batch"]
        call = models.CALLS[models.SCHNELL] | dict(height=size, width=size)
        names = ("sec_per_step", "share_of_peak", "peak_gib", "minutes_400_steps")
        try:
            if made != mode["quantize"]:
                pipe = made = None  # first make room
                torch.cuda.empty_cache()
                pipe = random_pipeline(device, mode["quantize"], mode["compile"])
                made = mode["quantize"]
            torch.cuda.empty_cache()
            row = measure(pipe, form, batch, call, repeats=repeats, limit=left)
        except torch.cuda.OutOfMemoryError:
            rows.append(mode | dict.fromkeys(names, "out of memory"))
            continue
        step = row["seconds"] * 8 / batch
        load = memory.load_of(FluxPipeline, call)
        forward = memory.forward_flops(meta, load)  # of nf4's packed weights: too few
        share = 8 * load.calls * PASSES[form] * forward / step / flops
        weights = torch.cuda.memory_allocated() if device == "cuda" else 0
        peak = row["mib"] / 1024 + weights / 2**30
        figures = (round(step, 2), round(share, 3), round(peak, 1), round(400 * step / 60, 1))
        rows.append(mode | dict(zip(names, figures, strict=True)))
    show("FLUX.1-schnell's size, 4 sampling steps, 8 pictures a step", rows)
    return dict(matmul_tflops=round(flops / 1e12, 1), full=rows, not_measured=not_measured)


def write_random(transformer, folder: Path, max_shard_size="2GB") -> None:
    """A stored pipeline of a transformer alone, of random bytes, a shard in memory at a time."""
    index = dict(_class_name="FluxPipeline", transformer=["diffusers", type(transformer).__name__])
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    folder = folder / "transformer"
    transformer.save_config(folder)
    state = transformer.state_dict()
    names = dict(filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(state, **names, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            noise = bytearray(os.urandom(state[name].nbytes))
            shard[name] = torch.frombuffer(noise, dtype=torch.bfloat16).view(state[name].shape)
        save_file(shard, folder / file)
    index = dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index), "utf-8"
    )


def bench_fold() -> dict:
    """artefacts.save_folded with every 20th gate closed, in a temporary folder that goes whatever
    happens."""
    transformer = random_transformer("meta")
    where = tempfile.gettempdir()
    size = sum(p.nbytes for p in transformer.parameters())
    free = shutil.disk_usage(where).free
    if free < 2.02 * size:
        found = f"{free / 2**30:.1f} GiB free, {2.02 * size / 2**30:.1f} needed"
        raise UserError(f"--fold: {where} has {found}; TMPDIR names another disk")
    sites = erase.gate_sites(transformer)
    mask = {name: (torch.arange(site.units) % 20 > 0).float() for name, site in sites.items()}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an ordinary kill cleans up too
    with tempfile.TemporaryDirectory(prefix="bench_fold_") as folder:
        folder = Path(folder)
        out = folder / "out"
        write_random(transformer, folder)
        start = time.perf_counter()
        peak = anonymous_peak(lambda: artefacts.save_folded(str(folder), FluxPipeline, mask, out))
        row = dict(stored_gib=round(size / 2**30, 1), files=len(list(out.glob("*.safetensors"))))
        row |= dict(seconds=round(time.perf_counter() - start, 1))
        row |= dict(peak_mib_beside_mapped_files=round(peak / 2**20, 1))
    return dict(fold=show("folding and saving FLUX.1-schnell's size, bf16", [row]))
