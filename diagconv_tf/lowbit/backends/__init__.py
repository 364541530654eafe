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


def matmul(first: Any, second: Any, *, transposed: str) -> Any:
    """The product of two matrices, of which one is transposed: `"first"` or `"second"`."""
    if _NAME == "tensorflow":
        # `keras.ops.matmul` would make a transposed copy.
        return _BACKEND.matmul(first, second, transposed)
    if transposed == "first":
        return keras.ops.matmul(keras.ops.transpose(first), second)
    return keras.ops.matmul(first, keras.ops.transpose(second))


def take(tensor: Any, indices: Any, axis: int) -> Any:
    """What is at `indices` along `axis`; they are different, and all inside."""
    return _BACKEND.take(tensor, indices, axis)


def place_columns(values: Any, columns: Any, count: int) -> Any:
    """A matrix of `count` columns: `values` at the indices `columns`, zeros elsewhere.

    Args:
        values: of shape (rows, k); `rows` is known when a program is compiled.
        columns: integers, different and smaller than `count`, of shape (k,).
        count: number of columns.
    """
    return _BACKEND.place_columns(values, columns, count)


def largest(magnitudes: Any, k: int) -> Any:
    """Which elements are among the k largest along the last axis, as booleans.

    Of equal ones those with the lower indices are: exactly k are chosen.

    Args:
        magnitudes: numbers, none of them NaN.
        k: not more than there are.
    """
    return _BACKEND.largest(magnitudes, k)


def largest_columns(totals: Any, k: int) -> Any:
    """Indices of the k largest numbers along the last axis; of equal ones, the lower.

    Args:
        totals: numbers, none of them NaN.
        k: not more than there are.
    """
    return _BACKEND.largest_columns(totals, k)
