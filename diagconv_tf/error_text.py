"""Other people's errors in one line."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 500

#: Keras begins with where it happened, and says what happened further down.
_WHERE = "Exception encountered when calling"


def summary(error: BaseException, lines: int = 1) -> str:
    """The class of an error, and the first lines of its message that say what is wrong.

    Args:
        error: an error, whose message may have many lines, with colours.
        lines: how many of them at most.
    """
    text = _COLOURS.sub("", str(error))
    all_lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in all_lines if not line.startswith(_WHERE)] or all_lines
    return f"{type(error).__name__}: {' '.join(telling[:lines])[:_LONGEST]}"
