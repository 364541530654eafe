"""How far an exported file is from its model, relative to what rounding would change.

A difference is divided by the *scale* of the number that differs, and the largest
quotient of all numbers must not exceed a tolerance. One scale for a whole output would
let `[1e6, 2]` pass for `[1e6, 1]`; the numbers' own sizes would refuse right files,
since a logit that happens to be near zero is a sum of large terms, whose roundings
remain. The scale of a channel therefore is the larger of

- its largest number, and
- how far it moves when each weight and each input is multiplied by a random factor in
  `1 ± tolerance`, divided by the tolerance.

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

from diagconv_tf.exporting.keras_run import KerasRun, perturbed
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

# Draws of the random factors. One may move a channel little by chance.
_DRAWS = 2


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

    def difference(self, output: np.ndarray, floor: float) -> tuple[float, float]:
        """How far `output`, of the same shape, is: absolute, and relative to its scale.

        Args:
            output: from the exported file.
            floor: the least scale of a channel, relative to the largest of all.
        """
        error = _distance(output, self.leaf.value)
        least = floor * np.max(self.sizes, initial=0.0)
        relative: list[float] = []
        for axis in {1, error.ndim - 1} if error.ndim > 1 else {None}:
            others = tuple(i for i in range(error.ndim) if i != axis)
            scales = np.maximum(np.max(self.sizes, axis=others, initial=0.0), least)
            # Where all is zero, what differs is counted as it is.
            quotients = np.max(error, axis=others, initial=0.0) / np.where(scales, scales, 1.0)
            relative.append(np.max(quotients, initial=0.0))
        return np.max(error, initial=0.0), np.max(relative)


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
        cls,
        model: keras.Model,
        sample: Any,
        has_dynamic_batch: bool,
        rules: Sequence[Rule],
        *,
        run: KerasRun | None = None,
        examples: int = 3,
        draws: int = _DRAWS,
    ) -> Reference:
        """Runs `model`.

        Args:
            model: a built model on one device.
            sample: a batch of inputs, or None.
            has_dynamic_batch: whether files take any number of examples.
            rules: those that the model was rewritten with.
            run: the model as a function, with the weights to use; None uses the model's.
            examples: how many are drawn where there is no sample.
            draws: of the random factors; without any, the sizes are those of the numbers.

        Raises:
            ExportError: if the model does not run on the inputs.
            ValueError: if `sample` is no batch, or is needed and not given, or the
                outputs are not finite.
        """
        run = run or KerasRun(model)
        refusal: Exception | None = None
        for pair in sample_inputs(model, sample, examples):
            inputs: tuple[SampleInputs, ...] = pair if has_dynamic_batch else pair[:1]
            try:
                with counted_depthwise_calls(model, rules) as calls:
                    outputs = [run(inputs[0].structure)]
                outputs += [run(each.structure) for each in inputs[1:]]
                break
            except Exception as error:  # Its type depends on backend and layer.
                refusal = error
        else:
            assert refusal is not None
            raise ExportError(
                "Keras could not run the model; pass inputs that it is made for as `sample`: "
                f"{summarize_error(refusal, lines=2)}"
            ) from refusal
        flat = [leaf.value for of_batch in outputs for leaf in of_batch]
        if not all(np.isfinite(array.astype("float64")).all() for array in flat):
            raise ValueError(
                "Expected finite outputs to compare with. Received: NaN or infinity from Keras; "
                "pass inputs that the model is made for as `sample`"
            )
        dtype = _coarsest_dtype(model, {str(array.dtype) for array in flat})
        expected = _with_sizes(run, inputs, outputs, TOLERANCES[dtype], draws)
        layers = {placed.path: placed.layer for placed in walk_layers(model)}
        return cls(inputs, expected, dtype, tuple(_input_channels(layers[path]) for path in calls))

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
        differences = [
            wanted.difference(array, floor)
            for of_batch, expected in zip(outputs, self.outputs, strict=True)
            for array, wanted in _matched(of_batch, expected)
        ]
        # `np.max` passes NaN on; `max` may lose it.
        return Difference(*map(float, np.max(differences, axis=0)))

    def matched(self, outputs: Sequence[Sequence[tuple[str, np.ndarray]]]) -> list[list[Leaf]]:
        """A file's outputs, in terms of the model's.

        Args:
            outputs: as for `difference`.

        Raises:
            ExportError: if number or shapes of outputs differ.
        """
        return [
            [
                dataclasses.replace(wanted.leaf, value=array)
                for array, wanted in _matched(of_batch, expected)
            ]
            for of_batch, expected in zip(outputs, self.outputs, strict=True)
        ]


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype("float64") - other.astype("float64"))


def _coarsest_dtype(model: keras.Model, output_dtypes: set[str]) -> str:
    layers = [placed.layer for placed in walk_layers(model)]
    # Inputs compute nothing, and have Keras's default dtype.
    dtypes = {x.compute_dtype for x in layers if not isinstance(x, keras.layers.InputLayer)}
    # JAX computes in float32 where a layer says float64, unless told otherwise.
    known = (dtypes | output_dtypes) & TOLERANCES.keys()
    return max(known, key=TOLERANCES.__getitem__, default="float32")


def _input_channels(layer: keras.layers.Layer) -> int:
    separable = isinstance(layer, keras.layers.SeparableConv2D)
    kernel = layer.depthwise_kernel if separable else layer.kernel
    groups = layer.groups if isinstance(layer, keras.layers.Conv2D) else 1
    return groups * kernel.shape[-2]


def _with_sizes(
    run: KerasRun,
    inputs: Sequence[SampleInputs],
    outputs: Sequence[Sequence[Leaf]],
    perturbation: float,
    draws: int,
) -> tuple[tuple[ExpectedOutput, ...], ...]:
    expected = tuple(
        tuple(ExpectedOutput(leaf, np.abs(leaf.value.astype("float64"))) for leaf in of_batch)
        for of_batch in outputs
    )
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        weights = perturbed(run.weights, perturbation, rng)
        for each, of_batch in zip(inputs, expected, strict=True):
            moved = run(perturbed(each.structure, perturbation, rng), weights)
            for wanted, leaf in zip(of_batch, moved, strict=True):
                movement = _distance(leaf.value, wanted.leaf.value) / perturbation
                # Numbers that are not finite say nothing of their size.
                movement = np.nan_to_num(movement, nan=0.0, posinf=0.0)
                np.maximum(wanted.sizes, movement, out=wanted.sizes)
    return expected


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
    pairs = [
        (np.asarray(array), of_path[leaf.path])
        for (_, array), leaf in zip(outputs, matched, strict=True)
    ]
    wanted = [each.sizes.shape for _, each in pairs]
    received = [array.shape for array, _ in pairs]
    if wanted != received:
        raise ExportError(
            f"Expected outputs of shapes {wanted}. Received: {received} from the exported file"
        )
    return pairs
