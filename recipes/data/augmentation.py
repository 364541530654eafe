"""Random changes of training images, as functions of the numbers that they are given.

Keras's own augmentation layers are not used: they draw from a generator that
counts its calls, so what an image gets would depend on all that came before it.
Here the numbers come from tf.random's stateless functions of (seed, epoch,
position in the epoch).
"""

from __future__ import annotations

import math

from recipes.data.host import tf
from recipes.data.pictures import Window

AUGMENTATIONS = ("auto", "none", "crop", "crop_flip", "inception")

# Of the picture's shorter side, in evaluation after "inception": that is 256
# pixels when the network sees 224 (Szegedy et al., arXiv 1409.4842, section 7,
# take crops of 224 from a shorter side of 256; so do most since).
EVALUATION_FRACTION = 0.875

# Szegedy et al., arXiv 1409.4842, section 6.
AREA = (0.08, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)
# Windows that are drawn until one fits. Nearly all pictures need one or two.
TRIES = 10


def resolve(augmentation: str, image_size: int) -> str:
    """What `augmentation` means for images of this size; `"auto"` is resolved.

    - `"none"`: the centre of the picture.
    - `"crop"`: of that, a window of the same size after padding with zeros
      (black) by an eighth of the size on every side, as He et al. (arXiv
      1512.03385, section 4.2) do for CIFAR.
    - `"crop_flip"`: half of these are mirrored as well.
    - `"inception"`: a window of 8 to 100 % of the picture's area and an aspect
      ratio from 3/4 to 4/3 (Szegedy et al., arXiv 1409.4842, section 6), scaled;
      half of them mirrored.
    - `"auto"`: `"crop_flip"` below 64 pixels, else `"inception"`.

    Raises:
        ValueError: For any other.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"Expected `augmentation` to be one of {', '.join(AUGMENTATIONS)}. "
            f"Received: augmentation={augmentation!r}"
        )
    if augmentation == "auto":
        return "crop_flip" if image_size < 64 else "inception"
    return augmentation


def shift_and_flip(images: tf.Tensor, draws: tf.Tensor, *, margin: int, flip: bool) -> tf.Tensor:
    """Moves each image by up to `margin` pixels, fills with zeros, and mirrors half of them.

    Args:
        images: (batch, size, size, 3) of any dtype.
        draws: float32 in [0, 1), (batch, 3): of the row, the column and the mirroring.
        margin: In pixels.
        flip: Whether to mirror those whose last number is below one half.

    Returns:
        As `images`.
    """
    size = images.shape[1]
    around = [margin, margin]
    padded = tf.pad(images, [[0, 0], around, around, [0, 0]])
    corners = tf.cast(draws[:, :2] * (2 * margin + 1), tf.int32)
    rows = tf.range(size) + corners[:, :1]
    columns = tf.range(size) + corners[:, 1:]
    if flip:
        columns = tf.where(draws[:, 2:] < 0.5, tf.reverse(columns, axis=[1]), columns)
    padded_rows = tf.gather(padded, rows, axis=1, batch_dims=1)
    return tf.gather(padded_rows, columns, axis=2, batch_dims=1)


def random_window(draws: tf.Tensor) -> Window:
    """A window of random area, aspect ratio and place, all of them within the picture.

    The area is uniform in `AREA`, the logarithm of the aspect ratio (width by
    height) in that of `ASPECT_RATIO`, so that upright and lying ones are
    equally likely. The first of the drawn windows that fits is taken. Where
    none does (a picture much longer than high, or the reverse), it is the
    largest in the middle with an allowed ratio.

    Args:
        draws: float32 in [0, 1), (`TRIES`, 4): of area, ratio, row and column.
    """

    def window(height, width):
        sides = tf.cast(tf.stack([height, width]), tf.float32)
        area = tf.reduce_prod(sides) * (AREA[0] + draws[:, 0] * (AREA[1] - AREA[0]))
        low, high = (math.log(ratio) for ratio in ASPECT_RATIO)
        ratio = tf.exp(low + draws[:, 1] * (high - low))
        tried = tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], axis=1)))
        fits = tf.reduce_all((tried >= 1) & (tried <= sides), axis=1)
        first = tf.argmax(fits)  # 0 where none fits.
        chosen = tf.where(tf.reduce_any(fits), tried[first], _largest(sides))
        free = sides - chosen
        drawn = tf.minimum(tf.floor(draws[first, 2:] * (free + 1)), free)
        corner = tf.where(tf.reduce_any(fits), drawn, tf.floor(free / 2))
        return tf.cast(tf.concat([corner, chosen], axis=0), tf.int32)

    return window


def _largest(sides):
    """(height, width) of the largest part whose ratio is in `ASPECT_RATIO`."""
    height, width = sides[0], sides[1]
    low, high = ASPECT_RATIO
    largest = tf.stack([tf.minimum(height, width / low), tf.minimum(width, height * high)])
    return tf.maximum(tf.round(largest), 1.0)
