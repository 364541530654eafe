"""Lets a model be called symbolically and leaves no trace of the call."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from diagconv_tf import keras_internals


@contextlib.contextmanager
def preserved_state(model: keras.Model) -> Iterator[None]:
    """Restores on exit what a symbolic call of `model` may change.

    That is: the attributes of the model and of all layers inside it, with the
    content of their lists, dicts and sets (losses are such a list); Keras's
    global state, such as the counters of layer names and the global seed
    generator; and the states of Python's and NumPy's random-number generators.
    Keras itself keeps variables, and so the states of seed generators and
    metrics, unchanged in symbolic calls.
    """
    content: dict[int, tuple[Any, Any]] = {}
    for layer in keras_internals.flatten_layers(model):
        _record(vars(layer), content)
    _record(keras_internals.global_state(), content)
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        for container, before in content.values():
            _restore(container, before)


def _record(value: Any, content: dict[int, tuple[Any, Any]]) -> None:
    """Adds `value`, if it is a container, and those inside it to `content`."""
    if not isinstance(value, dict | list | set | tuple) or id(value) in content:
        return
    # Not `copy`: some containers of Keras and TensorFlow copy what is inside.
    copied: Any = dict(value.items()) if isinstance(value, dict) else list(value)
    content[id(value)] = value, copied
    for inner in copied.values() if isinstance(copied, dict) else copied:
        _record(inner, content)


def _restore(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        now = dict(container.items())
        for key in now.keys() - before.keys():
            _method(container, "__delitem__")(key)
        for key, value in before.items():
            if key not in now or now[key] is not value:
                _method(container, "__setitem__")(key, value)
    elif isinstance(container, list):
        if not _same(list(container), before):
            _method(container, "__setitem__")(slice(None), before)
    elif isinstance(container, set) and container != set(before):
        _method(container, "clear")()
        _method(container, "update")(before)


def _same(now: list[Any], before: list[Any]) -> bool:
    # By identity, since comparing tensors computes.
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _method(container: Any, name: str) -> Callable[..., Any]:
    """A method of the built-in class of `container`.

    Keras's containers report changes to the layer that owns them, which refuses
    them once it is built. TensorFlow's hold their content in another container.
    """
    if not keras_internals.is_tensorflow_container(container):
        for kind in (OrderedDict, dict, list, set):
            if isinstance(container, kind):
                return getattr(kind, name).__get__(container)
    return getattr(container, name)
