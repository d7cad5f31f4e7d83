"""For all tests: a CPU, no network, the embedded pipeline and one small run of erase.py."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the oracles are fp32 on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # no waiting for a hub that is not there
import pytest
import torch

import models

os.chdir(models.HERE)  # as its commands are run
torch.set_num_threads(1)  # the models are small: a second thread costs more than it does

# A few of the retain prompts, 11 to train on and 8 to test: all of them take seconds to encode.
temporary = tempfile.TemporaryDirectory()
FEW_RETAIN = Path(temporary.name, "retain.csv")
header, *rows = (models.HERE / "prompts/tiny/retain.csv").read_text().splitlines()
tests = [row for row in rows if row.endswith("test")]
FEW_RETAIN.write_text("\n".join([header, *rows[:11], *tests[:8]]))

# Four steps, at rates that close some gates by then.
QUICK = ["--model", "tiny/flux", "--concept", "gun", "--steps", "4", "--batch", "2"]
QUICK += ["--retain_batch", "2", "--save_every", "1", "--lr_ffn", "3", "--lr_norm", "3"]
QUICK += ["--harm", "0.001", "--heal", "0", "--retain", str(FEW_RETAIN)]
# On CPUs `accelerate launch` starts one process only.
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# In the kit's folder, on one thread a process: the same bits each time.
PLACE = dict(cwd=models.HERE, env=os.environ | dict(OMP_NUM_THREADS="1"))


def command(script, *arguments, launch=()):
    """The real command line as a list; launch: what stands between python and the script."""
    return [sys.executable, *launch, script, *map(str, arguments)]


def run(script, *arguments, launch=()):
    """Runs it to the end: in this process, for the imports take seconds, unless launch says how."""
    line = command(script, *arguments, launch=launch)
    main = getattr(importlib.import_module(script.removesuffix(".py")), "main", None)
    if launch or not main:
        return subprocess.run(line, capture_output=True, text=True, **PLACE)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with contextlib.chdir(models.HERE):
            code = main(line[2:])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="session")
def pipe():
    return models.load_pipeline(models.TINY, "cpu")


@pytest.fixture(scope="session")
def erased(tmp_path_factory):
    """The folder of a four-step run."""
    folder = tmp_path_factory.mktemp("erased") / "gun"
    done = run("erase.py", *QUICK, "--out_dir", folder)
    assert done.returncode == 0, done.stderr
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert 0 < json.loads(last)["closed"] < 1
    return folder
