"""The network on which meProp (arXiv 1711.06528, section 4) was tried with MNIST: MLP-500."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from recipes import data
from recipes.data.image_data import ImageData, channels_first
from recipes.data.sources import SyntheticExamples

#: Of each hidden layer.
UNITS = 500


@dataclasses.dataclass(frozen=True, eq=False)
class PixelStatistics:
    """What standardises gray images.

    Attributes:
        mean: of each pixel over all images, float32, (height · width,).
        variance: of all pixels around their means; one number, because pixels that are the
            same in all images have none of their own.
    """

    mean: np.ndarray
    variance: float

    @classmethod
    def of(cls, images: ImageData, input_range: str) -> PixelStatistics:
        """The statistics of all training images; the same in each of several processes.

        Args:
            images: from `data.load`.
            input_range: a key of `data.pipeline.INPUT_RANGES`.
        """
        # Of synthetic images the training set is one batch.
        is_synthetic = isinstance(images.train, SyntheticExamples)
        source = images.test if is_synthetic else images.train
        count, total, squares = 0, np.float64(0.0), np.float64(0.0)
        batches = data.evaluation_dataset(
            dataclasses.replace(images, test=source), 1024, input_range=input_range
        )
        for pictures, _ in batches.as_numpy_iterator():
            gray = pictures.mean(axis=1 if channels_first() else -1, dtype="float64")
            gray = gray.reshape(len(gray), -1)
            count += len(gray)
            total = total + gray.sum(axis=0)
            squares = squares + (gray**2).sum(axis=0)
        mean = total / count
        return cls(mean.astype("float32"), float((squares / count - mean**2).mean()))


def mlp(
    input_shape: Sequence[int],
    classes: int,
    *,
    width_multiplier: float = 1.0,
    dropout: float = 0.0,
    statistics: PixelStatistics | None = None,
    classifier_activation: str | None = "softmax",
    name: str = "mlp",
) -> keras.Model:
    """Two dense layers of 500 units with ReLU, and a dense layer for the classes.

    The pixels are gray: the mean of the three channels.

    Args:
        input_shape: Of one image, in the order of `keras.config.image_data_format()`.
        classes: Number of classes, at least 1.
        width_multiplier: Factor of the numbers of hidden units, which are rounded down.
        dropout: Rate after each hidden layer, in [0, 1); 0 makes no layer.
        statistics: Of the training images, to standardise pixels; `None` takes them as
            they are.
        classifier_activation: As of `recipes.models.mobilenet_v1`.
        name: Of the model.

    Returns:
        An uncompiled functional model, (batch, *input_shape) → (batch, classes)
        probabilities or logits.

    Raises:
        ValueError: If `width_multiplier` leaves no unit.
    """
    units = int(UNITS * width_multiplier)
    if units < 1:
        raise ValueError(
            f"Expected a `width_multiplier` that leaves at least one of the {UNITS} units. "
            f"Received: width_multiplier={width_multiplier}"
        )
    inputs = layers.Input(shape=tuple(input_shape))
    # The mean over channels in stock layers, which every format of files knows.
    if channels_first():
        channels, height, width = input_shape
        flat, steps_last = (channels, height * width), "channels_last"
    else:
        height, width, channels = input_shape
        flat, steps_last = (height * width, channels), "channels_first"
    x = layers.Reshape(flat, name="flatten")(inputs)
    x = layers.GlobalAveragePooling1D(data_format=steps_last, name="gray")(x)
    if statistics is not None:
        x = layers.Normalization(
            mean=statistics.mean,
            variance=np.full_like(statistics.mean, statistics.variance),
            name="standardize",
        )(x)
    for number in (1, 2):
        x = layers.Dense(units, activation="relu", name=f"dense_{number}")(x)
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout_{number}")(x)
    compute = keras.config.dtype_policy().compute_dtype
    # Logits of half precision have too few digits: see `recipes.models`.
    dtype = "float32" if compute in ("float16", "bfloat16") else compute
    outputs = layers.Dense(
        classes, activation=classifier_activation, name="predictions", dtype=dtype
    )(x)
    return keras.Model(inputs, outputs, name=name)
