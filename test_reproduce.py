"""Tables from runs, with the real commands' places taken by a script that writes their results."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import reproduce
import tables

FAKE = """
import json, pathlib, sys, time
line = sys.argv[1:]
place = pathlib.Path(line[line.index("--out_dir") + 1] if "--out_dir" in line else line[-1])
place.mkdir(parents=True, exist_ok=True)
if line[0] == "erase.py":
    if (place / "metrics.jsonl").exists() != ("--resume" in line):
        sys.exit("begun twice")
    (place / "metrics.jsonl").write_text("")
    if "1" in line and not "--resume" in line:
        sys.exit("killed")
    (place / "mask.safetensors").write_text("")
else:
    file = place / "results.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    time.sleep(0.3)
    name = line[line.index("--compare") + 1]
    results[name] = dict(acc=dict(rate=0.25 if name.endswith("0") else 0.75), ssim=0.5)
    file.write_text(json.dumps(dict(results=results)))
"""


def test_a_table(tmp_path, monkeypatch, capsys):
    """A killed run is named and the others go on; the same command resumes it and starts nothing
    that is done; --list says what is missing. Runs train at once, but are scored in turn: the fake
    evaluate.py would lose rows."""
    (tmp_path / "fake.py").write_text(FAKE)
    popen = reproduce.subprocess.Popen

    def fake(line, **how):
        return popen([sys.executable, str(tmp_path / "fake.py"), *line[1:]], **how)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(Popen=fake))
    monkeypatch.setitem(tables.TABLES, "topics", {"ours": "", "paper": "--preset paper"})
    flags = ["topics", "--concepts", "gun", "--seeds", "0", "1", "--out", str(tmp_path / "out")]
    args = reproduce.parse_args(flags)
    with pytest.raises(reproduce.UserError, match="2 runs failed"):
        reproduce.run(args)
    assert "| gun | ours | 1 | 0.25 | - |" in capsys.readouterr().out
    reproduce.run(reproduce.parse_args([*flags, "--list"]))
    assert "topics   4 runs; 4 commands missing" in capsys.readouterr().out
    reproduce.run(args)
    out = capsys.readouterr().out
    assert out.count("python erase.py") == out.count("--resume") == 2
    assert "| gun | ours | 2 | 0.5 (0.25-0.75) | - |" in out
    reproduce.run(args)
    assert "python" not in capsys.readouterr().out
    took = json.loads((tmp_path / "out/flux/gun/ours_1.json").read_text())
    assert list(took) == ["erase.py", "evaluate.py"] and took["erase.py"]["gib"] > 0
    assert "seconds" not in took["erase.py"]  # it was begun twice
    again = next(run for *_, run in reproduce.planned("topics", args) if run.make[4] == "1")
    shutil.rmtree(again.folder)
    assert not reproduce.start(again, again.make)  # killed; what was measured before is not of it
    assert [line[0] for line in reproduce.commands("topics", again, args)] == [
        "erase.py",
        "evaluate.py",
    ]
    (again.folder / "mask.safetensors").write_text("")
    assert [line[0] for line in reproduce.commands("topics", again, args)] == ["evaluate.py"]
    reproduce.run(args)
    shutil.rmtree(tmp_path / "out/flux/gun/ours_0")

    def missing(table):
        runs = [run for *_, run in reproduce.planned("topics", args)]
        return [len(reproduce.commands(table, run, args)) for run in runs]

    assert missing("topics") == [2, 0, 0, 0] and missing("attacks") == [3, 1, 1, 1]

    reproduce.run(args)
    note = tmp_path / "out/flux/gun/ours_0.json"
    took = json.loads(note.read_text())
    took["erase.py"]["kit"] = "earlier"
    note.write_text(json.dumps(took))
    reproduce.run(args)
    assert "Made with several versions of the code: " in capsys.readouterr().out


def test_an_oracle_is_attacked_with_targets_of_its_own_text(tmp_path):
    """Its encoders are not the base's: --oracle tells the searches so, and its row reads that."""
    args = reproduce.parse_args(["attacks", "--concepts", "gun", "--out", str(tmp_path)])
    run = tables.Run(tmp_path, tmp_path / "oracle", [], ("gun",))
    (line,) = [line for line in reproduce.commands("attacks", run, args) if "attacks.py" in line]
    assert line[line.index("--oracle") + 1] == line[1] == str(run.folder)
    place = run.beside(".attacks")
    place.mkdir()
    rates = {name: dict(rate=rate) for name, rate in (("erased", 0.5), ("oracle", 0.25))}
    mma = {name: dict(asr_k=rate) for name, rate in rates.items()}
    results = dict(union_text_asr=rates, attacks=dict(mma=mma))
    (place / "results.json").write_text(json.dumps(results))
    assert tables.attacked(run) == dict(union=0.25, mma=0.25)
    assert tables.attacked(run._replace(make=["erase.py"])) == dict(union=0.5, mma=0.5)


def test_every_table_is_planned(tmp_path, capsys):
    """Each variant's command parses, and equal flags are one run; a wrong name is one line."""
    args = reproduce.parse_args(["--list", "--seeds", "0", "--out", str(tmp_path)])
    for table in tables.TABLES:
        rows = reproduce.planned(table, args)
        assert rows, table
        for _, _, run in rows:
            script = __import__(run.make[0].removesuffix(".py"))
            if "--compose" not in run.make:
                script.parse_args(run.make[1:])
    steps = {variant: run.folder for variant, _, run in reproduce.planned("steps", args)}
    gates = {variant: run.folder for variant, _, run in reproduce.planned("gates", args)}
    assert steps["200 steps"] == gates["1 %"] != steps["50 steps"]
    args = reproduce.parse_args(["topics", "--concepts", "gun", "--out", str(tmp_path)])
    rows = reproduce.planned("topics", args)
    assert [variant for variant, _, _ in rows].count("uce") == 1  # a closed form has no seed
    assert [variant for variant, _, _ in rows].count("esd") == 3
    args.model = "black-forest-labs/FLUX.1-schnell"  # whose default preset is the paper's
    for table in tables.TABLES.keys() - {"many", "topics"}:
        made = [run.make for *_, run in reproduce.planned(table, args)]
        assert all("--preset" in line for line in made if line[:1] == ["erase.py"]), table
    for wrong, error in (
        (["nix"], "TABLE: no table 'nix'"),
        (["many", "--concepts", "gun"], "--concepts: the table many has its own"),
        (["many", "--model", args.model], "TABLE: many is of concepts of the embedded models"),
        (["topics", "--model", "tiny/nix"], "--model: tiny/nix"),
        (["topics", "--concepts", "gun", "nix"], "--concepts: 'nix'"),
    ):
        with pytest.raises(reproduce.UserError, match=error):
            reproduce.run(reproduce.parse_args(wrong))
