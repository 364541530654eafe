"""Text for people: tables, JSON, and other packages' errors."""

from __future__ import annotations

import io
import json
import re
import sys
from typing import Any

from rich.console import Console, RenderableType

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_ERROR = 500

#: Keras begins with where it happened, and says what happened further down.
_WHERE = "Exception encountered when calling"


#: Longest line of JSON that `to_readable_json` writes, where values can be broken.
_LINE_LENGTH = 100


def as_text(renderable: RenderableType) -> str:
    """As wide as the terminal; as wide as it needs to be where nobody watches."""
    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def to_readable_json(value: Any, indent: int = 0) -> str:
    """`value` as JSON; objects and lists that are short take one line.

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
    """The class of an error, and the first lines of its message that say what is wrong.

    Args:
        error: an error, whose message may have many lines, with colours.
        lines: how many of them at most.
    """
    text = _COLOURS.sub("", str(error))
    all_lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in all_lines if not line.startswith(_WHERE)] or all_lines
    return f"{type(error).__name__}: {' '.join(telling[:lines])[:_LONGEST_ERROR]}"
