"""JSON for people and for `diff`: what fits on a line is on one line."""

from __future__ import annotations

import json
from typing import Any

_LINE = 100


def dumps(value: Any, indent: int = 0) -> str:
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
    if not deep and len(line) + indent <= _LINE:
        return line
    inner = " " * (indent + 2)
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(k))}: {dumps(v, indent + 2)}" for k, v in value.items()]
        start, end = "{", "}"
    else:
        parts = [dumps(v, indent + 2) for v in value]
        start, end = "[", "]"
    body = ",\n".join(inner + part for part in parts)
    return f"{start}\n{body}\n{' ' * indent}{end}"
