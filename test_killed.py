"""A script killed at a random moment and started again ends in an uninterrupted run's bytes.

KILLS=25 pytest test_killed.py -n 0 -s    # kills in all, in turn of the four scripts
"""

import fcntl
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import attacks
import erase
import evaluate
import models
import promptfiles
import trials
from conftest import QUICK, run

sys.path.append(str(models.HERE / "tiny"))
import train
import world

KILLS = int(os.environ.get("KILLS", 2))
SCRIPTS = (attacks, evaluate, train, erase)
TIMES = rb'"sec_per_step": [\d.e-]+|"seconds": [\d.]+|"(drawing|all)": [\d.]+|in [\d.]+ minutes'


def arguments_of(script, erased, out: Path) -> list[str]:
    if script is erase:
        healing = ["--heal", "1", "--heal_steps", "3", "--refit", "0"]
        return [*QUICK, "--steps", "3", *healing, "--out_dir", str(out)]
    if script is train:
        steps = [f"--{stage}_steps=2" for stage in train.STAGES]
        return [f"--work={out}/work", f"--out={out}/model", "--pictures=64", *steps]
    few = "--num_prompts 2 --attack plain synonyms mma"
    if script is evaluate:
        few = "--num_pictures 4 --per_neighbour 0 --fid none"
    return [str(erased), "--device", "cpu", *few.split(), "--out_dir", str(out)]


def make_small():
    """Less of everything, so that a run takes a second or two."""
    trials.SEEDS = 1
    trials.UNRELATED = 2
    attacks.EFFORT = dict(quick=dict(mma=(2, 4)))
    held_out = promptfiles.Rows.held_out

    def few(rows):
        return {kind: part[:2] for kind, part in held_out(rows).items()}

    promptfiles.Rows.held_out = few
    train.SAVE_EVERY = 1
    train.text_corpus = lambda: ["a gun on a red background"] * 9
    # the emoji font may not be here
    world.sprite = lambda _, side: Image.new("RGBA", (side, side), "red")


def start(script, arguments) -> int:
    """The process that runs it: a fork, so that it begins at once."""
    process = os.fork()
    if not process:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(script.main(arguments))
    return process


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict:
    """{file: its bytes without times}; neither hidden files nor tiny/train.py's checkpoints, whose
    pickles differ in which strings they share, are results."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_file() and "/." not in f"/{name}" and file.suffix != ".pt":
            found[name] = re.sub(TIMES, b"", file.read_bytes())
    return found


def kill_again_and_again(script, kills: range, erased: Path, out: Path) -> list[str]:
    """What the killed and resumed runs left otherwise than one that was left alone."""
    arguments = arguments_of(script, erased, out)
    began = time.time()
    assert exit_code(start(script, arguments)) == 0
    seconds = time.time() - began
    wanted = contents(out)
    assert wanted

    different = []
    for kill in kills:
        shutil.rmtree(out)
        moment = random.Random(kill).uniform(0, 0.9 * seconds)
        killed = start(script, arguments)
        time.sleep(moment)
        os.kill(killed, signal.SIGKILL)
        code = exit_code(killed)
        if code:  # not finished before
            resume = ["--resume"] if script is erase and out.exists() else []
            code = exit_code(start(script, [*arguments, *resume]))
        found = contents(out)
        names = [name for name in wanted | found if wanted.get(name) != found.get(name)]
        if code or names:
            different.append(f"after {moment:.2f} of {seconds:.2f} s: exit code {code}, {names}")
    equal = len(kills) - len(different)
    print(f"{script.__name__}: {equal} of {len(kills)} killed runs ended equal")
    return different


@pytest.mark.parametrize("number", range(min(KILLS, len(SCRIPTS))))
def test_killed_runs_end_in_the_same_bytes(number, erased, tmp_path):
    """In a process of its own, for it forks, and no thread may hold a lock then."""
    done = run(Path(__file__).name, number, erased, tmp_path / "out")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_has_its_folders_to_itself(tmp_path, capfd):
    """A second training in the same work folder is refused."""
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train.main([f"--work={tmp_path}", f"--out={tmp_path}/model"]) == 2
    assert f"another process is writing to {tmp_path}" in capfd.readouterr().err


if __name__ == "__main__":
    number, erased, out = sys.argv[1:]
    make_small()
    kills = range(int(number), KILLS, len(SCRIPTS))
    different = kill_again_and_again(SCRIPTS[int(number)], kills, Path(erased), Path(out))
    sys.exit("\n".join(different) or 0)
