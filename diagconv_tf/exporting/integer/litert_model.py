"""Makes of a plan of integers a model that TensorFlow's converter writes as one.

The converter makes integers of what stands between operations of fake quantization. Their
scales here are those of the plan, so that they change nothing that is not rounded anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.exporting.integer.kernels import Grid
from diagconv_tf.exporting.integer.plan import IntegerStep, Program
from diagconv_tf.lowbit.layers import LowBitDense
from diagconv_tf.tracing import declared_inputs

_LEVELS = 255
#: LiteRT's weights of 8 bits are symmetric.
_WEIGHT_LEVELS = 127


def litert_model(program: Program) -> keras.Model:
    """A model of TensorFlow's backend that computes a program with fake quantization.

    It shares the layers that stay float with the model of the program. Call it, and use
    it, inside `preserved_state`.
    """
    calls = program.calls
    declared = keras.tree.map_structure(_input_like, declared_inputs(program.model))
    floats: dict[int, Any] = dict(zip(calls.inputs, keras.tree.flatten(declared), strict=True))
    rounded: dict[tuple[int, Grid], Any] = {}

    def on_grid(number: int, grid: Grid) -> Any:
        if (number, grid) not in rounded:
            rounded[number, grid] = _Rounded(grid)(floats[number])
        return rounded[number, grid]

    for step in calls.steps:
        grid = program.grids[step.outputs[0]]
        if isinstance(step, IntegerStep):
            outputs = _Integers(step, grid)(on_grid(step.inputs[0], step.grid))
            if grid is None:
                floats[step.outputs[0]] = outputs
            else:
                rounded[step.outputs[0], grid] = outputs
                # Where it is read as floats, the grid is the file's own, without offset.
                floats[step.outputs[0]] = outputs
        elif grid is not None and program.is_moved(step):
            taken = on_grid(step.inputs[0], grid)
            moved = taken if program.is_passed(step) else step.call({step.inputs[0]: taken})[0]
            rounded[step.outputs[0], grid] = moved
        else:
            floats.update(zip(step.outputs, step.call(floats), strict=True))
    numbers = {
        id(tensor): number
        for tensor, number in zip(
            keras.tree.flatten(program.model.output), calls.outputs, strict=True
        )
    }
    outputs = keras.tree.map_structure(
        lambda tensor: floats[numbers[id(tensor)]], program.model.output
    )
    model = keras.Model(declared, outputs, name=program.model.name)
    model(declared)  # Keras exports no model that was never called.
    return model


def _input_like(tensor: keras.KerasTensor) -> keras.KerasTensor:
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)


def _fake_quantized(tensor: Any, grid: Grid) -> Any:
    """A tensor rounded to the codes of `grid`, times its scale: without the offset."""
    import tensorflow as tf

    rounded = tf.quantization.fake_quant_with_min_max_args(tensor, 0.0, _LEVELS * grid.scale, 8)
    if grid.levels == _LEVELS:
        return rounded
    return tf.minimum(rounded, np.float32(grid.levels * grid.scale))


class _Rounded(keras.layers.Layer):
    """Inputs on a grid, moved by its offset."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(dtype="float32")
        self._grid = grid

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def call(self, inputs: Any) -> Any:
        moved = inputs + np.float32(self._grid.offset) if self._grid.offset else inputs
        return _fake_quantized(moved, self._grid)


class _Integers(keras.layers.Layer):
    """A dense layer or a convolution, whose kernel is one of integers and scales.

    Args:
        step: the call of the layer whose place it takes.
        grid: of the outputs; None where they stay floats.
    """

    def __init__(self, step: IntegerStep, grid: Grid | None) -> None:
        super().__init__(dtype="float32", name=f"{step.layer.name}_integers")
        self._layer, self._grid = step.layer, grid
        self._input_scale, self._kernel = step.grid.scale, step.kernel

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return self._layer.compute_output_shape(input_shape)

    def call(self, inputs: Any) -> Any:
        import tensorflow as tf

        scales = self._kernel.scales / self._input_scale
        limits = (_WEIGHT_LEVELS * scales).astype("float32")
        codes = self._kernel.codes
        weights = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            (codes * scales).astype("float32").reshape(*codes.shape[:2], -1)
            if self._is_depthwise
            else (codes * scales).astype("float32"),
            -limits,
            limits,
            8,
            narrow_range=True,
        )
        bias = self._kernel.bias + (self._grid.offset if self._grid else 0.0)
        outputs = tf.nn.bias_add(self._multiplied(inputs, weights), bias.astype("float32"))
        return outputs if self._grid is None else _fake_quantized(outputs, self._grid)

    @property
    def _is_depthwise(self) -> bool:
        return isinstance(self._layer, keras.layers.DepthwiseConv2D)

    def _multiplied(self, inputs: Any, weights: Any) -> Any:
        layer = self._layer
        if isinstance(layer, LowBitDense):
            return ops.matmul(inputs, weights)
        window: Mapping[str, Any] = {
            "strides": layer.strides,
            "padding": layer.padding,
            "dilation_rate": layer.dilation_rate,
            "data_format": layer.data_format,
        }
        if self._is_depthwise:
            return ops.depthwise_conv(inputs, ops.reshape(weights, layer.kernel.shape), **window)
        return ops.conv(inputs, weights, **window)
