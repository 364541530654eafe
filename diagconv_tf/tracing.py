"""The input shapes that a model's layers meet, found without computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from diagconv_tf import keras_internals
from diagconv_tf.text import summarize_error


class UntraceableError(ValueError):
    """A model's inputs cannot be made up, or its call fails on them."""


def record_input_shapes(
    model: keras.Model, layers: Sequence[keras.layers.Layer], inputs: Any
) -> list[list[tuple]]:
    """The shapes of the first argument of every call of `layers`.

    The model is called on symbolic tensors: shapes are inferred, values are
    neither computed nor changed.

    Args:
        model: a built model.
        layers: layers inside it.
        inputs: what `symbolic_inputs` returns.

    Returns:
        For each of `layers`, a list with one shape per call, in order.

    Raises:
        UntraceableError: if the model's call fails; the message says how.
    """
    shapes: list[list[tuple]] = [[] for _ in layers]
    with contextlib.ExitStack() as stack:
        for layer, calls in zip(layers, shapes, strict=True):
            stack.enter_context(_recording(layer, calls))
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
    """Symbolic inputs of known shape for `model`.

    Args:
        model: a built model.
        batch_size: images in a batch; None means that of `data`, else 1.
        data: a sample batch as `fit` takes it, `x`, `(x, y)` or
            `(x, y, sample_weight)`; None takes the shapes the model declares.

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
    """The inputs of a functional or sequential model, in their structure, else None.

    Sizes may be open.
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
    """The call of a model, so that Keras infers shapes through all of it.

    A model's own `compute_output_spec` stops at layers that know their output
    shape without calling what is inside them.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model
        self.error: Exception | None = None

    def call(self, inputs: Any) -> Any:
        try:
            return self.model(inputs)
        except Exception as error:
            # Keras wraps it in advice on operations, which a model's user does
            # not write.
            self.error = error
            raise


@contextlib.contextmanager
def _recording(layer: keras.layers.Layer, calls: list[tuple]) -> Iterator[None]:
    own = vars(layer).get("call")
    call = layer.call

    def record(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        calls.append(tuple(first.shape))
        return call(*args, **kwargs)

    vars(layer)["call"] = record
    try:
        yield
    finally:
        if own is None:
            del vars(layer)["call"]
        else:
            vars(layer)["call"] = own
