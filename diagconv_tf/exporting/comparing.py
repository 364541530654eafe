"""Inputs to compare on, and how far two runs are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf import tracing
from diagconv_tf.exporting.full_precision import without_tf32
from diagconv_tf.exporting.report import ExportError
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.text import summarize_error

#: Largest difference, relative to the largest output. float32 and float64 leave
#: room for some hundred roundings in another order. In half precision, runtimes
#: may keep float32 between layers where Keras rounds to 2**-11 or 2**-8, and
#: that adds up over some hundred layers.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 0.15}

# For images (or sequences) of unknown size, alone and in a batch: the first that
# the model takes. Strided convolutions pad odd and even sizes differently, which
# exporters have got wrong.
_SIZES = ((65, 64), (64, 64), (128, 128), (256, 256), (512, 512))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between outputs, and relative to their scale."""

    absolute: float
    relative: float


def tolerance_of(model: keras.Model, outputs: Sequence[np.ndarray]) -> float:
    """The tolerance of the coarsest precision in the layers and the outputs."""
    dtypes = {placed.layer.compute_dtype for placed in walk_layers(model)}
    # JAX computes in float32 where a layer says float64, unless told otherwise.
    dtypes |= {str(array.dtype) for array in outputs}
    return max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes) or TOLERANCES["float32"]


def input_names(model: keras.Model) -> list[str] | None:
    """Names of the flattened inputs, None where the model declares none."""
    declared = tracing.declared_inputs(model)
    return None if declared is None else [tensor.name for tensor in keras.tree.flatten(declared)]


def batches(model: keras.Model, sample: Any) -> list[Any]:
    """Inputs with one example and with more than one.

    Args:
        model: a built model.
        sample: a batch of inputs, or None: it is made up, always the same.

    Raises:
        ValueError: if `sample` is no batch, or is needed and not given.
    """
    if sample is None:
        return _made_up(model)
    sample = keras.tree.map_structure(np.asarray, sample)
    flat = keras.tree.flatten(sample)
    lengths = {len(array) if array.ndim else 0 for array in flat}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "Expected `sample` to be a batch of inputs, all with the same number of examples. "
            f"Received: arrays of shape {', '.join(str(array.shape) for array in flat)}"
        )
    if lengths == {1}:
        return [sample, keras.tree.map_structure(lambda a: np.repeat(a, 2, axis=0), sample)]
    return [keras.tree.map_structure(lambda a: a[:1], sample), sample]


def run_keras(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    """Flattened outputs for inference.

    Raises:
        ExportError: if the model does not run on `inputs`.
        ValueError: if they are not finite, so that nothing can be compared.
    """
    try:
        outputs = _call(model, inputs)
    except Exception as error:
        raise ExportError(
            "Keras could not run the model; are these inputs that it is made for (see `sample`)? "
            f"{summarize_error(error, lines=2)}"
        ) from error
    if not all(np.isfinite(array.astype("float64")).all() for array in outputs):
        raise ValueError(
            "Expected finite outputs to compare with. Received: NaN or infinity from Keras; pass "
            "inputs that the model is made for as `sample`"
        )
    return outputs


def difference(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Difference:
    """How far `outputs` are from `expected`.

    Raises:
        ExportError: if their number or shapes differ.
    """
    shapes = [[np.shape(array) for array in arrays] for arrays in (expected, outputs)]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"Expected outputs of shapes {shapes[0]}. Received: {shapes[1]} from the exported file"
        )
    absolute = relative = 0.0
    for output, wanted in zip(outputs, expected, strict=True):
        wanted = wanted.astype("float64")
        largest = float(np.max(np.abs(output.astype("float64") - wanted), initial=0.0))
        scale = float(np.max(np.abs(wanted), initial=0.0))
        # `np.maximum` passes NaN on; `max` may lose it.
        absolute = float(np.maximum(absolute, largest))
        relative = float(np.maximum(relative, largest / (scale or 1.0)))
    return Difference(absolute, relative)


def _call(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    with without_tf32(keras.backend.backend()):
        outputs = keras.tree.flatten(_compiled(model)(inputs))
    return [keras.ops.convert_to_numpy(output) for output in outputs]


def _compiled(model: keras.Model) -> Callable[[Any], Any]:
    """The model for inference: as a graph, because some ops run only there."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda inputs: model(inputs, training=False), autograph=False)
    if backend == "jax":
        import jax

        @jax.jit
        def call(values, inputs):
            state = list(zip(model.variables, values, strict=True))
            with keras.StatelessScope(state_mapping=state):
                return model(inputs, training=False)

        return lambda inputs: call([variable.value for variable in model.variables], inputs)
    import torch

    return torch.no_grad()(lambda inputs: model(inputs, training=False))


def _made_up(model: keras.Model) -> list[Any]:
    declared = tracing.declared_inputs(model)
    if declared is None:
        raise ValueError(
            f"Expected `sample`, a batch of inputs, for a model that declares no inputs. "
            f"Received: sample=None for '{model.name}' of class {type(model).__name__}"
        )

    def random(count, size):
        rng = np.random.default_rng(0)
        return keras.tree.map_structure(lambda t: _random(t, count, size, rng), declared)

    if not any(None in tensor.shape[1:] for tensor in keras.tree.flatten(declared)):
        return [random(1, None), random(3, None)]
    error = None
    for alone, together in _SIZES:
        one = random(1, alone)
        try:
            _call(model, one)
            return [one, random(3, together)]
        except Exception as refusal:  # Its type depends on backend and layer.
            error = refusal
    raise ValueError(
        "Expected `sample`, a batch of inputs: the model takes none of the sizes "
        f"{sorted(set(sum(_SIZES, ())))}. Received: sample=None for '{model.name}', whose inputs "
        "have unknown sizes"
    ) from error


def _random(
    tensor: keras.KerasTensor, count: int, size: int | None, rng: np.random.Generator
) -> np.ndarray:
    shape = [count, *(size if n is None else n for n in tensor.shape[1:])]
    if tensor.dtype == "bool" or "int" in tensor.dtype:
        # An index must fit a table of unknown length; an image of bytes is fine.
        return rng.integers(0, 256 if tensor.dtype == "uint8" else 2, shape).astype(tensor.dtype)
    if tensor.dtype in ("float16", "float32", "float64"):
        return rng.normal(size=shape).astype(tensor.dtype)
    raise ValueError(
        f"Expected `sample`, a batch of inputs: those of dtype {tensor.dtype} cannot be made up. "
        f"Received: sample=None for the input '{tensor.name}'"
    )
