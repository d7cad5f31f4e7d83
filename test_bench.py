"""What bench.py prints is what it says. Oracles: known sizes, erase.py's backward, diffusers."""

import itertools
import json
import shutil
import tempfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import artefacts
import bench
import costs
import erase
import fullsize
import lowmem
import memory
import models
import realmodels
from families import FAMILIES
from sites import closed_slices

SMALL = dict(num_layers=1, num_single_layers=1, num_attention_heads=1)


@pytest.mark.parametrize("form", ["step", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow_with_sampling_steps(family, form):
    """Where each step is computed again, from 4 to 28 steps all bytes alive grow by the latents and
    at a rate of less than 5 %."""
    pipe, call = FAMILIES[family]()
    models.remember_prompts(pipe)
    row = costs.growth(pipe, form, 2, call, steps=(2, 10))
    assert -0.05 < row["growth_beside_latents"] < 0.05 * 8 / 24, row


def test_what_is_counted(pipe):
    """On tiny/flux that growth is within 5 %; plain autograd's memory grows with the steps. The
    reference, two backward passes a step, gives erase.py's gradients. Both loops are timed; a
    forward of full size has as many operations as torch counts; 64 MiB for a moment are seen."""
    call = models.CALLS["tiny/flux"]
    for form in ("step", "both"):
        assert abs(costs.growth(pipe, form, 2, call)["growth_beside_latents"]) < 0.05, form
    assert costs.growth(pipe, "none", 2, call, steps=(1, 6))["growth_beside_latents"] > 4
    found = dict(two=costs.open_gates(pipe), step=costs.open_gates(pipe))
    for form, gates in found.items():
        costs.backward(pipe, form, gates, 2, call)
    for site, gate in found["two"].items():
        assert torch.allclose(gate.grad, found["step"][site].grad, rtol=1e-4, atol=1e-7), site

    assert all(row["per_second"] > 0 for row in bench.bench_loops(pipe, 1, 2))
    transformer = fullsize.random_transformer("meta")
    inputs = dict(hidden_states=(1, 1024, 64), encoder_hidden_states=(1, 256, 4096))
    inputs |= dict(pooled_projections=(1, 768), timestep=(1,), img_ids=(1024, 3), txt_ids=(256, 3))
    like = dict(device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        transformer(**{name: torch.empty(shape, **like) for name, shape in inputs.items()})
    load = memory.Load(1024, 256, 1, 4)
    assert abs(memory.forward_flops(transformer, load) / counter.get_total_flops() - 1) < 0.02
    assert costs.anonymous_peak(lambda: torch.ones(2**24).sum()) > 60 * 2**20


def test_command_line(capsys):
    """Bad input is one line; --table prints the committed results."""
    for line, message in (
        ("--full", "--full: needs a CUDA GPU"),
        ("--compile", "--compile: goes with --full"),
        ("--repeats 0", "--repeats: must be between 1 and"),
        ("--micro_batch 0", "--micro_batch: must be between 1 and"),
        ("--sizes 100", "--sizes: must be between 16 and 8,192 and a multiple of 16"),
        ("--table none.json", "--table: none.json is no results file of bench.py"),
        ("--table LICENSE", "--table: LICENSE is no results file"),
        ("--table tiny/flux/model_index.json", "model_index.json is no results file"),
        ("--table /dev/zero", "--table: /dev/zero is no regular file"),
        ("--out bench", "--out: bench is no regular file"),
        ("--out LICENSE/x.json", "LICENSE is a file"),
        (
            "--plans --out bench/fold_cpu.json",
            "--out: bench/fold_cpu.json holds other results, not plans",
        ),
        ("--limit inf", "--limit: must be between 0 and 1,000,000, not inf"),
    ):
        assert bench.main(line.split()) == 2, line
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    files = sorted(models.HERE.glob("bench/*.json"))
    assert files and bench.main(["--table", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    for file, part in itertools.product(files, ("forms", "growth", "full", "fold", "quantized")):
        for row in json.loads(file.read_text()).get(part, []):
            assert f"| {' | '.join(map(str, row.values()))} |" in printed


def test_full_bench_goes_on_where_it_stopped(monkeypatch):
    """bench.py --full on the CPU at a small size: a row a mode, by the stock sampler, nothing begun
    after the limit, and known rows kept."""
    monkeypatch.setattr(fullsize, "SCHNELL", SMALL)
    monkeypatch.setattr(fullsize, "MATMUL", 64)
    how = dict(quantize="none", compile=False, micro_batch=2, cap_gib=0)
    sizes = itertools.product((16, 32), ("none", "both"))
    modes = [how | dict(size=size, form=form) for size, form in sizes]
    bench_full = partial(fullsize.bench_full, modes=modes, repeats=1, device="cpu")
    late = bench_full([dict(known=1)], limit=0)
    assert late["not_measured"] == modes and late["full"] == [dict(known=1)]
    rows = bench_full([], limit=100)["full"]
    for row, mode in zip(rows, modes, strict=True):
        assert mode.items() <= row.items() and row["sec_per_step"] > 0
    assert bench_full(list(rows), limit=100)["full"] == rows


def test_fold_bench_at_a_small_size(tmp_path, capsys, monkeypatch):
    """bench.py --fold on a small FLUX: what is folded has zeros for closed units, and all else bit
    for bit; nothing is left behind, be it done, failed or without disk space."""
    monkeypatch.setattr(fullsize, "SCHNELL", SMALL)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fullsize.signal, "signal", lambda *_: None)
    fold = artefacts.save_folded

    def checked(model, kind, mask, folder):
        fold(model, kind, mask, folder)
        (stored,), (folded,) = tmp_path.glob("*/transformer/*.safetensors"), folder.glob("*.saf*")
        wanted = load_file(stored)
        for name, dim, index in closed_slices(fullsize.random_transformer("meta"), mask):
            wanted[name].index_fill_(dim, index, 0)
        for name, tensor in load_file(folded).items():
            assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name

    def ends_with(code, target, name, value):
        monkeypatch.setattr(target, name, value)
        assert bench.main(["--fold"]) == code and not any(tmp_path.iterdir())
        return capsys.readouterr()

    def fails(*_):
        raise OSError("disk gone")

    printed = ends_with(0, artefacts, "save_folded", checked).out
    assert [row["files"] for row in json.loads(printed.splitlines()[-1])["fold"]] == [1]
    ends_with(1, artefacts, "save_folded", fails)
    no_space = SimpleNamespace(free=1000)
    assert "--fold: " in ends_with(2, shutil, "disk_usage", lambda path: no_space).err


def test_write_random_is_sharded_as_diffusers_does(tmp_path, monkeypatch):
    """The random folder has the files and the index that save_pretrained writes."""
    monkeypatch.setattr(fullsize, "SCHNELL", SMALL)
    transformer = fullsize.random_transformer("cpu")
    transformer.save_pretrained(tmp_path / "theirs", max_shard_size="2MB")
    (tmp_path / "ours").mkdir()
    fullsize.write_random(transformer.to("meta"), tmp_path / "ours", "2MB")
    found = []
    for folder in (tmp_path / "ours/transformer", tmp_path / "theirs"):
        index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        files = {file.name for file in folder.iterdir()}
        found.append((files, index["weight_map"], index["metadata"]["total_size"]))
    assert found[0] == found[1]


def test_real_models_by_their_configurations(tmp_path, capsys, monkeypatch):
    """README's models have the parameters that their pages say, and erase.py --dry_run plans them
    from configuration files alone; bench.py --plans has a row for each."""
    billions = {"schnell": 11.9, "dev": 11.9, "klein-4B": 3.9, "Turbo": 6.2, "turbo": 8.1}
    billions["Image"] = 20.4
    monkeypatch.setattr(lowmem, "free_memory", lambda device: 80 * 2**30)
    rows = bench_plans(tmp_path, capsys)
    assert [row["model"] for row in rows] == list(realmodels.MODELS)
    for row, said in zip(rows, billions.values(), strict=True):
        assert row["billions"] == said, row
        folder = tmp_path / "configs" / row["model"].split("/")[1]
        realmodels.write_configs(row["model"], folder)
        size = ["--num_inference_steps=4", "--height=512", "--width=512", "--device=cpu"]
        flags = ["--model", str(folder), "--concept", "gun", "--save", "mask", "--dry_run", *size]
        assert erase.main(flags) == 0
        plan = capsys.readouterr().out
        assert "preset paper" in plan and f"{row['gates']:,} gates" in plan, plan


def bench_plans(tmp_path, capsys) -> list[dict]:
    assert bench.main(["--plans", "--out", str(tmp_path / "plans.json")]) == 0
    capsys.readouterr()
    return json.loads((tmp_path / "plans.json").read_text())["plans"]
