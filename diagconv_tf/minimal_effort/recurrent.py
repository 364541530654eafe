"""Keras's LSTM and GRU layers, the gradients of whose gates go through an operand.

Each step multiplies its inputs and its state by matrices. The gradient of each of these
products, and of each gate for itself, goes through the operand; the biases get the whole
gradient. What else a step computes has its ordinary backward pass.

arXiv 1711.06528 has such an LSTM, but leaves open whether k counts the units of a gate or of
all gates; the authors published no code of it. Its k (10 of 500 units) is read as of a gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from diagconv_tf.lowbit import units
from diagconv_tf.lowbit.layers import (
    active,
    multiply,
    noise_of,
    operands_of,
    say_if_ordinary,
    seed_for,
    why_not_operands,
)
from diagconv_tf.lowbit.operands import Operands, UnitOperand
from diagconv_tf.minimal_effort.layers import GradientLayer

_NONE = Operands()

Step = Callable[[Any, Any], tuple[Any, list[Any]]]


class _RecurrentLayer(GradientLayer):
    """A recurrent layer, the gradients of whose gates go through an operand."""

    def __init__(self, *args: Any, operands: Any = _NONE, **kwargs: Any) -> None:
        super().__init__(*args, operands=operands, **kwargs)
        gradients = self.operands.gradients
        if gradients is not None and not isinstance(gradients, UnitOperand):
            raise ValueError(
                "Expected a gradient operand that keeps some units of each gate, such as "
                f"TopK(10). Received: {gradients}"
            )
        if reasons := why_not_recurrent(self):
            raise ValueError(
                f"Expected a layer whose gradients can change. Received: layer '{self.name}': "
                f"{'; '.join(reasons)}"
            )

    # Keras reads these names.
    def build(self, sequences_shape: Any, initial_state_shape: Any = None) -> None:
        keras.layers.RNN.build(self, sequences_shape, initial_state_shape)
        say_if_ordinary(self)

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> tuple[Any, Any, Any]:
        is_lstm = isinstance(self, keras.layers.LSTM)
        gradients, noise = active(operands_of(self).gradients, self.units), noise_of(self)
        if not isinstance(gradients, UnitOperand):
            # Keras's own, which on GPUs is one kernel of cuDNN.
            stock = keras.layers.LSTM if is_lstm else keras.layers.GRU
            return stock.inner_loop(self, sequences, initial_state, mask, training)
        products = _GateProducts(gradients, self.units, seed_for(gradients, noise))
        step = (_lstm_step if is_lstm else _gru_step)(self.cell, products, training)
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        loop = _Loop(self, step)
        return keras.layers.RNN.inner_loop(loop, sequences, initial_state, mask, training)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class MinimalEffortLSTM(_RecurrentLayer, keras.layers.LSTM):
    """`keras.layers.LSTM` with a choice of what the gradients of its gates go through.

    With an operand that drops units it does not use cuDNN, for inference neither: `restore` it
    for that.
    """


@keras.saving.register_keras_serializable(package="diagconv_tf")
class MinimalEffortGRU(_RecurrentLayer, keras.layers.GRU):
    """`keras.layers.GRU` with a choice of what the gradients of its gates go through.

    With an operand that drops units it does not use cuDNN, for inference neither: `restore` it
    for that.
    """


def why_not_recurrent(layer: keras.layers.Layer) -> list[str]:
    """Every reason why the gradients of a layer's gates cannot go through an operand."""
    reasons = why_not_operands(layer)
    if layer.use_cudnn is True:
        reasons.append("use_cudnn=True: cuDNN's kernel has a backward pass of its own")
    return reasons


class _Loop:
    """A recurrent layer as `keras.layers.RNN.inner_loop` sees it, with another cell."""

    def __init__(self, layer: keras.layers.RNN, cell: Step) -> None:
        self._layer, self.cell = layer, cell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@dataclasses.dataclass(frozen=True)
class _GateProducts:
    """The products of a step.

    Attributes:
        operand: what their gradients go through.
        units: of each gate.
        seed: of the call; each step has the same.
    """

    operand: UnitOperand
    units: int
    seed: Any

    def __call__(self, inputs: Any, kernel: Any, masks: Any, gates: int) -> Any:
        """The product of inputs and a kernel of so many gates, of shape (batch, gates * units).

        Args:
            inputs: of shape (batch, features).
            kernel: of shape (features, gates * units).
            masks: of dropout: one for all gates, a list with one for each, or None.
            gates: number of gates.
        """
        if isinstance(masks, list | tuple):
            parts = zip(masks, ops.split(kernel, gates, axis=1), strict=True)
            products = [self._product(ops.multiply(inputs, mask), part, 1) for mask, part in parts]
            return ops.concatenate(products, axis=-1)
        if masks is not None:
            inputs = ops.multiply(inputs, masks)
        return self._product(inputs, kernel, gates)

    def _product(self, inputs: Any, kernel: Any, gates: int) -> Any:
        layout = units.Units(self.units, groups=gates)
        if (unified := units.unified_operand(self.operand)) is not None:
            return multiply(units.MatrixProduct(unified, layout), inputs, kernel)
        return units.through(self.operand, layout, ops.matmul(inputs, kernel), self.seed)


def _masks(cell: Any, inputs: Any, state: Any, training: Any) -> tuple[Any, Any]:
    """Those of dropout for inputs and state: None, one, or a list with one for each gate."""
    ours, recurrent = None, None
    if training and 0.0 < cell.dropout < 1.0:
        ours = cell.get_dropout_mask(inputs)
    if training and 0.0 < cell.recurrent_dropout < 1.0:
        recurrent = cell.get_recurrent_dropout_mask(state)
    return ours, recurrent


def _lstm_step(cell: keras.layers.LSTMCell, products: _GateProducts, training: Any) -> Step:
    """What `cell.call` computes, in the same order of operations up to dropout."""

    def step(inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        state, carry = states
        for_inputs, for_state = _masks(cell, inputs, state, training)
        gates = ops.add(
            products(inputs, cell.kernel, for_inputs, 4),
            products(state, cell.recurrent_kernel, for_state, 4),
        )
        if cell.use_bias:
            gates = ops.add(gates, cell.bias)
        enter, forget, candidate, leave = ops.split(gates, 4, axis=1)
        enter, forget = cell.recurrent_activation(enter), cell.recurrent_activation(forget)
        carry = forget * carry + enter * cell.activation(candidate)
        state = cell.recurrent_activation(leave) * cell.activation(carry)
        return state, [state, carry]

    return step


def _gru_step(cell: keras.layers.GRUCell, products: _GateProducts, training: Any) -> Step:
    """What `cell.call` computes, in the same order of operations up to dropout."""
    both = 2 * cell.units

    def step(inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        (state,) = states
        for_inputs, for_state = _masks(cell, inputs, state, training)
        of_inputs = products(inputs, cell.kernel, for_inputs, 3)
        if cell.use_bias:
            bias = ops.convert_to_tensor(cell.bias)
            of_inputs = ops.add(of_inputs, bias[0] if cell.reset_after else bias)
        kernel = ops.convert_to_tensor(cell.recurrent_kernel)
        if cell.reset_after:
            of_state = products(state, kernel, for_state, 3)
            if cell.use_bias:
                of_state = ops.add(of_state, bias[1])
        else:
            first = for_state[:2] if isinstance(for_state, list | tuple) else for_state
            of_state = products(state, kernel[:, :both], first, 2)
        gates = cell.recurrent_activation(ops.add(of_inputs[:, :both], of_state[:, :both]))
        update, reset = ops.split(gates, 2, axis=1)
        if cell.reset_after:
            remembered = reset * of_state[:, both:]
        else:
            last = for_state[2] if isinstance(for_state, list | tuple) else for_state
            remembered = products(reset * state, kernel[:, both:], last, 1)
        candidate = cell.activation(ops.add(of_inputs[:, both:], remembered))
        state = update * state + (1 - update) * candidate
        return state, [state]

    return step
