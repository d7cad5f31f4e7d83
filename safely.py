"""Bad input ends in one line and exit code 2; a killed run leaves every file whole; output that
goes to a file can be read there."""

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from functools import partialmethod
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None

# No word about the absent torchvision, which nothing here needs; transformers reads it on import.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm


def lines_of(file):
    """For tqdm: what shows a bar's text as a new line, not over the line before."""
    start = [""]

    def show(text: str) -> None:
        file.write(start[0] + text.rstrip())
        file.flush()
        start[0] = "\n"

    return show


def make_output_plain() -> None:
    """No character is too much for a terminal that knows few; without a terminal a progress bar is
    a line at its start, each half minute and at its end."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        tqdm.status_printer = staticmethod(lines_of)
        tqdm.__init__ = partialmethod(tqdm.__init__, mininterval=30, maxinterval=30)
        tqdm.set_postfix_str = partialmethod(tqdm.set_postfix_str, refresh=False)


make_output_plain()


class UserError(Exception):
    """Bad input. Its text names the flag or the file; exit_code() prints it and returns 2."""


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def exit_code(script: str, run) -> int:
    """Calls run(). Bad input is one line and 2, a failure at run time one line and 1."""
    try:
        run()
    except (UserError, json.JSONDecodeError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, SafetensorError) as error:
        print(f"{script}: failed: {first_line(error)}", file=sys.stderr)
        return 2 if getattr(error, "errno", 0) == errno.ENAMETOOLONG else 1
    finally:
        release()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # else a process may be aborted as the others end
    return 0


MAY_BE_EMPTY = ("--neutral", "--negative_prompt")  # the empty prompt


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors: one line, no usage."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, args=None):
        """Refuses an empty value: an unset variable of the shell is no wish for the default."""
        words = sys.argv[1:] if args is None else list(args)
        for word, following in zip(words, [*words[1:], None], strict=False):
            flag, equals, value = word.partition("=")
            is_empty = not value if equals else following == ""
            if flag.startswith("--") and is_empty and flag not in MAY_BE_EMPTY:
                raise UserError(f"{flag}: is empty")
        return super().parse_args(words)

    def error(self, message):
        flag = re.match(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(flag[1], self._option_string_actions, 1) if flag else []
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(message[:300] + meant)


def number(kind: type, low: float, high: float = 10**6, multiple: int = 1):
    """For argparse's `type`: an int or a float between low and high, in plain digits."""

    def parse(text: str):
        if "_" in text or not text.isascii():  # which int() and float() would take
            raise ValueError
        value = kind(text)
        if not low <= value <= high or (multiple > 1 and value % multiple):
            limit = f"between {low} and {high:,}"
            if multiple > 1:
                limit += f" and a multiple of {multiple}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when kind(text) itself fails
    return parse


def check_regular(path: Path, flag: str = "") -> None:
    """Raises UserError for what is there and is no regular file: reading a pipe would wait for
    ever, a device might never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{flag}: {path} is no regular file".removeprefix(": "))


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: a killed run leaves either the old file or the new.
    Files get the mode that the user's umask gives, where safetensors would keep them private."""
    umask = os.umask(0)
    os.umask(umask)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as home:
        temporary = Path(home) / path.name
        write(temporary)
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file():
                file.chmod(0o666 & ~umask)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Atomically, utf-8; what a path has that is none is written as its code."""
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


# ------------------------------------------------------------------------------- output folders
UNFINISHED = ".unfinished_"  # write_atomically's folders are named so
claimed = []  # [(folder, the file descriptor of its lock, whether it was made for this run)]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, but for hidden files such as locks."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def check_link(path: Path) -> None:
    """Raises UserError for a link, which would lead out of an output folder."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link; nothing is written through one")


def remove_leftovers(folder: Path) -> None:
    """What killed runs were writing there."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def claim(folder: Path) -> None:
    """Makes an output folder this run's alone until release(). Of several processes the first does
    it for all. Raises UserError."""
    is_other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    if is_other or any(folder.resolve() == ours for ours, _, _ in claimed):
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            check_link(path)
        if fcntl:
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            claimed.append((folder.resolve(), lock, is_new))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process
    except BlockingIOError:
        os.close(claimed.pop()[1])
        raise UserError(f"--out_dir: another process is writing to {folder}") from None
    except OSError as error:
        raise UserError(f"--out_dir: cannot write to {folder}: {first_line(error)}") from None
    remove_leftovers(folder)


def release() -> None:
    """Ends all claims; a folder in which nothing was written goes."""
    while claimed:
        folder, lock, is_new = claimed.pop()
        with contextlib.suppress(OSError):
            if is_new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
        os.close(lock)
