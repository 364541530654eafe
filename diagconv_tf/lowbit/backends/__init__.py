"""What each backend contributes to low-bit training: gradients that pass through something,
and what differs under `tf.distribute`.

Each module has the functions below. They are no part of `diagconv_tf.backends`, which
knows convolutions only.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

_NAME = keras.backend.backend()

# The package can be imported on other backends; `diagconv_tf.backends` refuses to compute there.
_BACKEND: Any = (
    importlib.import_module(f"diagconv_tf.lowbit.backends.{_NAME}")
    if _NAME in ("tensorflow", "jax", "torch")
    else None
)


def through(operand: Any, tensor: Any, seed: Any = None) -> Any:
    """`tensor`, whose gradient is `operand(gradient, seed)`.

    It has no forward mode, and its second derivatives are those of the operand.

    Args:
        operand: a value (equal and hashable by what it computes), called in the backward
            pass with the gradient of the result and the seed. It returns a tensor of the
            gradient's shape and dtype.
        tensor: tensor.
        seed: integer tensor, or None where the operand needs none. It has no gradient.
    """
    return _BACKEND.through(operand, tensor, seed)


def of_this_replica(seed: Any) -> Any:
    """The seed of the replica that is being traced.

    A replica of a `tf.distribute` strategy has its own part of the batch, and a copy of
    the seed that all replicas have. Under a `keras.distribution` one program makes the
    noise of the whole batch, so that all replicas' parts of it differ already.
    """
    return _BACKEND.of_this_replica(seed) if _NAME == "tensorflow" else seed


def sum_over_replicas(tensor: Any) -> Any:
    """The sum of a tensor over all replicas of a `tf.distribute` strategy, on each of them.

    Under a `keras.distribution` one program computes with the whole batch.
    """
    return _BACKEND.sum_over_replicas(tensor) if _NAME == "tensorflow" else tensor


def outside_graphs() -> contextlib.AbstractContextManager:
    """Inside, values are computed at once, also where TensorFlow is tracing a graph."""
    return _BACKEND.outside_graphs() if _NAME == "tensorflow" else contextlib.nullcontext()


def update(
    variables: Sequence[keras.Variable], function: Callable[[int, Any, Any], Any], seed: Any
) -> None:
    """Assigns `function(index, value, seed)` to each variable, the same on all replicas."""
    if _NAME == "tensorflow":
        _BACKEND.update(variables, function, seed)
        return
    for index, variable in enumerate(variables):
        variable.assign(function(index, variable.value, seed))
