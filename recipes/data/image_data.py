"""A data set as the recipes see it, and how a part of it is set aside for the test."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import keras
import numpy as np

from recipes.data.sources import Examples, SyntheticExamples

# Of every split made here. Not the seed of the training: runs with different
# seeds are tested on the same images.
SPLIT_SEED = 0
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class ImageData:
    """Training and test images of one data set.

    Args:
        name: As given to `load`.
        train: The images to train on.
        test: The images to test on; none of them is in `train`.
        class_names: One per class, in the order of the labels.
        image_size: Height and width in pixels that the batches have.
        skipped_files: Paths of the image files that were left out because they
            cannot be decoded.
    """

    name: str
    train: Examples | SyntheticExamples
    test: Examples
    class_names: tuple[str, ...]
    image_size: int
    skipped_files: tuple[str, ...] = field(default=(), repr=False)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def digest(self) -> str:
        """The same text for sets with the same classes and examples, as far as one can tell.

        Pictures are not read, and a stream not at all: of these it tells the
        numbers alone.
        """
        parts = [part.digest() for part in (self.train, self.test)]
        return json.dumps([self.class_names, parts])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image in a batch, in Keras's image data format."""
        size = self.image_size
        return (3, size, size) if channels_first() else (size, size, 3)


def channels_first() -> bool:
    """Whether Keras's image data format puts the channels before height and width."""
    return keras.config.image_data_format() == "channels_first"


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test images, in the classes' own proportions.

    Args:
        labels: int32, (count,).

    Raises:
        ValueError: If there are too few images for one of each class in both parts.
    """
    from sklearn.model_selection import train_test_split

    try:
        return train_test_split(
            np.arange(len(labels)),
            test_size=TEST_FRACTION,
            random_state=SPLIT_SEED,
            stratify=labels,
        )
    except ValueError as error:
        raise ValueError(
            f"Expected enough images of each class to set {TEST_FRACTION:.0%} aside for the test. "
            f"Received: {np.bincount(labels).tolist()} images of the classes ({error})"
        ) from error
