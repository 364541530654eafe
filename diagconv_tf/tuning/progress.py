"""Progress of long work on standard error, with the time left; only for watchers."""

from __future__ import annotations

from typing import Any

import rich.progress
from rich.console import Console


class Progress:
    """A bar that is there as long as the context lasts; nothing without a terminal.

    Args:
        total: how many steps the work has.
    """

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("tuning {task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left:"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)

    def report(self, what: str, done: int) -> None:
        """Says what is being done, and how many steps lie behind."""
        self._bar.update(self._task, description=what, completed=done)

    def advance(self) -> None:
        """One step more is done."""
        self._bar.advance(self._task)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
