"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import PIL.Image

from recipes.data.image_data import ImageData, stratified_split
from recipes.data.sources import PixelExamples


def load_digits(name: str, image_size: int) -> ImageData:
    """1797 images of 8x8 pixels, scaled up; one fifth of each class is the test set."""
    from sklearn import datasets

    digits = datasets.load_digits()
    # The 8x8 images hold counts from 0 to 16.
    pixels = np.stack(
        [
            PIL.Image.fromarray((image * (255 / 16)).astype("uint8"))
            .convert("RGB")
            .resize((image_size, image_size), PIL.Image.Resampling.BILINEAR)
            for image in digits.images
        ]
    )
    labels = digits.target.astype("int32")
    train, test = (PixelExamples(pixels[part], labels[part]) for part in stratified_split(labels))
    return ImageData(name, train, test, tuple(str(x) for x in digits.target_names), image_size)
