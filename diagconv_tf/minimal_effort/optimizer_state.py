"""An optimizer's state, apart by the variables that it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from diagconv_tf.class_swap import instance_attribute


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """A new optimizer of the same class and configuration, built for given variables.

    Attributes:
        optimizer: the new optimizer. Its `variables` are in the order of those of the
            optimizer that it was made after.
        slots: index in `optimizer.variables` → index of the variable to which the state
            belongs. State of no variable, such as the count of steps, is missing, and so is
            what an optimizer keeps in another shape than its variables (Adafactor's sums).
    """

    optimizer: keras.optimizers.Optimizer
    slots: dict[int, int]


def twin_of(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> Twin:
    """Builds a new optimizer like `optimizer` for `variables`, which stay as they are."""
    twin = type(optimizer).from_config(optimizer.get_config())
    inner = innermost(twin)
    add = inner.add_variable_from_reference
    index = {id(variable): i for i, variable in enumerate(variables)}
    owners: dict[int, int] = {}

    def record(reference_variable: Any, *args: Any, **kwargs: Any) -> keras.Variable:
        slot = add(reference_variable, *args, **kwargs)
        owners[id(slot)] = index[id(reference_variable)]
        return slot

    # The public way by which optimizers add state that belongs to a variable.
    with instance_attribute(inner, "add_variable_from_reference", record):
        twin.build(list(variables))
    slots = {i: owners[id(v)] for i, v in enumerate(twin.variables) if id(v) in owners}
    return Twin(twin, slots)


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer inside wrappers such as `LossScaleOptimizer`."""
    while (inner := getattr(optimizer, "inner_optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def renew(optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """Brings an optimizer's state to where training starts.

    The learning rate stays, and so does what wrappers keep, such as the scale of the loss. A
    learning-rate schedule starts again, because it depends on the optimizer's count of steps.

    Args:
        optimizer: a built optimizer.
        variables: those that it was built for.
    """
    new = twin_of(innermost(optimizer), variables).optimizer
    for old, fresh in zip(innermost(optimizer).variables, new.variables, strict=True):
        if old.name != "learning_rate":
            old.assign(fresh)
