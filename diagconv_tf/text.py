"""Renders text for people: tables, JSON, and other packages' errors."""

from __future__ import annotations

import io
import json
import re
import sys
from typing import Any

from rich.console import Console, RenderableType

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
#: Characters of an error's message that `summarize_error` keeps.
_LONGEST_ERROR = 500

#: Keras's first line says where an error occurred, and its message follows.
_WHERE = "Exception encountered when calling"
#: Keras puts a config of any length before the cause of a deserialization error.
_CAUSE = "Exception encountered: "

#: Longest line of JSON that `to_readable_json` writes, where values can be broken.
_LINE_LENGTH = 100


def as_text(renderable: RenderableType) -> str:
    """The text of a table: as wide as the terminal, or uncut where there is none."""
    width = None if sys.stdout.isatty() else 10_000
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def to_readable_json(value: Any, indent: int = 0) -> str:
    """Returns `value` as JSON; short objects and lists take one line.

    Args:
        value: of JSON's types.
        indent: spaces before the lines after the first.
    """
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list | tuple) or not value:
        return line
    nested = value.values() if isinstance(value, dict) else value
    deep = any(isinstance(v, dict) and v for v in nested)
    if not deep and len(line) + indent <= _LINE_LENGTH:
        return line
    inner = " " * (indent + 2)
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(str(k))}: {to_readable_json(v, indent + 2)}" for k, v in value.items()
        ]
        start, end = "{", "}"
    else:
        parts = [to_readable_json(v, indent + 2) for v in value]
        start, end = "[", "]"
    body = ",\n".join(inner + part for part in parts)
    return f"{start}\n{body}\n{' ' * indent}{end}"


def summarize_error(error: BaseException, lines: int = 1) -> str:
    """The class of an error, and the first lines of its message that give the cause.

    Args:
        error: an error, whose message may have many lines, with colours.
        lines: how many lines to keep at most.
    """
    text = _COLOURS.sub("", str(error)).rpartition(_CAUSE)[2]
    all_lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in all_lines if not line.startswith(_WHERE)] or all_lines
    return f"{type(error).__name__}: {' '.join(telling[:lines])[:_LONGEST_ERROR]}"
