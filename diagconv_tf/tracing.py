"""Finds the input shapes of a model's layers by a symbolic call, without computing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from diagconv_tf import keras_internals
from diagconv_tf.class_swap import instance_attribute
from diagconv_tf.text import summarize_error


class UntraceableError(ValueError):
    """The sizes of a model's inputs are not known, or its symbolic call fails."""


def record_input_shapes(
    model: keras.Model, layers: Sequence[keras.layers.Layer], inputs: Any
) -> list[list[tuple]]:
    """Returns the shapes of the first argument of every call of `layers`.

    Calls the model on symbolic tensors, which infers shapes and computes no
    values. What the model's `call` changes stays changed: see `preserved_state`.

    Args:
        model: a built model.
        layers: layers inside it.
        inputs: what `symbolic_inputs` returns.

    Returns:
        For each of `layers`, a list with one shape per call, in order.

    Raises:
        UntraceableError: if the model's call fails; the message gives the cause.
    """
    shapes: list[list[tuple]] = [[] for _ in layers]
    with contextlib.ExitStack() as stack:
        for layer, calls in zip(layers, shapes, strict=True):
            recorder = _recorder(layer.call, calls)
            stack.enter_context(instance_attribute(layer, "call", recorder))
        operation = _Call(model)
        try:
            operation.compute_output_spec(inputs)
        except Exception as error:  # A user's `call` may raise anything.
            cause = operation.error or error
            raise UntraceableError(
                f"calling the model on symbolic inputs failed: {summarize_error(cause)}"
            ) from error
    return shapes


def symbolic_inputs(model: keras.Model, batch_size: int | None = None, data: Any = None) -> Any:
    """Returns symbolic inputs of known shape for `model`.

    Args:
        model: a built model.
        batch_size: images in a batch; None means that of `data`, else 1.
        data: a sample batch as `fit` takes it, `x`, `(x, y)` or
            `(x, y, sample_weight)`; None uses the shapes the model declares.

    Raises:
        UntraceableError: if a size is not known, and `data` is not given.
    """
    if data is not None:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return keras.tree.map_structure(lambda value: _symbolic(value, batch_size), x)
    declared = declared_inputs(model)
    if declared is None:
        declared = _inputs_as_built(model)
    return keras.tree.map_structure(lambda value: _symbolic(value, batch_size or 1), declared)


def declared_inputs(model: keras.Model) -> Any:
    """The symbolic inputs of a functional or sequential model, else None.

    Their sizes may be open (None).
    """
    if isinstance(model, keras.Sequential):
        return model.inputs[0] if keras_internals.declares_inputs(model) else None
    return model.input if getattr(model, "inputs", None) else None


def _inputs_as_built(model: keras.Model) -> Any:
    build_config = model.get_build_config() or {}
    if "input_shape" not in build_config:
        raise UntraceableError(
            "the model does not declare its inputs; pass a sample batch as `data`"
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor(shape, dtype=model.compute_dtype),
        build_config["input_shape"],
    )


def _symbolic(value: Any, batch_size: int | None) -> keras.KerasTensor:
    if not hasattr(value, "shape"):
        value = keras.ops.convert_to_numpy(value)
    shape = tuple(value.shape)
    if batch_size is not None and shape:
        shape = (batch_size, *shape[1:])
    if None in shape:
        raise UntraceableError(
            f"the model leaves a size of its inputs open, {tuple(value.shape)}; pass a sample "
            "batch as `data`"
        )
    return keras.KerasTensor(shape, dtype=keras.backend.standardize_dtype(value.dtype))


class _Call(keras.Operation):
    """Lets Keras infer shapes through all the calls inside a model's call.

    A model's own `compute_output_spec` stops at layers that know their output
    shape without calling the layers inside them.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model
        self.error: Exception | None = None

    def call(self, inputs: Any) -> Any:
        try:
            return self.model(inputs)
        except Exception as error:
            # Keras wraps it in advice for authors of operations.
            self.error = error
            raise


def _recorder(call: Callable[..., Any], calls: list[tuple]) -> Callable[..., Any]:
    """`call`, which adds the shape of its first argument to `calls`."""

    def record(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        calls.append(tuple(first.shape))
        return call(*args, **kwargs)

    return record
