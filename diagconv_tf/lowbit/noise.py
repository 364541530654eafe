"""Noise that is a function of a seed and an index, the same numbers on every backend.

A layer draws a seed in its forward pass and makes the noise in the backward pass. So
nothing of the output's size is kept in between, and JAX, which allows no change of state
in a backward pass, can do it too.

The generator hashes a counter. TensorFlow's own stateless generator takes a hundred times
as long under XLA on a CPU (108 ms against 1.0 ms for 262 144 numbers).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.lowbit import backends

# Not every backend multiplies unsigned integers; signed ones have the same bits.
_WORD = "int32" if keras.backend.backend() == "torch" else "uint32"


class NoiseSource(keras.random.SeedGenerator, keras.Operation):
    """The seeds of a layer's noise: a new one in every step, on every replica.

    Keras tracks it as any seed generator: its state is part of `layer.variables`, not of
    `layer.weights`. As an operation it also has a place of its own in Keras's files, so
    that a loaded model goes on with the noise where the saved one stopped. Stock layers
    and `get_weights` know nothing of it.

    Args:
        seed: an integer; None draws one, which `keras.utils.set_random_seed` decides.
    """

    def __init__(self, seed: int | None = None) -> None:
        keras.Operation.__init__(self, name="noise")
        keras.random.SeedGenerator.__init__(self, seed, name="noise")

    def draw(self) -> Any:
        """The next seed, as `uniform` takes it."""
        return backends.of_this_replica(self.next())

    def save_own_variables(self, store: Any) -> None:
        store["0"] = ops.convert_to_numpy(self.state)

    def load_own_variables(self, store: Any) -> None:
        # A file of the stock model has none.
        if "0" in store:
            self.state.assign(np.asarray(store["0"]))


def as_seed(seed: int) -> np.ndarray:
    """A seed for `uniform`, from one number."""
    return np.array([seed & 0x7FFFFFFF, 0], "int32")


def uniform(shape: tuple, seed: Any) -> Any:
    """Uniform numbers between -1/2 and 1/2.

    They are `(h + 1/2) / 2**23 - 1/2` for 23 bits h of a hash: symmetric, and exact in
    float32. The hash is MurmurHash3's finaliser (A. Appleby, `fmix32`) of the index,
    twice, with a key of the seed's before each.

    Args:
        shape: sizes, ints or scalar tensors; fewer than 2**32 elements.
        seed: integer tensor of shape (2,): a number, and a count of steps.

    Returns:
        A float32 tensor of `shape`.
    """
    seed = ops.cast(seed, _WORD)
    first_key = _mix(ops.add(_mix(seed[1]), seed[0]))
    second_key = _mix(ops.add(ops.bitwise_xor(first_key, _word(0x9E3779B9)), seed[1]))
    size = math.prod(shape) if all(isinstance(n, int) for n in shape) else ops.prod(list(shape))
    index = ops.cast(ops.arange(size, dtype="int32"), _WORD)
    hashed = _mix(ops.add(_mix(ops.bitwise_xor(index, first_key)), second_key))
    # Through int32, because not every device turns unsigned integers into floats.
    numbers = ops.cast(ops.cast(_shift(hashed, 9), "int32"), "float32")
    return ops.reshape(ops.subtract(ops.multiply(ops.add(numbers, 0.5), 2.0**-23), 0.5), shape)


def _mix(word: Any) -> Any:
    word = ops.multiply(ops.bitwise_xor(word, _shift(word, 16)), _word(0x85EBCA6B))
    word = ops.multiply(ops.bitwise_xor(word, _shift(word, 13)), _word(0xC2B2AE35))
    return ops.bitwise_xor(word, _shift(word, 16))


def _shift(word: Any, count: int) -> Any:
    """`word >> count`, with zeros from the left."""
    shifted = ops.right_shift(word, _word(count))
    # The sign bit of signed integers comes in from the left.
    return ops.bitwise_and(shifted, _word(0xFFFFFFFF >> count)) if _WORD == "int32" else shifted


def _word(value: int) -> Any:
    return ops.convert_to_tensor(_bits(value))


@functools.cache
def _bits(value: int) -> np.ndarray:
    return np.array(value, "uint32").view(_WORD)
