"""`.weights.h5` files that stock Keras reads and writes.

Keras names the groups in them by the layers' class names, so those of a
rewritten model's own `save_weights` fit rewritten models only.
"""

from __future__ import annotations

import os

import keras

from diagconv_tf import files
from diagconv_tf.class_swap import stock_classes
from diagconv_tf.model_tree import check_built

_SUFFIX = ".weights.h5"


def save_weights(model: keras.Model, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes a model's weights as the stock model would.

    Args:
        model: a built Keras model, rewritten or not.
        path: a file name that ends with `.weights.h5`.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: if `path` exists, unless `overwrite`.
        ValueError: if the suffix is another, the folder does not exist, or
            `model` is not a built Keras model.
    """
    check_built(model)
    path = files.check_output(path, overwrite, _SUFFIX)
    with stock_classes(model):
        files.write_aside(path, model.save_weights)


def load_weights(model: keras.Model, path: str | os.PathLike, skip_mismatch: bool = False) -> None:
    """Reads weights that the stock model, or `save_weights`, has written.

    Args:
        model: a built Keras model, rewritten or not.
        path: a `.weights.h5` file.
        skip_mismatch: as in `keras.Model.load_weights`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its weights do not fit, or `model` is not a built Keras
            model.
    """
    check_built(model)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Expected a weights file. Received: {path}, which does not exist")
    with stock_classes(model):
        model.load_weights(path, skip_mismatch=skip_mismatch)
