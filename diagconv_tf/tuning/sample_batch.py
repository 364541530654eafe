"""A batch to train on, for timing: given, or synthetic, to fit the model and its loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf import tracing


@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """What `train_on_batch` takes, on the device.

    Attributes:
        x: inputs.
        y: targets, or None.
        sample_weight: or None.
        synthetic: which of `"x"` and `"y"` are synthetic.
    """

    x: Any
    y: Any
    sample_weight: Any
    synthetic: tuple[str, ...]


def check_synthetic_inputs(model: keras.Model, batch_size: int) -> None:
    """Refuses models for which `tune` needs `data`.

    Raises:
        ValueError: if a size is not known, or an input takes integers, whose
            range the model does not say.
    """
    for tensor in keras.tree.flatten(tracing.symbolic_inputs(model, batch_size)):
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise ValueError(
                "Expected `data`, a sample batch, for a model without synthetic inputs. "
                f"Received: data=None, and the input '{tensor.name}' of dtype {tensor.dtype}"
            )


def sample_batch(model: keras.Model, batch_size: int, data: Any = None) -> SampleBatch:
    """A batch of `batch_size` for a compiled model.

    Args:
        model: a built model; its loss tells which targets fit.
        batch_size: images in the batch. `data` of another size is cut, or
            repeated.
        data: as `fit` takes a batch: `x`, `(x, y)` or `(x, y, sample_weight)`.
            What is missing is synthetic: inputs normally distributed; targets
            uniform between 0.1 and 0.9, of the outputs' shapes; or class
            numbers, for sparse losses.

    Raises:
        ValueError: if the inputs cannot be synthetic.
    """
    rng = np.random.default_rng(0)
    x, y, weight = keras.tree.map_structure(
        lambda value: _resized(value, batch_size),
        keras.utils.unpack_x_y_sample_weight(data),
    )
    synthetic = []
    if x is None:
        check_synthetic_inputs(model, batch_size)
        x = keras.tree.map_structure(
            lambda tensor: _to_tensor(rng.normal(size=tensor.shape), tensor.dtype),
            tracing.symbolic_inputs(model, batch_size),
        )
        synthetic.append("x")
    if y is None:
        y = _synthetic_targets(model, x, rng)
        synthetic.append("y")
    return SampleBatch(x, y, weight, tuple(synthetic))


def _synthetic_targets(model: keras.Model, x: Any, rng: np.random.Generator) -> Any:
    def target(output: keras.KerasTensor, loss: Any) -> Any:
        if _is_sparse(loss):
            return _to_tensor(rng.integers(0, output.shape[-1], output.shape[:-1]), "int32")
        return _to_tensor(rng.uniform(0.1, 0.9, output.shape), output.dtype)

    symbolic = keras.tree.map_structure(
        lambda v: keras.KerasTensor(v.shape, keras.backend.standardize_dtype(v.dtype)), x
    )
    outputs = model.compute_output_spec(symbolic)
    flat = keras.tree.flatten(outputs)
    return keras.tree.pack_sequence_as(
        outputs, list(map(target, flat, _losses(model, outputs, len(flat))))
    )


def _losses(model: keras.Model, outputs: Any, count: int) -> list[Any]:
    """The loss of each output, in the order of `keras.tree.flatten`."""
    loss = model.loss
    unknown = [None] * count
    if isinstance(loss, dict):
        names = list(getattr(model, "output_names", None) or [])
        if isinstance(outputs, dict):
            names = sorted(outputs)  # As Keras flattens a dict.
        return [loss.get(name) for name in names] if len(names) == count else unknown
    if isinstance(loss, list | tuple):
        return list(loss) if len(loss) == count else unknown
    return [loss] * count


def _is_sparse(loss: Any) -> bool:
    name = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    kind = f"{name} {type(loss).__name__}".lower().replace("_", "")
    return "sparse" in kind


def _resized(value: Any, batch_size: int) -> Any:
    if value is None:
        return None
    array = ops.convert_to_numpy(value) if ops.is_tensor(value) else np.asarray(value)
    if array.ndim and array.shape[0] != batch_size:
        repeats = math.ceil(batch_size / array.shape[0])
        array = np.concatenate([array] * repeats)[:batch_size]
    if array.dtype.kind not in "biuf":
        return array  # Text, for models that read it, stays where it is.
    # As `fit` does, which gives the model its own floats.
    return _to_tensor(array, keras.config.floatx() if array.dtype.kind == "f" else array.dtype)


def _to_tensor(array: Any, dtype: Any) -> Any:
    return ops.convert_to_tensor(array, dtype=keras.backend.standardize_dtype(dtype))
