"""Removes hidden units: zeros for all that belongs to them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf import keras_internals
from diagconv_tf.minimal_effort.optimizer_state import twin_of
from diagconv_tf.minimal_effort.unit_graph import NO_UNIT, UnitGraph


class Remover:
    """Sets to zero what belongs to units: in the model's weights and the optimizer's state.

    Then nothing of a unit reaches the outputs, and no gradient reaches the unit. Where zeros
    in front of its activation are zeros behind it (ReLU, tanh, …), the rows that read it have
    no gradient either, so that it stays removed in any further training. For others
    `activeness.attach` keeps these at zero. The state must be zero as well: the momentum of
    a weight would move it once more.

    Args:
        graph: the units of a model.
        optimizer: a built optimizer, or None.
    """

    def __init__(self, graph: UnitGraph, optimizer: keras.optimizers.Optimizer | None) -> None:
        self._graph = graph
        self._state: dict[int, list[keras.Variable]] = {}
        if optimizer is not None and optimizer.built:
            trained = keras_internals.optimized_variables(optimizer)
            slots = twin_of(optimizer, trained).slots
            for position, index in slots.items():
                state = self._state.setdefault(id(trained[index]), [])
                state.append(optimizer.variables[position])

    def remove(self, units: np.ndarray) -> None:
        """Removes units.

        Args:
            units: a flag for each unit of the graph.
        """
        flags: np.ndarray = np.append(units, False)
        for part in self._graph.parts:
            gone = flags[part.units] & (part.units != NO_UNIT)
            # A variance of zero is no neutral one. What it divides is zero.
            if not gone.any() or part.name == "moving_variance":
                continue
            for variable in (part.variable, *self._state.get(id(part.variable), ())):
                if tuple(variable.shape) == tuple(part.variable.shape):
                    variable.assign(_with_zeros(variable, part.axis, gone))


def _with_zeros(variable: keras.Variable, axis: int, gone: np.ndarray) -> Any:
    values = np.array(ops.convert_to_numpy(variable))
    values[(slice(None),) * axis + (gone,)] = 0
    return values
