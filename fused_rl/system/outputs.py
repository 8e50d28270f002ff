"""Files of a run and lines of a command: a folder is tried before the work begins, a file is whole
when it is there, and what a file or a library says reaches a terminal as one printable line.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

# More than the demo and the benchmark leave behind, and than any config.json has.
ROOM = 2**20
LARGEST_JSON = 2**24
LONGEST_LINE = 400


class UnusableFolder(ValueError):
    """A folder that results cannot be written to."""


class Unwritable(RuntimeError):
    """A result that could not be written, though its folder had been tried."""


def try_folder(folder: Path, *names: str) -> None:
    """Makes a folder for results and finds out whether these files can be written there.

    Raises:
        UnusableFolder: they cannot: it is a file, read-only or full, or has a folder of that name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".try-") as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise UnusableFolder(f"results need a folder, and {folder} is none") from error
    except OSError as error:
        raise UnusableFolder(
            f"cannot write results to {folder}: {error.strerror or error}"
        ) from error
    for path in (folder / name for name in names):
        if path.is_dir():
            raise UnusableFolder(f"cannot write results to {path}: it is a folder")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, with the suffix of path. What is there at the end takes path's place at
    once; where something fails, an older file stays as it was.

    Raises:
        Unwritable: the file cannot be written.
    """
    partial = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        try:
            yield partial
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise Unwritable(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, content: Any) -> None:
    """Writes it with replacing, into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than 16 MiB, no JSON, or nested too deep for Python.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def one_line(text: str) -> str:
    """The text for a terminal: control characters escaped, its middle left out if it is long."""
    text = " ".join(text.split())
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def flush() -> None:
    """All that was printed is on its way, or is given up, so that nothing complains at exit.

    Raises:
        BrokenPipeError: nobody reads.
        Unwritable: the disk is full.
    """
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise Unwritable(f"cannot write to stdout: {error.strerror}") from error
