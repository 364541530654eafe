"""Keeps what TensorFlow says of drivers and CPU features off the screen."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
#: Fatal errors only; all others reach Python as exceptions.
_FATAL = "3"

#: Lines of the log of TensorFlow's C++ code, and the lines around it.
_LOG_LINE = re.compile(
    rb"[IWE]\d{4} |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWE] |"
    rb"WARNING: All log messages before absl::InitializeLog\(\)|"
    rb"To enable the following instructions:|Skipping registering GPU devices"
)


def silence_tensorflow_log() -> None:
    """Silences the log of TensorFlow, which must not have been imported yet.

    The log level silences TensorFlow while it works. While it is loaded, it
    writes some lines before it reads the level, past `sys.stderr`: these are
    taken out of what reaches the file descriptor. Keras may import TensorFlow
    at any time, with other backends too. A user who set the level sees everything.
    """
    if _LOG_LEVEL in os.environ or sys.stderr is None:
        return
    os.environ[_LOG_LEVEL] = _FATAL
    sys.meta_path.insert(0, _QuietTensorFlow())


class _QuietTensorFlow:
    """Import hook: finds TensorFlow as usual, and filters stderr while it is loaded."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "tensorflow" or self._asking:
            return None
        self._asking = True  # The others, this time.
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_quietly(module: types.ModuleType) -> None:
                with _filtered_stderr():
                    load(module)

            spec.loader.exec_module = load_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _filtered_stderr() -> Iterator[None]:
    """Shows on exit what was written to stderr, without the lines of TensorFlow's log."""
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            written.seek(0)
            for line in written:
                if not _LOG_LINE.match(line):
                    os.write(2, line)
