"""Inputs on which an exported file is compared with its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from diagconv_tf import tracing
from diagconv_tf.exporting.tensors import Leaf, leaves

# For images (or sequences) of unknown size, alone and in a batch: the first that
# the model takes. Strided convolutions pad odd and even sizes differently, which
# exporters have got wrong.
_SIZES = ((65, 64), (64, 64), (128, 128), (256, 256), (512, 512))


@dataclasses.dataclass(frozen=True)
class SampleInputs:
    """One batch of inputs.

    Attributes:
        structure: what the model is called with; NumPy arrays.
        leaves: its arrays, with the names of the model's inputs where it has them.
    """

    structure: Any
    leaves: tuple[Leaf, ...]

    @property
    def batch_size(self) -> int:
        return len(self.leaves[0].value)


def sample_inputs(
    model: keras.Model, sample: Any, run: Callable[[Any], Any]
) -> tuple[SampleInputs, SampleInputs]:
    """Inputs with one example, and with more than one.

    Args:
        model: a built model.
        sample: a batch of inputs; None draws random numbers, always the same.
        run: calls the model, to find out which sizes it takes.

    Raises:
        ValueError: if `sample` is no batch, or is needed and not given.
    """
    declared = tracing.declared_inputs(model)
    if sample is None:
        one, several = _synthetic(model, declared, run)
    else:
        one, several = _given(_ordered(sample, declared))
    return _named(one, declared), _named(several, declared)


def _given(sample: Any) -> tuple[Any, Any]:
    sample = keras.tree.map_structure(np.asarray, sample)
    flat = keras.tree.flatten(sample)
    lengths = {len(array) if array.ndim else 0 for array in flat}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "Expected `sample` to be a batch of inputs, all with the same number of examples. "
            f"Received: arrays of shape {', '.join(str(array.shape) for array in flat)}"
        )
    if lengths == {1}:
        return sample, keras.tree.map_structure(lambda a: np.repeat(a, 2, axis=0), sample)
    return keras.tree.map_structure(lambda a: a[:1], sample), sample


def _ordered(sample: Any, declared: Any) -> Any:
    """`sample` in the structure that the model declares: Keras takes others, files do not."""
    if declared is None:
        return sample
    wanted, given = leaves(declared), leaves(sample)
    by_path = {leaf.path: leaf.value for leaf in given}
    # As in Keras, a dict may hold more than the model takes.
    if by_path.keys() >= {leaf.path for leaf in wanted}:
        values = {id(leaf.value): by_path[leaf.path] for leaf in wanted}
    elif by_path.keys() >= {(leaf.value.name,) for leaf in wanted}:
        values = {id(leaf.value): by_path[leaf.value.name,] for leaf in wanted}
    elif len(given) == len(wanted):
        by_key = sorted(wanted, key=lambda leaf: leaf.path)
        values = {id(w.value): g.value for w, g in zip(by_key, given, strict=True)}
    else:
        raise ValueError(
            f"Expected `sample` to hold {len(wanted)} inputs: "
            f"{', '.join(leaf.value.name for leaf in wanted)}. Received: {len(given)}"
        )
    return keras.tree.map_structure(lambda tensor: values[id(tensor)], declared)


def _named(structure: Any, declared: Any) -> SampleInputs:
    names = {} if declared is None else {leaf.path: leaf.value.name for leaf in leaves(declared)}
    return SampleInputs(
        structure,
        tuple(Leaf(leaf.path, names.get(leaf.path), leaf.value) for leaf in leaves(structure)),
    )


def _synthetic(model: keras.Model, declared: Any, run: Callable[[Any], Any]) -> tuple[Any, Any]:
    if declared is None:
        raise ValueError(
            f"Expected `sample`, a batch of inputs, for a model that declares no inputs. "
            f"Received: sample=None for '{model.name}' of class {type(model).__name__}"
        )

    def draw(count: int, size: int | None) -> Any:
        rng = np.random.default_rng(0)
        return keras.tree.map_structure(lambda t: _random(t, count, size, rng), declared)

    if not any(None in tensor.shape[1:] for tensor in keras.tree.flatten(declared)):
        return draw(1, None), draw(3, None)
    error = None
    for alone, together in _SIZES:
        one = draw(1, alone)
        try:
            run(one)
            return one, draw(3, together)
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
        f"Expected `sample`, a batch of inputs: no numbers can be drawn for the dtype "
        f"{tensor.dtype}. Received: sample=None for the input '{tensor.name}'"
    )
