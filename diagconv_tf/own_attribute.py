"""An attribute of one object for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def own_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner` itself has the attribute, before its class; then what it had.

    Nothing that watches attributes (Keras, TensorFlow, PyTorch) hears of it.
    """
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)
