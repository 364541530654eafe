"""How far an exported file is from its model, relative to what rounding would change.

A difference is divided by the *scale* of the number that differs, and the largest
quotient of all numbers must not exceed a tolerance. One scale for a whole output would
let `[1e6, 2]` pass for `[1e6, 1]`; the numbers' own sizes would refuse right files,
since a logit that happens to be near zero is a sum of large terms, whose roundings
remain. The scale of a channel therefore is the larger of

- its largest number, and
- how far it moves when each weight and each input is multiplied by `1 ± tolerance`,
  at random, divided by the tolerance.

The latter is backward error analysis: what is computed with roundings is what exact
arithmetic computes from weights and inputs that are perturbed by a small relative
error (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section
3.1). A channel is a slice along the last axis or along axis 1, wherever channels are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.keras_run import KerasRun
from diagconv_tf.exporting.native import counted_depthwise_calls
from diagconv_tf.exporting.report import ExportError
from diagconv_tf.exporting.sample_inputs import SampleInputs, sample_inputs
from diagconv_tf.exporting.tensors import Leaf, match
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import Rule
from diagconv_tf.text import summarize_error

#: The unit roundoff of each dtype.
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

#: The largest difference that is allowed, relative to the scale of a channel. The error
#: of n roundings of unit u is about u√n (Higham and Mary, A New Approach to
#: Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41, 2019). In float32 and
#: float64, 100 layers that add up 2**14 products each have n = 2**21 roundings. In half
#: precision the sums are in float32, and only results are rounded: 100 layers with 4
#: each. Model and file both round, which doubles n.
TOLERANCES = {"float64": 1e-12, "float32": 1e-4, "float16": 2e-2, "bfloat16": 0.15}

# Several perturbations, because one may leave a channel in place by chance.
_PERTURBATIONS = 3


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between outputs, and the largest relative to its scale."""

    absolute: float
    relative: float


@dataclasses.dataclass(frozen=True)
class ExpectedOutput:
    """One output of the model.

    Attributes:
        leaf: its values, with path and name.
        sizes: of the same shape: what roundings of the values are relative to.
    """

    leaf: Leaf
    sizes: np.ndarray

    def difference(self, output: np.ndarray, floor: float) -> Difference:
        """How far `output`, of the same shape, is from the expected values.

        Args:
            output: from the exported file.
            floor: the least scale of a channel, relative to the largest of all.
        """
        error = np.abs(output.astype("float64") - self.leaf.value.astype("float64"))
        least = floor * np.max(self.sizes, initial=0.0)
        relative = 0.0
        for axis in {1, error.ndim - 1} if error.ndim > 1 else {None}:
            others = tuple(i for i in range(error.ndim) if i != axis)
            scales = np.maximum(np.max(self.sizes, axis=others, initial=0.0), least)
            # Where all is zero, what differs is counted as it is.
            quotients = np.max(error, axis=others, initial=0.0) / np.where(scales, scales, 1.0)
            # `np.maximum` passes NaN on; `max` may lose it.
            relative = np.maximum(relative, np.max(quotients, initial=0.0))
        return Difference(float(np.max(error, initial=0.0)), float(relative))


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a model computes, and how exactly a file must compute the same.

    Attributes:
        inputs: one example and, where files take it, several.
        outputs: for each of `inputs`, the outputs.
        dtype: the coarsest in the model, a key of `TOLERANCES`.
        depthwise_channels: the channels of each depthwise convolution that one call
            of the model runs.
    """

    inputs: tuple[SampleInputs, ...]
    outputs: tuple[tuple[ExpectedOutput, ...], ...]
    dtype: str
    depthwise_channels: tuple[int, ...]

    @classmethod
    def of(
        cls, model: keras.Model, sample: Any, has_dynamic_batch: bool, rules: Sequence[Rule]
    ) -> Reference:
        """Runs `model`.

        Args:
            model: a built model on one device.
            sample: a batch of inputs, or None.
            has_dynamic_batch: whether files take any number of examples.
            rules: those that the model was rewritten with.

        Raises:
            ExportError: if the model does not run on the inputs.
            ValueError: if `sample` is no batch, or is needed and not given, or the
                outputs are not finite.
        """
        inputs = sample_inputs(model, sample, KerasRun(model))[: 2 if has_dynamic_batch else 1]
        run = KerasRun(model)
        with counted_depthwise_calls(model, rules) as calls:
            outputs = [_finite_outputs(run, inputs[0].structure)]
        outputs += [_finite_outputs(run, each.structure) for each in inputs[1:]]
        dtype = _coarsest_dtype(model, outputs[0])
        layers = {placed.path: placed.layer for placed in walk_layers(model)}
        return cls(
            inputs,
            tuple(
                _with_sizes(run, each.structure, of_batch, TOLERANCES[dtype])
                for each, of_batch in zip(inputs, outputs, strict=True)
            ),
            dtype,
            tuple(_input_channels(layers[path]) for path in calls),
        )

    @property
    def tolerance(self) -> float:
        """The largest relative difference of a right file."""
        return TOLERANCES[self.dtype]

    def difference(self, outputs: Sequence[Sequence[tuple[str, np.ndarray]]]) -> Difference:
        """How far a file is from the model.

        Args:
            outputs: for each of `inputs`, the names and values of the file's outputs.

        Raises:
            ExportError: if number or shapes of outputs differ.
        """
        floor = _ROUNDOFF[self.dtype] / self.tolerance
        pairs = [
            pair
            for of_batch, expected in zip(outputs, self.outputs, strict=True)
            for pair in _matched(of_batch, expected)
        ]
        differences = [expected.difference(array, floor) for array, expected in pairs]
        # `np.max` passes NaN on; `max` may lose it.
        absolute, relative = np.max([dataclasses.astuple(d) for d in differences], axis=0)
        return Difference(float(absolute), float(relative))


def _coarsest_dtype(model: keras.Model, outputs: Sequence[Leaf]) -> str:
    layers = [placed.layer for placed in walk_layers(model)]
    # Inputs compute nothing, and have Keras's default dtype.
    dtypes = {x.compute_dtype for x in layers if not isinstance(x, keras.layers.InputLayer)}
    # JAX computes in float32 where a layer says float64, unless told otherwise.
    dtypes |= {str(leaf.value.dtype) for leaf in outputs}
    return max(dtypes & TOLERANCES.keys(), key=lambda dtype: TOLERANCES[dtype], default="float32")


def _input_channels(layer: keras.layers.Layer) -> int:
    separable = isinstance(layer, keras.layers.SeparableConv2D)
    kernel = layer.depthwise_kernel if separable else layer.kernel
    groups = layer.groups if isinstance(layer, keras.layers.Conv2D) else 1
    return groups * kernel.shape[-2]


def _finite_outputs(run: KerasRun, inputs: Any) -> list[Leaf]:
    try:
        outputs = run(inputs)
    except Exception as error:
        raise ExportError(
            "Keras could not run the model; are these inputs that it is made for (see `sample`)? "
            f"{summarize_error(error, lines=2)}"
        ) from error
    if not all(np.isfinite(leaf.value.astype("float64")).all() for leaf in outputs):
        raise ValueError(
            "Expected finite outputs to compare with. Received: NaN or infinity from Keras; pass "
            "inputs that the model is made for as `sample`"
        )
    return outputs


def _with_sizes(
    run: KerasRun, inputs: Any, outputs: Sequence[Leaf], perturbation: float
) -> tuple[ExpectedOutput, ...]:
    sizes = [np.abs(leaf.value.astype("float64")) for leaf in outputs]
    for seed in range(_PERTURBATIONS):
        perturbed = run(inputs, perturbation, seed)
        for size, leaf, moved in zip(sizes, outputs, perturbed, strict=True):
            movement = np.abs(moved.value.astype("float64") - leaf.value.astype("float64"))
            # Numbers that are not finite say nothing of their size.
            movement = np.nan_to_num(movement / perturbation, nan=0.0, posinf=0.0)
            np.maximum(size, movement, out=size)
    return tuple(map(ExpectedOutput, outputs, sizes))


def _matched(
    outputs: Sequence[tuple[str, np.ndarray]], expected: Sequence[ExpectedOutput]
) -> list[tuple[np.ndarray, ExpectedOutput]]:
    if len(outputs) != len(expected):
        raise ExportError(
            f"Expected {len(expected)} outputs. Received: {len(outputs)} from the exported file"
        )
    of_path = {each.leaf.path: each for each in expected}
    matched = match(
        [name for name, _ in outputs],
        [each.leaf for each in expected],
        # So PyTorch's exporters flatten what a model returns; inputs, Keras flattens.
        by_insertion=keras.backend.backend() == "torch",
    )
    matched = [of_path[leaf.path] for leaf in matched]
    arrays = [np.asarray(array) for _, array in outputs]
    wanted = [each.sizes.shape for each in matched]
    received = [array.shape for array in arrays]
    if wanted != received:
        raise ExportError(
            f"Expected outputs of shapes {wanted}. Received: {received} from the exported file"
        )
    return list(zip(arrays, matched, strict=True))
