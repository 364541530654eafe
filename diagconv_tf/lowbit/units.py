"""Where a product's units are, and backward passes of some of them.

A gradient operand that drops units (`operands.UnitOperand`) can always be applied to the
gradient of a layer's outputs. Where all rows keep the same k units, the products of the
backward pass need k columns only: the classes here are products that do so.
"""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any

import keras
from keras import ops

from diagconv_tf.lowbit import backends
from diagconv_tf.lowbit.operands import GradientOperand, UnitOperand
from diagconv_tf.lowerings import convolution_passes
from diagconv_tf.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Units:
    """Where the units of a product's outputs are.

    Attributes:
        count: units in a group.
        axes: those of the outputs that hold them; the others hold rows.
        groups: how many groups lie one after another, such as the gates of a recurrent layer.
    """

    count: int
    axes: tuple[int, ...] = (-1,)
    groups: int = 1


def unit_operand(gradients: GradientOperand | None, units: int) -> UnitOperand | None:
    """`gradients` where it drops some of so many units, else None."""
    drops = isinstance(gradients, UnitOperand) and gradients.keeps(units) < units
    return gradients if drops else None  # type: ignore[return-value]


def unified_operand(gradients: GradientOperand | None) -> UnitOperand | None:
    """`gradients` where all rows keep the same units, so that products can be small."""
    unified = isinstance(gradients, UnitOperand) and gradients.unified
    return gradients if unified else None  # type: ignore[return-value]


def through(operand: UnitOperand, units: Units, outputs: Any, seed: Any = None) -> Any:
    """`outputs`, in whose gradient `operand` drops units.

    Args:
        operand: the operand.
        units: where the units are in `outputs`.
        outputs: those of a product, without bias.
        seed: as `lowbit.backends.through`.
    """
    return backends.through(_ByUnits(operand, units), outputs, seed)


@dataclasses.dataclass(frozen=True)
class _ByUnits:
    """An operand for gradients whose units are not in the last axis, or in groups."""

    operand: UnitOperand
    units: Units

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        rank = len(gradient.shape)
        axes = tuple(axis % rank for axis in self.units.axes)
        order = (*(axis for axis in range(rank) if axis not in axes), *axes)
        moved = _transpose(gradient, order)
        shape = ops.shape(moved)
        rows = ops.reshape(moved, (-1, self.units.groups, self.units.count))
        kept = ops.reshape(self.operand(rows, seed), shape)
        return _transpose(kept, tuple(order.index(axis) for axis in range(rank)))


def _transpose(tensor: Any, order: tuple[int, ...]) -> Any:
    return tensor if order == tuple(range(len(order))) else ops.transpose(tensor, order)


@dataclasses.dataclass(frozen=True)
class FewUnits:
    """The units that all rows keep: what every product with a small backward pass needs.

    Attributes:
        operand: a unified operand that drops some units.
        units: where the units are in the outputs.
    """

    operand: UnitOperand
    units: Units

    def columns(self, rows: Any) -> Any:
        """Indices of the kept units in a gradient of shape (rows, groups * count)."""
        groups, count = self.units.groups, self.units.count
        kept = self.operand.columns(ops.reshape(rows, (-1, groups, count)))
        starts = ops.multiply(ops.arange(groups, dtype="int32"), count)
        # Not `ops.add`, which on TensorFlow (Keras 3.15) takes a column of as many numbers as
        # there are columns for a bias, and adds it to each row.
        kept = ops.reshape(ops.cast(kept, "int32") + ops.expand_dims(starts, 1), (-1,))
        # In the order of memory, TensorFlow writes them in little more than half the time.
        return ops.sort(kept)


@dataclasses.dataclass(frozen=True)
class MatrixProduct(FewUnits):
    """`ops.matmul` of inputs and a matrix; `diagconv_tf.backends.Passes`.

    With I for the kept units (arXiv 1711.06528, section 2.2.2): dx = g[:, I] W[:, I]^T, and
    dW[:, I] = x^T g[:, I], zeros elsewhere. Second derivatives are those of the whole product.
    """

    def forward(self, inputs: Any, kernel: Any) -> Any:
        return ops.matmul(inputs, kernel)

    def input_gradient(self, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
        rows = _as_matrix(output_gradient)
        columns = self.columns(rows)
        few = backends.take(kernel, columns, 1)
        product = backends.matmul(backends.take(rows, columns, 1), few, transposed="second")
        return ops.reshape(product, input_shape)

    def kernel_gradient(self, inputs: Any, output_gradient: Any) -> Any:
        rows = _as_matrix(output_gradient)
        columns = self.columns(rows)
        few = backends.take(rows, columns, 1)
        product = backends.matmul(_as_matrix(inputs), few, transposed="first")
        return backends.place_columns(product, columns, rows.shape[1])


def _as_matrix(tensor: Any) -> Any:
    return tensor if len(tensor.shape) == 2 else ops.reshape(tensor, (-1, tensor.shape[-1]))


@dataclasses.dataclass(frozen=True)
class EinsumAxes:
    """The axes of `inputs,kernel->outputs`, an equation that is a matrix product.

    Rows are letters of inputs and outputs; summed ones those of inputs and kernel; units
    those of kernel and outputs. As orders of axes: which come first, and which after.

    Attributes:
        inputs: rows, then summed axes.
        kernel: summed axes, then units.
        outputs: rows, then units.
        rows: how many axes of rows there are.
        units: how many axes of units there are.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]
    rows: int
    units: int

    @classmethod
    def of(cls, equation: str, rank: int) -> EinsumAxes | None:
        """The axes of an equation; None where it is no product of two matrices.

        Args:
            equation: as `keras.layers.EinsumDense` has it.
            rank: of the inputs.
        """
        inputs, kernel, outputs = _letters(equation, rank)
        distinct = all(len(set(part)) == len(part) for part in (inputs, kernel, outputs))
        rows = [letter for letter in outputs if letter in inputs]
        summed = [letter for letter in kernel if letter in inputs]
        units = [letter for letter in kernel if letter in outputs]
        parts = (rows, summed, units)
        each_in_two = len({*rows, *summed, *units}) == sum(map(len, parts))
        covered = {*inputs, *kernel, *outputs} == {*rows, *summed, *units}
        if not (distinct and each_in_two and covered and units):
            return None
        return cls(
            tuple(map(inputs.index, rows + summed)),
            tuple(map(kernel.index, summed + units)),
            tuple(map(outputs.index, rows + units)),
            len(rows),
            len(units),
        )

    def units_of(self, kernel_shape: tuple[int, ...]) -> Units:
        """Where the units of the outputs are."""
        sizes = [kernel_shape[axis] for axis in self.kernel[-self.units :]]
        return Units(math.prod(sizes), self.outputs[self.rows :])


def _letters(equation: str, rank: int) -> tuple[str, str, str]:
    """Inputs, kernel and outputs of an equation, with letters for `...`."""
    equation = equation.replace(" ", "")
    operands, outputs = equation.split("->")
    inputs, kernel = operands.split(",")
    if "..." in equation:
        free = [letter for letter in string.ascii_letters if letter not in equation]
        dots = "".join(free[: rank - len(inputs.replace("...", ""))])
        inputs, outputs = (part.replace("...", dots) for part in (inputs, outputs))
    return inputs, kernel, outputs


def einsum_axes(layer: keras.layers.EinsumDense, rank: int | None = None) -> EinsumAxes | None:
    """The axes of a layer's equation; None where it is no product of two matrices.

    Args:
        layer: the layer.
        rank: of its inputs; None means one further axis where the equation has `...`.
    """
    inputs = layer.equation.replace(" ", "").split(",")[0]
    return EinsumAxes.of(layer.equation, rank or len(inputs.replace("...", ".")))


def unit_count(layer: keras.layers.Layer) -> int | None:
    """The units of a built layer's product, or of each gate; None where it is no such layer."""
    if isinstance(layer, keras.layers.EinsumDense):
        axes = einsum_axes(layer)
        return None if axes is None else axes.units_of(tuple(layer.kernel.shape)).count
    return getattr(layer, "units", getattr(layer, "filters", None))


@dataclasses.dataclass(frozen=True)
class EinsumProduct(MatrixProduct):
    """`ops.einsum` of inputs and kernel, whose backward pass is a matrix product's.

    Attributes:
        equation: as `keras.layers.EinsumDense` has it.
        axes: what its letters are.
    """

    equation: str
    axes: EinsumAxes

    def forward(self, inputs: Any, kernel: Any) -> Any:
        return ops.einsum(self.equation, inputs, kernel)

    def input_gradient(self, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
        axes = self.axes
        rows = self._rows(output_gradient)
        moved = _transpose(kernel, axes.kernel)
        matrix = ops.reshape(moved, (-1, self.units.count))
        shape = tuple(input_shape[axis] for axis in axes.inputs)
        product = super().input_gradient(rows, matrix, (-1, matrix.shape[0]))
        return _transpose(ops.reshape(product, shape), _inverse(axes.inputs))

    def kernel_gradient(self, inputs: Any, output_gradient: Any) -> Any:
        axes = self.axes
        moved = _transpose(inputs, axes.inputs)
        summed = tuple(moved.shape[axes.rows :])
        matrix = ops.reshape(moved, (-1, math.prod(summed)))
        product = super().kernel_gradient(matrix, self._rows(output_gradient))
        units = tuple(output_gradient.shape[axis] for axis in axes.outputs[axes.rows :])
        return _transpose(ops.reshape(product, summed + units), _inverse(axes.kernel))

    def _rows(self, output_gradient: Any) -> Any:
        moved = _transpose(output_gradient, self.axes.outputs)
        return ops.reshape(moved, (-1, self.units.count))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))


@dataclasses.dataclass(frozen=True)
class ConvolutionProduct(FewUnits):
    """A standard convolution whose backward pass is that of a convolution to few channels.

    No source: the paper has matrix products only. Units are channels, and rows positions.

    Attributes:
        spec: the convolution, of one group, in the backend's preferred layout.
    """

    spec: ConvSpec

    def forward(self, inputs: Any, kernel: Any) -> Any:
        return convolution_passes(self.spec).forward(inputs, kernel)

    def input_gradient(self, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
        columns, few = self._few(output_gradient)
        kernel = backends.take(kernel, columns, 3)
        return self._passes.input_gradient(few, kernel, input_shape)

    def kernel_gradient(self, inputs: Any, output_gradient: Any) -> Any:
        columns, few = self._few(output_gradient)
        gradient = self._passes.kernel_gradient(inputs, few)
        matrix = ops.reshape(gradient, (-1, gradient.shape[-1]))
        whole = backends.place_columns(matrix, columns, self.units.count)
        return ops.reshape(whole, self.spec.kernel_shape)

    @property
    def _passes(self) -> Any:
        channels = self.operand.keeps(self.units.count)
        return convolution_passes(self.spec.replace(output_channels_per_group=channels))

    def _few(self, output_gradient: Any) -> tuple[Any, Any]:
        """The kept channels, and the gradient of these alone."""
        axis = self.spec.channel_axis
        last = output_gradient if axis == 3 else ops.transpose(output_gradient, (0, 2, 3, 1))
        columns = self.columns(_as_matrix(last))
        return columns, backends.take(output_gradient, columns, axis)
