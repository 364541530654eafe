"""Seeds made of seeds: the order and the augmentation as functions of numbers."""

from __future__ import annotations

from recipes.data.host import tf


def fold_in(seed: tf.Tensor, number: int | tf.Tensor) -> tf.Tensor:
    """A seed that is a function of another and a number, and unrelated to either.

    Args:
        seed: int64, (2,).
        number: A scalar; may be symbolic.

    Returns:
        int64, (2,), for tf.random's stateless functions.
    """
    # The seed is drawn from as many values as the number's type has.
    return tf.random.experimental.stateless_fold_in(seed, tf.cast(number, tf.int64))
