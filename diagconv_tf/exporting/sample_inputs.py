"""Inputs on which an exported file is compared with its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from diagconv_tf import tracing
from diagconv_tf.exporting.tensors import Leaf, leaves

# For images (or sequences) of unknown size, alone and in a batch. Strided convolutions
# pad odd and even sizes differently, which exporters have got wrong.
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
    model: keras.Model, sample: Any, examples: int = 3
) -> Iterator[tuple[SampleInputs, SampleInputs]]:
    """Yields pairs of inputs with one example, and with more than one.

    There is one pair. Only where sizes of images are unknown there are several, from
    small to large: the first that the model takes is meant.

    Args:
        model: a built model.
        sample: a batch of inputs; None draws random numbers, always the same.
        examples: how many are drawn where more than one is meant.

    Raises:
        ValueError: if `sample` is no batch, or is needed and not given.
    """
    declared = tracing.declared_inputs(model)
    names = {} if declared is None else {leaf.path: leaf.value.name for leaf in leaves(declared)}

    def named(structure: Any) -> SampleInputs:
        found = leaves(structure)
        return SampleInputs(
            structure, tuple(Leaf(leaf.path, names.get(leaf.path), leaf.value) for leaf in found)
        )

    if sample is not None:
        one, several = _split(sample if declared is None else _as_declared(sample, declared))
        yield named(one), named(several)
        return
    if declared is None:
        raise ValueError(
            f"Expected `sample`, a batch of inputs, for a model that declares no inputs. "
            f"Received: sample=None for '{model.name}' of class {type(model).__name__}"
        )
    is_open = any(None in tensor.shape[1:] for tensor in keras.tree.flatten(declared))
    for alone, together in _SIZES if is_open else _SIZES[:1]:
        yield named(_random(declared, 1, alone)), named(_random(declared, examples, together))


def _split(sample: Any) -> tuple[Any, Any]:
    """One example of a sample, and more than one."""
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


def _as_declared(sample: Any, declared: Any) -> Any:
    """`sample` in the structure that the model declares: Keras takes others, files do not."""
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


def _random(declared: Any, count: int, size: int) -> Any:
    """Random numbers for each declared input; `size` stands for each unknown one."""
    rng = np.random.default_rng(0)

    def draw(tensor: keras.KerasTensor) -> np.ndarray:
        shape = [count, *(size if n is None else n for n in tensor.shape[1:])]
        if tensor.dtype == "bool" or "int" in tensor.dtype:
            # An index must fit a table of unknown length; an image of bytes is fine.
            end = 256 if tensor.dtype == "uint8" else 2
            return rng.integers(0, end, shape).astype(tensor.dtype)
        if tensor.dtype in ("float16", "float32", "float64"):
            return rng.normal(size=shape).astype(tensor.dtype)
        raise ValueError(
            f"Expected `sample`, a batch of inputs: no numbers can be drawn for the dtype "
            f"{tensor.dtype}. Received: sample=None for the input '{tensor.name}'"
        )

    return keras.tree.map_structure(draw, declared)
