"""JAX: `jax.custom_vjp`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diagconv_tf.backends.jax import compiled_for


def through(operand: Any, tensor: Any, seed: Any) -> Any:
    return _identity(tensor, seed, operand)


# The operand is a value and an argument, so that JAX meets the same function every time.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _identity(tensor: Any, seed: Any, operand: Any) -> Any:
    return tensor


def _forward(tensor: Any, seed: Any, operand: Any) -> tuple:
    return tensor, seed


def _backward(operand: Any, seed: Any, gradient: Any) -> tuple:
    return operand(gradient, seed), None


_identity.defvjp(_forward, _backward)


def take(tensor: Any, indices: Any, axis: int) -> Any:
    index = (slice(None),) * axis + (indices,)
    return tensor.at[index].get(mode="promise_in_bounds", unique_indices=True)


#: Rows that are written at a time: a few, which stay in the cache of a CPU.
_ROWS = 4


def place_columns(values: Any, columns: Any, count: int) -> Any:
    def place(values: Any) -> Any:
        zeros = jnp.zeros((values.shape[0], count), values.dtype)
        return zeros.at[:, columns].set(values, mode="promise_in_bounds", unique_indices=True)

    rows = values.shape[0]
    if compiled_for(values) != "cpu" or rows % _ROWS:
        return place(values)
    # XLA's CPU compiler writes column by column, far apart in memory: 2048 x 2048 numbers,
    # 128 of the columns, take 16 ms at once and 6 ms in parts.
    parts = values.reshape(rows // _ROWS, _ROWS, values.shape[1])
    return jax.lax.map(place, parts).reshape(rows, count)


def largest(magnitudes: Any, k: int) -> Any:
    # XLA's CPU compiler sorts all numbers where a slice follows `top_k` directly (128 x 4096
    # numbers: 85 ms against 12 ms).
    values, indices = jax.lax.optimization_barrier(jax.lax.top_k(magnitudes, k))
    least, last = values[..., -1:], indices[..., -1:]
    # Of equal numbers `top_k` takes those with the lower indices.
    before = jnp.arange(magnitudes.shape[-1], dtype=last.dtype) <= last
    return (magnitudes > least) | ((magnitudes == least) & before)


def largest_columns(totals: Any, k: int) -> Any:
    return jax.lax.top_k(totals, k)[1]
