"""Writes files aside and renames them: a reader never meets half of one.

A path that is a symbolic link stays one: what it points to is replaced.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any


def check_output(path: str | os.PathLike, overwrite: bool, suffix: str = "") -> pathlib.Path:
    """Returns `path` if a file or folder can be written there; asked before long work.

    Args:
        path: where the output shall be.
        overwrite: whether an existing file or folder may be replaced.
        suffix: the required end of the name.

    Raises:
        ValueError: if the suffix differs or the folder does not exist.
        FileExistsError: if `path` exists and `overwrite` is False.
    """
    path = pathlib.Path(path)
    if not path.name.endswith(suffix):
        raise ValueError(f"Expected a path that ends with '{suffix}'. Received: {path}")
    if not _resolved(path).parent.is_dir():
        raise ValueError(f"Expected a path in an existing folder. Received: {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True (--overwrite) replaces it")
    return path


def write_aside(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Lets `write(another_path)` create a file or folder, and renames it to `path`.

    The other path is in the same folder and has the same suffix. If `write`
    raises, nothing is left of it, and what was at `path` stays.
    """
    path = _resolved(path)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(str(aside))
        replace(path, aside)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


def replace(path: str | os.PathLike, written: str | os.PathLike) -> None:
    """Renames the file or folder `written` to `path`, in the same file system.

    Replaces what was at `path`; puts it back if the renaming fails.

    Raises:
        OSError: if the renaming fails.
    """
    path = _resolved(path)
    if not path.is_dir():
        os.replace(written, path)
        return
    # A folder cannot be renamed over a full one.
    old = path.with_name(f".{os.getpid()}-old-{path.name}")
    os.rename(path, old)
    try:
        os.rename(written, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` and the end of its last line to a file."""
    write_aside(path, lambda aside: pathlib.Path(aside).write_text(text + "\n"))


def append_line(path: str | os.PathLike, line: str) -> None:
    """Adds a line to a text file, which is created if it is missing.

    First ends a last line that has no end. The line is on the disk when the
    function returns, so that it survives a crash of the machine.
    """
    path = pathlib.Path(path)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        content += b"\n"

    def write(aside: str) -> None:
        with open(aside, "wb") as file:
            file.write(content + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    write_aside(path, write)


def _resolved(path: str | os.PathLike) -> pathlib.Path:
    """The path that `path` leads to through symbolic links."""
    return pathlib.Path(os.path.realpath(path))
