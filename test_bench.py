"""What bench.py prints is what it says: its counters against known sizes, its second form of the
backward against erase.py's, its files against diffusers'."""

import json
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import artefacts
import bench
import costs
import fullsize
import models
from families import FAMILIES
from sites import closed_slices

CALL = models.CALLS["tiny/flux"]
SMALL = dict(num_layers=1, num_single_layers=1, num_attention_heads=1)


@pytest.mark.parametrize("form", ["step", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow_with_sampling_steps(family, form):
    """Where each step is computed again, more sampling steps keep their latents and little else: at
    a rate of less than 5 % of all bytes alive from 4 to 28 steps."""
    pipe, call = FAMILIES[family]()
    models.remember_prompts(pipe)
    row = costs.growth(pipe, form, 2, call, steps=(2, 10))
    assert -0.05 < row["growth_beside_latents"] < 0.05 * 8 / 24, row


def test_memory_of_the_embedded_model_from_4_to_28_steps(pipe):
    """The same within 5 % beside the latents; plain autograd's grows with the number of steps."""
    for form in ("step", "both"):
        row = costs.growth(pipe, form, 2, CALL)
        assert abs(row["growth_beside_latents"]) < 0.05, row
    assert costs.growth(pipe, "none", 2, CALL, steps=(1, 6))["growth_beside_latents"] > 4


def test_the_two_backward_loop_gives_the_same_gradients(pipe):
    """costs.py's reference, with two backward passes a step, gives erase.py's gradients."""
    found = []
    for form in ("two", "step"):
        gates = costs.open_gates(pipe)
        costs.backward(pipe, form, gates, 2, CALL)
        found.append(gates)
    for site, gate in found[0].items():
        assert torch.allclose(gate.grad, found[1][site].grad, rtol=1e-4, atol=1e-7), site


def test_tables_hold_the_committed_results(capsys):
    files = sorted(models.HERE.glob("bench/*.json"))
    assert files and bench.main(["--table", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    for file in files:
        results = json.loads(file.read_text())
        for part in ("forms", "growth", "full", "fold", "quantized"):
            for row in results.get(part, []):
                assert f"| {' | '.join(map(str, row.values()))} |" in printed


WRONG = [
    (["--full"], "--full: needs a CUDA GPU"),
    (["--compile"], "--compile: goes with --full"),
    (["--repeats", "0"], "--repeats: must be at least 1"),
    (["--micro_batch", "0"], "--micro_batch: must be at least 1"),
    (["--sizes", "100"], "--sizes: must be at least 16 and a multiple of 16"),
    (["--table", "none.json"], "--table: cannot read none.json"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_loops_of_evaluation_and_attacks_are_timed(pipe):
    """The two throughputs call what evaluate.py and attacks.py call."""
    assert all(row["per_second"] > 0 for row in bench.bench_loops(pipe, 1, 2))


def test_flops_of_full_size_flux():
    """The formula for a forward at 512 pixels, against torch's count of its operations."""
    transformer = fullsize.random_transformer("meta")
    like = dict(device="meta", dtype=torch.bfloat16)
    inputs = dict(hidden_states=(1, 1024, 64), encoder_hidden_states=(1, 256, 4096))
    inputs |= dict(pooled_projections=(1, 768), timestep=(1,), img_ids=(1024, 3), txt_ids=(256, 3))
    with FlopCounterMode(display=False) as counter:
        transformer(**{name: torch.empty(shape, **like) for name, shape in inputs.items()})
    assert abs(fullsize.forward_flops(512) / counter.get_total_flops() - 1) < 0.02


def test_full_bench_goes_on_where_it_stopped(monkeypatch):
    """bench.py --full on the CPU at a small size: a row a mode, by the stock sampler, nothing begun
    after the limit, and known rows kept."""
    monkeypatch.setattr(fullsize, "SCHNELL", SMALL)
    monkeypatch.setattr(fullsize, "MATMUL", 64)
    modes = []
    for size in (16, 32):
        for form in ("none", "both"):
            mode = dict(quantize="none", size=size, form=form)
            modes.append(mode | dict(compile=False, micro_batch=2, cap_gib=0))
    how = dict(repeats=1, device="cpu")
    late = fullsize.bench_full([dict(known=1)], modes, limit=0, **how)
    assert late["not_measured"] == modes and late["full"] == [dict(known=1)]
    rows = fullsize.bench_full([], modes, limit=100, **how)["full"]
    for row, mode in zip(rows, modes, strict=True):
        assert mode.items() <= row.items() and row["sec_per_step"] > 0
    assert fullsize.bench_full(list(rows), modes, limit=100, **how)["full"] == rows


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
        transformer = fullsize.random_transformer("meta")
        for name, dim, index in closed_slices(transformer, mask):
            wanted[name].index_fill_(dim, index, 0)
        for name, tensor in load_file(folded).items():
            assert torch.equal(tensor.view(torch.int16), wanted[name].view(torch.int16)), name

    monkeypatch.setattr(artefacts, "save_folded", checked)
    assert bench.main(["--fold"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["fold"]
    assert row["files"] == 1 and not any(tmp_path.iterdir())

    def fails(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(artefacts, "save_folded", fails)
    assert bench.main(["--fold"]) == 1 and not any(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert bench.main(["--fold"]) == 2 and not any(tmp_path.iterdir())
    assert "--fold: " in capsys.readouterr().err


def test_write_random_is_sharded_as_diffusers_does(tmp_path, monkeypatch):
    """The random folder has the files and the index that save_pretrained writes."""
    monkeypatch.setattr(fullsize, "SCHNELL", SMALL)
    transformer = fullsize.random_transformer("cpu")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    transformer.save_pretrained(theirs, max_shard_size="2MB")
    ours.mkdir()
    fullsize.write_random(transformer.to("meta"), ours, "2MB")
    ours /= "transformer"
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    name = "diffusion_pytorch_model.safetensors.index.json"
    index, expected = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
    assert index["weight_map"] == expected["weight_map"]
    assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]


def test_anonymous_peak_sees_an_allocation():
    """The sampler counts 64 MiB that live for a moment."""
    assert costs.anonymous_peak(lambda: torch.ones(2**24).sum()) > 60 * 2**20
