"""Which layers of a deployed model multiply integers in a file, and why others do not.

A low-bit layer rounds its inputs itself. In a file of integers, the layer before it writes
the integers: its sums of products are scaled and rounded once. So the plan asks for each
value what those who read it round it to. Where all round to one grid, the value is written
as integers, and layers that only move integers, or that rounding does as well, pass on the
question.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from rich.table import Table

from diagconv_tf.exporting.integer.kernels import (
    Grid,
    IntegerKernel,
    deployed_codes,
    grid_of,
    integer_kernel,
)
from diagconv_tf.exporting.integer.steps import Step, Steps, flat_steps
from diagconv_tf.lowbit.layers import (
    LowBitConv2D,
    LowBitDense,
    LowBitDepthwiseConv2D,
    LowBitSeparableConv2D,
    operands_of,
)
from diagconv_tf.lowbit.operands import FLOAT_BITS
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.text import as_text

_LARGEST_INT32 = 2**31 - 1
#: The layers that have an integer form.
_PLANNED = (LowBitConv2D, LowBitDepthwiseConv2D, LowBitDense)
#: Layers that do nothing in inference.
_NOTHING = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.Identity,
)


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """What becomes of one low-bit layer in a file.

    Attributes:
        path: the layer's path.
        class_name: name of its class.
        calls: how often the model calls it.
        reasons: why it stays float; empty where it multiplies integers.
    """

    path: str
    class_name: str
    calls: int
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class IntegerPlan:
    """Which layers multiply integers in a file; prints as a table.

    Attributes:
        model_name: the model's name.
        format: the format of the file.
        layers: one for each layer whose inputs are quantized.
    """

    model_name: str
    format: str
    layers: tuple[PlannedLayer, ...]

    @property
    def integer_calls(self) -> int:
        """How many integer operations the file has to have."""
        return sum(layer.calls for layer in self.layers if not layer.reasons)

    @property
    def left_float(self) -> dict[str, tuple[str, ...]]:
        """Path of each layer that stays float → why."""
        return {layer.path: layer.reasons for layer in self.layers if layer.reasons}

    @property
    def reasons_text(self) -> str:
        """Which layers stay float, and why, on one line; layers with the same reasons together."""
        paths: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
        for path, reasons in self.left_float.items():
            paths[reasons].append(path)
        return "; ".join(f"{', '.join(p)}: {', '.join(r)}" for r, p in paths.items())

    def __rich__(self) -> Table:
        table = Table("layer", "class", "multiplies", "why", title=self._title)
        for layer in self.layers:
            what = "floats" if layer.reasons else "integers"
            table.add_row(layer.path, layer.class_name, what, "; ".join(layer.reasons))
        return table

    @property
    def _title(self) -> str:
        of = len(self.layers)
        return f"{self.model_name}: {of - len(self.left_float)} of {of} multiply integers"

    def __str__(self) -> str:
        return as_text(self)


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerStep(Step):
    """A call of a layer that multiplies integers.

    Attributes:
        layer: the layer; its kernel, bias and activation do not count any more.
        grid: of the inputs.
        kernel: for the codes of the inputs, batch norm included.
        bias_variable: the variable that a bias can be added to, None for none, and the
            factor by channel with which.
    """

    layer: Any = None
    grid: Any = None
    kernel: Any = None
    bias_variable: tuple[Any, Any] = (None, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a file computes.

    Attributes:
        plan: for people.
        model: the model.
        calls: the steps, with their values.
        grids: number of a value → what all its readers round it to; None for values that
            somebody reads as they are.
    """

    plan: IntegerPlan
    model: keras.Model
    calls: Steps
    grids: Mapping[int, Grid | None]

    def is_moved(self, step: Step) -> bool:
        """Whether a step works on integers as on floats, and so does on integers."""
        return not isinstance(step, IntegerStep) and all(
            self.grids[number] is not None for number in step.outputs
        )

    def is_passed(self, step: Step) -> bool:
        """Whether a step that is moved changes no integer: rounding does what it does."""
        moves = (keras.layers.ZeroPadding2D, keras.layers.MaxPooling2D, keras.layers.Flatten)
        return type(step.operation) not in moves


def is_deployed(layer: keras.layers.Layer) -> bool:
    """Whether a layer rounds its inputs, and has a kernel that `deploy` may have rounded."""
    operands = operands_of(layer)
    return operands.input_bits != FLOAT_BITS and operands.kernel_bits == FLOAT_BITS


def plan_integers(model: keras.Model, format: str) -> Program | None:
    """Plans a file of integers.

    Args:
        model: a built model.
        format: `"onnx"` or `"litert"`.

    Returns:
        The plan and what follows from it. None for a model without layers that multiply
        quantized inputs by kernels on a grid, as `deploy` makes them.

    Raises:
        ValueError: if a kernel has 8 bits, or the model has no graph.
    """
    layers = [p.layer for p in walk_layers(model) if is_deployed(p.layer)]
    codes = {
        id(layer): found
        for layer in layers
        if type(layer) in _PLANNED and (found := deployed_codes(layer)) is not None
    }
    if not codes and not any(isinstance(layer, LowBitSeparableConv2D) for layer in layers):
        return None
    too_wide = [
        placed.path
        for placed in walk_layers(model)
        if id(placed.layer) in codes and codes[id(placed.layer)].bits == 8
    ]
    if too_wide:
        raise ValueError(
            "Expected kernels of at most 7 bits, which 8-bit integers hold: those of 8 bits are "
            f"odd integers up to 255. Received: 8 bits in {len(too_wide)} layers, such as "
            f"'{too_wide[0]}'; train with LowBit(weights=7, ...), or export with integers=False"
        )
    steps = flat_steps(model)
    if steps is None:
        raise ValueError(
            "Expected a functional or sequential model, whose graph tells what is rounded where. "
            f"Received: '{model.name}' of class {type(model).__name__}; export floats with "
            "integers=False"
        )
    return _Planning(model, format, steps, codes).program()


class _Planning:
    def __init__(
        self, model: keras.Model, format: str, steps: Steps, codes: Mapping[int, Any]
    ) -> None:
        self._model, self._format, self._steps, self._codes = model, format, steps, codes
        # By the step's first output.
        self._reasons: dict[int, tuple[str, ...]] = {}
        for step in steps.steps:
            if is_deployed_layer(step.operation):
                self._reasons[step.outputs[0]] = tuple(self._why_not(step))

    def program(self) -> Program:
        while True:
            merged = self._merged()
            grids = _demands(merged)
            ends = self._unbounded(merged, grids)
            if not ends:
                break
            # Where one more layer stays float, those before it have other readers.
            for number in ends:
                self._reasons[number] = (
                    "its outputs are read as floats, and no activation bounds them: LiteRT's "
                    "8-bit kernels round them to 256 levels",
                )
        plan = IntegerPlan(self._model.name, self._format, tuple(self._layers(merged)))
        steps = tuple(_with_room(step, grids[step.outputs[0]]) for step in merged.steps)
        merged = dataclasses.replace(merged, steps=steps)
        return Program(plan, self._model, merged, grids)

    def _why_not(self, step: Step) -> Iterator[str]:
        layer: Any = step.operation
        if isinstance(layer, LowBitSeparableConv2D):
            yield "what passes between its two halves is float"
            return
        if type(layer) not in _PLANNED:
            yield f"{type(layer).__name__} has no integer form"
            return
        grid = grid_of(layer)
        if grid is None:
            yield f"its inputs are rounded by {type(operands_of(layer).inputs).__name__}"
        if id(layer) not in self._codes:
            yield "its kernel is float"
        if layer.compute_dtype != "float32":
            yield f"it computes in {layer.compute_dtype}"
        if isinstance(layer, LowBitDense):
            yield from self._why_not_sum(layer, grid)
            return
        pads = layer.padding != "valid" and max(*layer.kernel_size, *layer.strides) > 1
        if grid is not None and not grid.holds_zero and pads:
            yield (
                "it pads with zeros, which are not on the signed grid of its inputs: "
                "padding='valid' has none"
            )
        if self._format == "litert":
            yield from _why_not_litert(layer)
        yield from self._why_not_sum(layer, grid)

    def _why_not_sum(self, layer: Any, grid: Grid | None) -> Iterator[str]:
        if grid is None or id(layer) not in self._codes:
            return
        kernel = integer_kernel(layer, self._codes[id(layer)]).on(grid)
        if kernel.largest_sum(grid) > _LARGEST_INT32 // 2:
            yield "its sums may exceed 32 bits"

    def _merged(self) -> Steps:
        """The steps, with integer ones, into which batch norms are folded."""
        readers = collections.Counter(n for step in self._steps.steps for n in step.inputs)
        readers.update(self._steps.outputs)
        values = dict(self._steps.values)
        following = {step.inputs[0]: step for step in self._steps.steps if len(step.inputs) == 1}
        folded: set[int] = set()
        steps: list[Step] = []
        for step in self._steps.steps:
            if step.outputs[0] in folded:
                continue
            if self._reasons.get(step.outputs[0], ("float",)):
                steps.append(step)
                continue
            layer: Any = step.operation
            kernel = integer_kernel(layer, self._codes[id(layer)])
            output = step.outputs[0]
            grid = grid_of(layer)
            assert grid is not None, "`_why_not` refuses it"
            variable = layer.bias, 1.0
            activation = None
            if layer.activation not in (None, keras.activations.linear):
                # A step of its own, like a layer.
                activation = keras.layers.Activation(layer.activation, dtype="float32")
                output = len(values)
                values[output] = values[step.outputs[0]]
            elif readers[output] == 1 and output in following and not _trains(following[output]):
                norm = following[output]
                factors = _folded(norm.operation, layer, len(values[output].shape))
                if factors is not None:
                    kernel = kernel.scaled(*factors)
                    variable = _bias_of(norm.operation, factors[0])
                    output = norm.outputs[0]
                    folded.add(output)
            steps.append(
                IntegerStep(
                    layer,
                    step.path,
                    step.inputs,
                    (output,),
                    layer=layer,
                    grid=grid,
                    kernel=kernel.on(grid),
                    bias_variable=variable,
                )
            )
            if activation is not None:
                steps.append(Step(activation, step.path, (output,), step.outputs))
        return dataclasses.replace(self._steps, steps=tuple(steps), values=values)

    def _unbounded(self, merged: Steps, grids: dict[int, Grid | None]) -> list[int]:
        """Gives a grid to what has none and needs one; the steps for which there is none."""
        if self._format != "litert":
            return []
        readers = collections.defaultdict(list)
        for step in merged.steps:
            for number in step.inputs:
                readers[number].append(step)
        without = []
        for step in merged.steps:
            (output, *_) = step.outputs
            if not isinstance(step, IntegerStep) or grids[output] is not None:
                continue
            highs = [_upper_bound(reader.operation) for reader in readers[output]]
            high = max(highs, default=math.inf)
            if output in merged.outputs or high == math.inf:
                # `outputs` of the call itself, before a batch norm was folded into it.
                without += [s.outputs[0] for s in self._steps.steps if _is_of(s, step)]
            else:
                grids[output] = Grid(high / 255, 0.0, 255)
        return without

    def _layers(self, merged: Steps) -> Iterator[PlannedLayer]:
        steps: dict[int, list[Step]] = collections.defaultdict(list)
        for step in self._steps.steps:
            if step.outputs[0] in self._reasons:
                steps[id(step.operation)].append(step)
        for placed in walk_layers(self._model):
            layer, calls = placed.layer, steps[id(placed.layer)]
            name = type(layer).__name__
            if not is_deployed_layer(layer):
                continue
            if not calls:
                reason = "it is in no graph, or inside a layer whose inside is not known"
                yield PlannedLayer(placed.path, name, 0, (reason,))
                continue
            reasons = [r for step in calls for r in self._reasons[step.outputs[0]]]
            yield PlannedLayer(placed.path, name, len(calls), tuple(dict.fromkeys(reasons)))


def _with_room(step: Step, grid: Grid | None) -> Step:
    """`step`, whose integer bias has room for the offset of the grid of its outputs."""
    if not isinstance(step, IntegerStep) or grid is None:
        return step
    return dataclasses.replace(step, kernel=step.kernel.with_room(grid.offset))


def is_deployed_layer(operation: Any) -> bool:
    return isinstance(operation, keras.layers.Layer) and is_deployed(operation)


def _is_of(step: Step, integer: Step) -> bool:
    return step.operation is integer.operation and step.inputs == integer.inputs


def _why_not_litert(layer: Any) -> Iterator[str]:
    if layer.data_format != "channels_last":
        yield "channels_first: LiteRT's kernels are channels_last"
    if isinstance(layer, LowBitConv2D) and layer.groups > 1:
        yield f"groups={layer.groups}: LiteRT has no 8-bit kernel for them"
    if isinstance(layer, LowBitDepthwiseConv2D) and layer.strides[0] != layer.strides[1]:
        yield "TensorFlow's depthwise op has one stride for height and width"


def _folded(operation: Any, layer: Any, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Factor and summand of a batch norm in inference, by channel, that follows `layer`."""
    if type(operation) is not keras.layers.BatchNormalization:
        return None
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    axes = (operation.axis,) if isinstance(operation.axis, int) else tuple(operation.axis)
    if tuple(axis % rank for axis in axes) != (1 if channels_first else rank - 1,):
        return None
    if operation.compute_dtype != "float32":
        return None
    mean, variance, gamma, beta = (
        None if v is None else keras.ops.convert_to_numpy(v).astype("float64")
        for v in (
            operation.moving_mean,
            operation.moving_variance,
            operation.gamma,
            operation.beta,
        )
    )
    factor = 1.0 / np.sqrt(variance + operation.epsilon)
    if gamma is not None:
        factor = factor * gamma
    return factor, (0.0 if beta is None else beta) - mean * factor


def _bias_of(norm: Any, factor: np.ndarray) -> tuple[Any, Any]:
    """The variable of a batch norm that a bias can be added to, and the factor."""
    if norm.beta is not None:
        return norm.beta, 1.0
    return norm.moving_mean, -1.0 / np.where(factor, factor, np.inf)


def _trains(step: Step) -> bool:
    """Whether a call always does what it does in training (`layer(x, training=True)`)."""
    return step.arguments is not None and bool(step.arguments.kwargs.get("training"))


def _demands(steps: Steps) -> dict[int, Grid | None]:
    """Number of a value → the grid to which all its readers round it, or None."""
    grids: dict[int, Grid | None] = dict.fromkeys(steps.outputs)

    def demand(number: int, grid: Grid | None) -> None:
        grids[number] = grid if grids.setdefault(number, grid) == grid else None

    for step in reversed(steps.steps):
        for number in step.outputs:
            grids.setdefault(number, None)
        wanted = {grids[number] for number in step.outputs}
        grid = wanted.pop() if len(wanted) == 1 else None
        if isinstance(step, IntegerStep):
            grid = step.grid
        elif grid is not None and (_trains(step) or not _commutes(step.operation, grid)):
            # Somebody rounds what the step gives, but not as it takes it.
            grids.update(dict.fromkeys(step.outputs))
            grid = None
        for number in step.inputs:
            demand(number, grid)
    for number in steps.inputs:
        grids.setdefault(number, None)
    return grids


def _commutes(operation: Any, grid: Grid) -> bool:
    """Whether rounding to `grid` may come before an operation as well as after it."""
    kind = type(operation)
    if kind is keras.layers.MaxPooling2D or kind in _NOTHING:
        return True
    if kind is keras.layers.Flatten:
        return operation.data_format == "channels_last"
    if kind is keras.layers.ZeroPadding2D:
        return grid.holds_zero
    bounds = rectified(operation)
    if bounds is None:
        return False
    low, high = bounds
    return low == -math.inf or (grid.holds_zero and high >= grid.high * (1 - 1e-6))


def rectified(operation: Any) -> tuple[float, float] | None:
    """Between which numbers an operation clips; None for one that does something else."""
    if type(operation) is keras.layers.ReLU:
        if operation.negative_slope or operation.threshold:
            return None
        return 0.0, math.inf if operation.max_value is None else float(operation.max_value)
    if type(operation) is keras.layers.Activation:
        known: Sequence[tuple[Any, tuple[float, float]]] = (
            (keras.activations.linear, (-math.inf, math.inf)),
            (keras.activations.relu, (0.0, math.inf)),
            (keras.activations.relu6, (0.0, 6.0)),
        )
        return next((bounds for f, bounds in known if operation.activation is f), None)
    return None


def _upper_bound(operation: Any) -> float:
    """To which number a rectifier clips; infinity for anything else."""
    low, high = rectified(operation) or (-math.inf, math.inf)
    return high if low == 0 else math.inf


__all__ = ["IntegerKernel", "IntegerPlan", "PlannedLayer", "Program", "plan_integers"]
