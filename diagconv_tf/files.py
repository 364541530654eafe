"""Files are written aside and renamed: a reader never meets half of one."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any


def check_output(path: str | os.PathLike, overwrite: bool, suffix: str = "") -> pathlib.Path:
    """`path`, if a file or folder can be written there; asked before long work.

    Args:
        path: where the output shall be.
        overwrite: whether what is there may be replaced.
        suffix: what the name must end with.

    Raises:
        ValueError: if the suffix is another or the folder does not exist.
        FileExistsError: if something is there and must not be replaced.
    """
    path = pathlib.Path(path)
    if not path.name.endswith(suffix):
        raise ValueError(f"Expected a path that ends with '{suffix}'. Received: {path}")
    if not path.parent.is_dir():
        raise ValueError(f"Expected a path in an existing folder. Received: {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True (--overwrite) replaces it")
    return path


def write_aside(path: pathlib.Path, write: Callable[[str], Any]) -> None:
    """Lets `write(another_path)` make a file or folder, and renames it to `path`.

    The other name is in the same folder and has the same suffix; nothing is
    left of it when `write` raises, and what was at `path` stays.
    """
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


def replace(path: pathlib.Path, written: pathlib.Path) -> None:
    """Renames the file or folder `written` to `path`.

    What was at `path` is gone afterwards; where the renaming fails, it is back.

    Raises:
        OSError: if it fails.
    """
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


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file under another name and renames it."""
    write_aside(path, lambda aside: pathlib.Path(aside).write_text(text + "\n"))
