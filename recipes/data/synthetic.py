"""Images that cost nothing to read: one batch, on the device, again and again.

To time training steps alone. `fit` takes a `DataAdapter` as it is ("Allow
passing a custom data adapter", in Keras's `trainers/data_adapters`), and its
trainers take the arrays of one as they come: on TensorFlow the step is called
with the tensors and not with a tf.data iterator, on JAX `device_put` leaves an
array where it is, on PyTorch `convert_to_tensor` does. So no step copies
anything to the device; what remains is the Python loop of `fit`. tf.data cannot
do this: its datasets live in the main memory, and even
`prefetch_to_device` copies every batch, if in the background.

Not for `tf.distribute` strategies, which need a tf.data dataset.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import keras
import numpy as np

from diagconv_tf import keras_internals
from recipes.data.image_data import ImageData
from recipes.data.sources import PixelExamples, SyntheticExamples

CLASSES = 10
TRAIN_COUNT, TEST_COUNT = 512, 128


def load_synthetic(name: str, image_size: int) -> ImageData:
    """Ten random patterns in noise.

    Args:
        name: `"synthetic"` or `"synthetic:COUNT"`, with the nominal number of
            training images in an epoch.
        image_size: Height and width.

    Raises:
        ValueError: If COUNT is no positive integer.
    """
    _, colon, text = name.partition(":")
    if colon and not (text.isdecimal() and int(text) > 0):
        raise ValueError(
            "Expected `synthetic` or `synthetic:COUNT` with a positive number of images. "
            f"Received: {name}"
        )
    shape = (CLASSES, image_size, image_size, 3)
    patterns = np.random.default_rng(0).uniform(64, 192, size=shape).astype("float32")
    train = SyntheticExamples(int(text) if colon else TRAIN_COUNT, patterns, seed=1)
    # Other noise than in training.
    test = PixelExamples(*SyntheticExamples(TEST_COUNT, patterns, seed=2).draw(TEST_COUNT))
    return ImageData(
        name, train, test, tuple(f"pattern {number}" for number in range(CLASSES)), image_size
    )


def repeated_batch(batch: tuple) -> RepeatedBatch:
    """A data set for `fit` with the same batch at every step.

    Args:
        batch: Images and labels, arrays or TensorFlow's tensors; they are copied to
            the device once.

    Raises:
        MissingNameError: If Keras no longer has the base class that `fit` asks for.
    """
    bases = (RepeatedBatch, keras_internals.data_adapter_class())
    adapter = type("RepeatedBatchAdapter", bases, {})
    return adapter(tuple(keras.ops.convert_to_tensor(np.asarray(part)) for part in batch))


class RepeatedBatch:
    """The methods that Keras calls on a `DataAdapter`; `repeated_batch` creates one.

    Args:
        batch: Images and labels, on the device.
    """

    def __init__(self, batch: tuple):
        self.batch = batch

    def __iter__(self):
        return itertools.repeat(self.batch)

    def get_numpy_iterator(self) -> Iterable:
        """For the NumPy backend."""
        return itertools.repeat(tuple(keras.ops.convert_to_numpy(x) for x in self.batch))

    def get_tf_dataset(self) -> Iterable:
        """For TensorFlow: no dataset, but an iterable does."""
        return self

    def get_jax_iterator(self) -> Iterable:
        """For JAX."""
        return iter(self)

    def get_torch_dataloader(self) -> Iterable:
        """For PyTorch: no loader, but an iterable does."""
        return self

    @property
    def num_batches(self) -> None:
        """Unknown: there is no end."""
        return None

    @property
    def batch_size(self) -> int:
        """Images in the batch."""
        return len(self.batch[1])

    @property
    def has_partial_batch(self) -> bool:
        """No."""
        return False

    @property
    def partial_batch_size(self) -> None:
        """There is none."""
        return None
