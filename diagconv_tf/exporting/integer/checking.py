"""How a file of integers is compared with its model.

Rounding to integers magnifies. A sum that lies between two integers becomes the other one
when it changes by next to nothing, that changes the sums of the next layer by a part of a
step, and so more of them. In a deep network the smallest difference becomes as large as
the noise of rounding itself. The integers of a file differ from the model in one thing:
their biases are rounded, to multiples of the product of the scales of inputs and kernel.
So the file is compared with the model whose biases are rounded in the same way. It must
give the same numbers, but where roundings of float arithmetic are magnified; how often that
happens, the model tells when its weights are changed by as much. How far the file is from
the model as it was given is reported, and not limited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from diagconv_tf.exporting.comparing import Reference
from diagconv_tf.exporting.integer.plan import IntegerStep, Program
from diagconv_tf.exporting.keras_run import KerasRun, perturbed
from diagconv_tf.exporting.tensors import Leaf

#: How far a number of a file may be from Keras's, in steps of which 255 span an output.
STEPS = 1.0
#: Examples that are drawn where no sample is given: a share needs more than a few.
EXAMPLES = 32
_LEVELS = 255
#: The share of numbers that must be so near.
_LEAST_SHARE = 0.99
#: Where roundings alone move more numbers than this leaves, a file cannot be told from a wrong one.
_FLOOR = 0.5
#: Relative changes that stand for the roundings of sums in float32: some units of 2**-24.
_ROUNDINGS = 2.0**-21
_DRAWS = 3


@dataclasses.dataclass(frozen=True)
class IntegerReference:
    """What a file of integers must compute.

    Attributes:
        wanted: for each of the inputs, the outputs of the model with rounded biases.
        given: the same of the model as it was given.
        steps: how far a number may be from `wanted`.
        least_share: the share of numbers that must be so near.
    """

    wanted: Sequence[Sequence[Leaf]]
    given: Sequence[Sequence[Leaf]]
    steps: float
    least_share: float

    @classmethod
    def of(
        cls, run: KerasRun, weights: Sequence, reference: Reference, steps: float
    ) -> IntegerReference:
        """Runs the model.

        Args:
            run: the model with rounded biases.
            weights: those of the model as it was given.
            reference: what `run` computes.
            steps: how far a number may be off.
        """
        wanted = [[each.leaf for each in of_batch] for of_batch in reference.outputs]
        inputs = [each.structure for each in reference.inputs]
        given = [run(structure, weights) for structure in inputs]
        shares = []
        for seed in range(_DRAWS):
            rng = np.random.default_rng(seed)
            moved = perturbed(run.weights, _ROUNDINGS, rng)
            outputs = [run(perturbed(each, _ROUNDINGS, rng), moved) for each in inputs]
            shares.append(share_within(outputs, wanted, steps))
        # Model and file both round.
        usual = 1 - 2 * (1 - float(np.mean(shares)))
        return cls(wanted, given, steps, min(_LEAST_SHARE, max(_FLOOR, usual)))


def share_within(
    found: Sequence[Sequence[Leaf]], wanted: Sequence[Sequence[Leaf]], steps: float
) -> float:
    """The share of numbers that differ by at most `steps`, of which 255 span an output.

    The span reaches from the least to the largest number of an output over all inputs,
    zero included.

    Args:
        found: for each batch of inputs, the outputs.
        wanted: the same, of the model.
        steps: how far a number may be off.
    """
    values: dict[tuple, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for side, batches in enumerate((found, wanted)):
        for of_batch in batches:
            for leaf in of_batch:
                pair = values.setdefault(leaf.path, ([], []))
                pair[side].append(np.asarray(leaf.value, "float64").ravel())
    right = []
    for pair in values.values():
        one, other = (np.concatenate(side) for side in pair)
        span: float = np.max(other, initial=0.0) - np.min(other, initial=0.0)
        right.append(np.abs(one - other) <= steps * span / _LEVELS)
    return float(np.concatenate(right).mean())


def rounded_biases(program: Program) -> dict[int, np.ndarray]:
    """The variables of a model that change when biases become integers.

    Args:
        program: what a file of the model computes.

    Returns:
        `id` of a variable → its value, with which the folded bias is a multiple of the
        product of the scales of inputs and kernel. A layer without bias and batch norm has
        no such variable.
    """
    changes: dict[int, np.ndarray] = {}
    for step in program.calls.steps:
        grid = program.grids[step.outputs[0]]
        if not isinstance(step, IntegerStep) or grid is None:
            continue
        variable, factor = step.bias_variable
        # Two calls of a shared layer may want two values.
        if variable is None or id(variable) in changes:
            continue
        integers = step.kernel.integer_bias(grid.offset) * step.kernel.scales
        added = integers - grid.offset - step.kernel.bias
        before = keras.ops.convert_to_numpy(variable).astype("float64")
        changes[id(variable)] = (before + added * factor).astype("float32")
    return changes


def with_rounded_biases(program: Program, run: KerasRun) -> list:
    """The weights of `run`, a program's model, with its `rounded_biases`."""
    changes = rounded_biases(program)
    return [
        keras.ops.convert_to_tensor(changes[id(variable)], variable.dtype)
        if id(variable) in changes
        else weight
        for variable, weight in zip(program.model.variables, run.weights, strict=True)
    ]
