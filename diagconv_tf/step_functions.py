"""The functions that Keras compiles for `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import functools
from typing import Any

import keras

from diagconv_tf.own_attribute import own_attribute

#: What `fit`, `evaluate` and `predict` run.
KINDS = ("train", "test", "predict")


def renew(model: keras.Model, kind: str) -> None:
    """Makes a model's function anew, to be traced with the layers of now.

    JAX finds what it has compiled by equal functions, and a model's `train_step`
    equals itself: as long as anybody holds the old function (the traceback of an
    interrupted `fit`, say) its program would go on. So Keras gets another step.

    Args:
        model: a model that has, or could make, the function.
        kind: one of `KINDS`.
    """
    step = getattr(model, f"{kind}_step")

    @functools.wraps(step)
    def another_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    with own_attribute(model, f"{kind}_step", another_step):
        getattr(model, f"make_{kind}_function")(force=True)
