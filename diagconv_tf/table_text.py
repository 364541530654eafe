"""Rich's tables as text."""

from __future__ import annotations

import io
import sys

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType) -> str:
    """As wide as the terminal; as wide as it needs to be where nobody watches."""
    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
