"""Measurements on disk, so that nothing is measured twice.

A contest is what was measured together, in the same rounds; each has one small JSON
file, which is written and read whole. So only times that were measured side by side are
compared. The file's name is a hash of all that the times depend on, which the file also
holds in words. An unusable folder or file costs one warning and a new measurement.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import platformdirs
from absl import logging

from diagconv_tf import files
from diagconv_tf.measurements import Measured
from diagconv_tf.text import summarize_error, to_readable_json

#: Environment variable that names the folder if the argument does not.
ENVIRONMENT_VARIABLE = "DIAGCONV_CACHE_DIR"

_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """One file of the cache: what was measured, and where; and name → times of one contest."""

    path: pathlib.Path
    key: Mapping[str, Any]
    measured: Mapping[str, Measured]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        measured = {name: m.to_dict() for name, m in self.measured.items()}
        return {"path": str(self.path), "key": dict(self.key), "measured": measured}


def cache_folder(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """`cache_dir`, else what `DIAGCONV_CACHE_DIR` names, else the user's cache."""
    chosen = cache_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    return pathlib.Path(chosen or platformdirs.user_cache_dir("diagconv_tf")).expanduser()


class Cache:
    """Contests by key.

    A key is a dict in JSON's types. It must hold all that times depend on; where
    nothing tells what they depend on the key is None, and nothing is kept.

    Args:
        cache_dir: as for `cache_folder`; created when something is written.
        refresh: whether `read` finds nothing, so that everything is measured again.
    """

    def __init__(self, cache_dir: str | os.PathLike | None = None, refresh: bool = False) -> None:
        self.folder = cache_folder(cache_dir)
        self.refresh = refresh
        self._warned = False

    def read(self, key: Mapping[str, Any] | None) -> dict[str, Measured]:
        """Name → times of the contest with this key; empty where there is none."""
        if key is None or self.refresh:
            return {}
        entry = self._read(self._path(key))
        return {} if entry is None else dict(entry.measured)

    def write(self, key: Mapping[str, Any] | None, measured: Mapping[str, Measured]) -> None:
        """Keeps a contest; it replaces the one that was there."""
        if key is None:
            return
        path = self._path(key)
        content = {"format": _FORMAT, **CacheEntry(path, key, measured).to_dict()}
        del content["path"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_text(path, to_readable_json(content))
        except OSError as error:
            self._warn("written", path, error)

    def entries(self) -> Iterator[CacheEntry]:
        """Yields all entries that can be read, in the order of their file names."""
        return filter(None, map(self._read, self._files()))

    def clear(self) -> int:
        """Removes all entries, readable or not, and returns how many they were.

        Raises:
            OSError: if one cannot be removed.
        """
        paths = self._files()
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _files(self) -> list[pathlib.Path]:
        # Only names that the cache gives: the folder may hold other files.
        try:
            return sorted(self.folder.glob("*-" + "[0-9a-f]" * 32 + ".json"))
        except OSError:
            return []

    def _path(self, key: Mapping[str, Any]) -> pathlib.Path:
        return self.folder / f"{key['what']}-{fingerprint(key)}.json"

    def _read(self, path: pathlib.Path) -> CacheEntry | None:
        """An entry; None, with a warning, where the file is not one, and where there is none."""
        try:
            fields = json.loads(path.read_text())
            measured = {name: Measured.from_dict(m) for name, m in fields["measured"].items()}
            if fields["format"] != _FORMAT or path != self._path(fields["key"]):
                raise ValueError("of another format, or not what its name says")
            return CacheEntry(path, fields["key"], measured)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn("read", path, error)
            return None

    def _warn(self, done: str, path: pathlib.Path, error: Exception) -> None:
        if not self._warned:
            logging.warning(
                "The cache of measurements cannot be %s, and what is missing is measured again: "
                "%s: %s",
                done,
                path,
                summarize_error(error),
            )
        self._warned = True


def fingerprint(value: Any) -> str:
    """A hash of something in JSON's types."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
