"""`.weights.h5` files that stock Keras reads and writes.

Keras names the groups in them by the layers' class names
(`keras/src/saving/saving_lib.py`, `_save_container_state`), so the files of a
rewritten model's own `save_weights` fit rewritten models only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

import keras

from diagconv_tf import files
from diagconv_tf.class_swap import LayerState, swapped
from diagconv_tf.model_tree import check_built, walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, stock_class

_SUFFIX = ".weights.h5"


def save_weights(
    model: keras.Model,
    path: str | os.PathLike,
    overwrite: bool = False,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> None:
    """Writes a model's weights as the stock model would.

    Other threads may call the model meanwhile.

    Args:
        model: a built Keras model, rewritten or not.
        path: a file name that ends with `.weights.h5`.
        overwrite: whether an existing file may be replaced.
        rules: those that `rewrite` was given. They matter only where a
            replacement is no subclass of this package's layers.

    Raises:
        FileExistsError: if `path` exists, unless `overwrite`.
        ValueError: if the suffix is another, the folder does not exist, or
            `model` is not a built Keras model.
    """
    check_built(model)
    path = files.check_output(path, overwrite, _SUFFIX)
    with _stock_class_names(model, rules):
        files.write_aside(path, model.save_weights)


def load_weights(
    model: keras.Model,
    path: str | os.PathLike,
    skip_mismatch: bool = False,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> None:
    """Reads weights that the stock model, or `save_weights`, has written.

    Args:
        model: a built Keras model, rewritten or not.
        path: a `.weights.h5` file.
        skip_mismatch: as in `keras.Model.load_weights`.
        rules: as for `save_weights`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its weights do not fit, or `model` is not a built Keras
            model.
    """
    check_built(model)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Expected a weights file. Received: {path}, which does not exist")
    with _stock_class_names(model, rules):
        model.load_weights(path, skip_mismatch=skip_mismatch)


@contextlib.contextmanager
def _stock_class_names(model: keras.Model, rules: Sequence[Rule]) -> Iterator[None]:
    """Inside, the classes of a model's layers have the names of the stock classes.

    Each layer gets a subclass of its class with another name and nothing else, so
    that whoever calls the model meanwhile runs the same code as before.
    """
    renamed: dict[type, type] = {}

    def change(state: LayerState) -> LayerState:
        own = state.layer_class
        if own not in renamed:
            name = stock_class(own, rules).__name__
            body = {"__module__": own.__module__}
            renamed[own] = own if name == own.__name__ else type(name, (own,), body)
        return dataclasses.replace(state, layer_class=renamed[own])

    with swapped([place.layer for place in walk_layers(model)], change):
        yield
