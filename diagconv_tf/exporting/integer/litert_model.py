"""Makes of a plan of integers a model that TensorFlow's converter writes as one.

The converter makes integers of what stands between operations of fake quantization. Their
scales here are those of the plan, so that they change nothing that is not rounded anyway.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.exporting.integer.kernels import Grid
from diagconv_tf.exporting.integer.plan import IntegerStep, Program
from diagconv_tf.exporting.integer.steps import StepsLayer
from diagconv_tf.lowbit.layers import LowBitDense
from diagconv_tf.tracing import declared_inputs

_LEVELS = 255
#: LiteRT's weights of 8 bits are symmetric.
_WEIGHT_LEVELS = 127


def litert_model(program: Program) -> keras.Model:
    """A model of TensorFlow's backend that computes a program with fake quantization.

    It shares the layers that stay float with the model of the program.
    """
    declared = keras.tree.map_structure(
        lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name),
        declared_inputs(program.model),
    )
    outputs = _FakeQuantized(program)(keras.tree.flatten(declared))
    structured = keras.tree.pack_sequence_as(program.calls.output, outputs)
    model = keras.Model(declared, structured, name=program.model.name)
    model(declared)  # Keras exports no model that was never called.
    return model


class _FakeQuantized(StepsLayer):
    """A program, in floats."""

    def __init__(self, program: Program) -> None:
        calls = program.calls
        super().__init__(calls.steps, calls.inputs, calls.outputs)
        self._program = program

    def call(self, inputs: list[Any]) -> list[Any]:
        program = self._program
        floats: dict[int, Any] = dict(zip(self.taken, inputs, strict=True))
        rounded: dict[tuple[int, Grid], Any] = {}

        def on_grid(number: int, grid: Grid) -> Any:
            if (number, grid) not in rounded:
                rounded[number, grid] = _fake_quantized(floats[number], grid, grid.offset)
            return rounded[number, grid]

        for step in self.steps:
            output = step.outputs[0]
            grid = program.grids[output]
            if isinstance(step, IntegerStep):
                outputs = _multiplied(step, on_grid(step.inputs[0], step.grid), grid)
                # Where it is read as floats, too, the grid is the file's own, without offset.
                floats[output] = outputs
                if grid is not None:
                    rounded[output, grid] = outputs
            elif grid is not None and program.is_moved(step):
                taken = on_grid(step.inputs[0], grid)
                moved = taken if program.is_passed(step) else step.call({step.inputs[0]: taken})[0]
                rounded[output, grid] = moved
            else:
                floats.update(zip(step.outputs, step.call(floats), strict=True))
        return [floats[number] for number in self.given]


def _fake_quantized(tensor: Any, grid: Grid, offset: float = 0.0) -> Any:
    """The codes of `grid` times its scale: numbers that are `offset` above those they mean."""
    import tensorflow as tf

    moved = tensor + np.float32(offset) if offset else tensor
    rounded = tf.quantization.fake_quant_with_min_max_args(moved, 0.0, _LEVELS * grid.scale, 8)
    if grid.levels == _LEVELS:
        return rounded
    return tf.minimum(rounded, np.float32(grid.levels * grid.scale))


def _multiplied(step: IntegerStep, inputs: Any, grid: Grid | None) -> Any:
    """What a dense layer or a convolution of integers gives, on `grid` if there is one."""
    import tensorflow as tf

    layer, kernel = step.layer, step.kernel
    is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    scales = kernel.scales / step.grid.scale
    limits = (_WEIGHT_LEVELS * scales).astype("float32")
    weights = (kernel.codes * scales).astype("float32")
    if is_depthwise:
        # The converter finds the channels along the last axis.
        weights = weights.reshape(*weights.shape[:2], -1)
    weights = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        weights, -limits, limits, 8, narrow_range=True
    )
    if isinstance(layer, LowBitDense):
        outputs = ops.matmul(inputs, weights)
    else:
        convolve = ops.depthwise_conv if is_depthwise else ops.conv
        outputs = convolve(
            inputs,
            ops.reshape(weights, layer.kernel.shape),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
    bias = kernel.bias + (grid.offset if grid is not None else 0.0)
    outputs = tf.nn.bias_add(outputs, bias.astype("float32"))
    return outputs if grid is None else _fake_quantized(outputs, grid)
