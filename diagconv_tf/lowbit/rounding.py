"""An optimizer whose weights stay on a grid: rounded after every update.

Source: Training Quantized Nets: A Deeper Understanding, arXiv 1706.02379, section 3.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.lowbit import backends, noise

#: Names of the variables that `select=None` can choose.
_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel")
#: Significant bits of a number, by dtype.
_PRECISION = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
#: Between the seeds of one step's variables.
_BETWEEN_VARIABLES = 0x3C6EF372

Select = Callable[[keras.Variable], bool]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The numbers `offset + delta * k`, for integers k, that are at most `limit` from zero.

    Attributes:
        delta: distance of neighbours.
        offset: one of them.
        limit: bound of their absolute values; None for none.

    Raises:
        ValueError: if `delta` or `limit` is not positive, or no number is left.
    """

    delta: float
    offset: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "limit"):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(
                    f"Expected `{name}` to be a positive number. Received: {name}={value!r}"
                )
        if not (_is_number(self.offset) and math.isfinite(self.offset)):
            raise ValueError(f"Expected `offset` to be a number. Received: offset={self.offset!r}")
        if self.limit is not None and self._steps[0] > self._steps[1]:
            raise ValueError(
                "Expected a number of the grid within the limit. Received: "
                f"delta={self.delta}, offset={self.offset}, limit={self.limit}"
            )

    @property
    def _steps(self) -> tuple[float, float]:
        """The smallest and the largest k."""
        if self.limit is None:
            return -math.inf, math.inf
        # A limit on the grid belongs to it, whatever the rounding of the division.
        slack = 1e-9
        lowest = math.ceil((-self.limit - self.offset) / self.delta - slack)
        return lowest, math.floor((self.limit - self.offset) / self.delta + slack)

    @property
    def levels(self) -> float:
        """How many numbers it has; infinite without a limit."""
        lowest, highest = self._steps
        return highest - lowest + 1

    def why_not(self, dtype: str, largest: float) -> str:
        """Why numbers up to `largest` of a dtype cannot be on the grid; empty if they can."""
        reach = self.limit if self.limit is not None else largest
        # What the dtype moves a number of the grid must be small against a step: `stochastic`.
        if (reach + abs(self.offset)) / self.delta < 2.0 ** (_PRECISION[dtype] - 4):
            return ""
        return (
            f"{dtype} has {_PRECISION[dtype]} significant bits, too few for steps of "
            f"{self.delta:g} up to {reach:g}"
        )

    def nearest(self, values: Any) -> Any:
        """The nearest number of the grid; of two, the one farther from zero.

        With a grid of ±1 it is the sign, and 1 for 0. In the paper: Q_d.
        """
        steps, dtype = self._to_steps(values)
        up = ops.greater_equal(ops.convert_to_tensor(values), 0)
        rounded = ops.where(up, ops.floor(steps + 0.5), ops.ceil(steps - 0.5))
        return self._to_values(rounded, dtype)

    def stochastic(self, values: Any, seed: Any) -> Any:
        """A neighbour on the grid, the upper one with the probability that makes the mean right.

        In the paper: Q_s. Values on the grid stay what they are.

        Args:
            values: floating tensor.
            seed: as `noise.uniform` takes it.
        """
        steps, dtype = self._to_steps(values)
        # The dtype has moved values of the grid away from it, by less than this.
        error = 2.0 ** (2 - _PRECISION[dtype]) * (ops.abs(steps) + abs(self.offset / self.delta))
        whole, lower = ops.round(steps), ops.floor(steps)
        is_on_grid = ops.abs(steps - whole) <= error
        drawn = ops.cast(noise.uniform(ops.shape(steps), seed), steps.dtype) + 0.5
        rounded = lower + ops.cast(drawn < steps - lower, steps.dtype)
        return self._to_values(ops.where(is_on_grid, whole, rounded), dtype)

    def _to_steps(self, values: Any) -> tuple[Any, str]:
        values = ops.convert_to_tensor(values)
        dtype = keras.backend.standardize_dtype(values.dtype)
        wide = values if dtype == "float64" else ops.cast(values, "float32")
        return (wide - self.offset) / self.delta, dtype

    def _to_values(self, steps: Any, dtype: str) -> Any:
        if self.limit is not None:
            steps = ops.clip(steps, *map(float, self._steps))
        return ops.cast(steps * self.delta + self.offset, dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class StochasticRounding(keras.optimizers.Optimizer):
    """Wraps an optimizer, and rounds selected variables to a grid after each of its updates.

    The methods of arXiv 1706.02379: SR is `rounding="stochastic"`, R is
    `rounding="nearest"`, Big SR is SR with a larger batch. For ±1 weights the grid is
    `delta=2.0, offset=1.0, limit=1.0`. (BC needs no rounding of weights: it is the
    quantizer `BinaryConnect` of a layer's kernel.)

    While the update is smaller than a step of the grid, the probability of a change is
    proportional to the learning rate, so that the stationary distribution of SR does not
    depend on it: a smaller rate, as in annealing, only makes it slower (section 5). A
    larger batch does help.

    Selected variables are on the grid from when the optimizer is built, where they are
    rounded to the nearest. They also are after what the inner optimizer does to them:
    weight decay, and the moving averages that overwrite weights, also those at the end of
    `fit`, which are rounded to the nearest. Steps that only accumulate gradients leave them
    as they are. Gradients are computed with the rounded weights.

    With float16 Keras puts its `LossScaleOptimizer` around this one, which is the order
    that works. The noise is the same on all replicas, which must stay equal. It is new in
    each step, and its state is saved with the optimizer's.

    Args:
        optimizer: the optimizer to wrap, or its name.
        delta: distance of neighbours on the grid.
        offset: a number of the grid: it has `offset + delta * k` for integers k.
        limit: bound of the absolute values; None for none.
        rounding: `"stochastic"` or `"nearest"`.
        select: whether a variable is rounded, a function of a `keras.Variable`. None
            means the kernels of convolutions and dense layers but the first and the last,
            by their names and in the order of the model's variables.
        seed: of the noise; None draws one when the optimizer is built, which
            `keras.utils.set_random_seed` decides.
        name: the optimizer's name.

    Raises:
        ValueError: if an argument is none of these, `optimizer` rounds already, or it is a
            `LossScaleOptimizer`; and on building, if no variable is selected, or the dtype
            of one has too few bits for the grid.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        delta: float,
        offset: float = 0.0,
        limit: float | None = None,
        rounding: str = "stochastic",
        select: Select | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        grid = Grid(delta, offset, limit)
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(
                'Expected `rounding` to be "stochastic" or "nearest". '
                f"Received: rounding={rounding!r}"
            )
        if select is not None and not callable(select):
            raise ValueError(f"Expected `select` to be a function or None. Received: {select!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"Expected `seed` to be an integer or None. Received: seed={seed!r}")
        optimizer = keras.optimizers.get(optimizer)
        _check_inner(optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = optimizer
        self.grid = grid
        self.rounding = rounding
        self.select = select
        self.seed = seed
        self._rounded: tuple[keras.Variable, ...] = ()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the state, and brings the selected variables to the grid."""
        if self.built:
            return
        rounded = _selected(variables, self.select)
        with backends.outside_graphs():
            for variable in rounded:
                values = ops.convert_to_numpy(variable).astype("float64")
                largest = float(np.max(np.abs(values), initial=0.0))
                if reason := self.grid.why_not(variable.dtype, largest):
                    raise ValueError(
                        f"Expected a grid that the dtype of '{variable.path}' can hold. "
                        f"Received: {reason}"
                    )
            for variable in rounded:
                variable.assign(self.grid.nearest(variable))
        # Not `self._rounded =`: TensorFlow would take them for the optimizer's own.
        self.__dict__["_rounded"] = tuple(rounded)
        seed = random.getrandbits(31) if self.seed is None else self.seed & 0x7FFFFFFF
        self._noise: keras.Variable = self.add_variable(
            shape=(2,),
            initializer=lambda shape, dtype: ops.convert_to_tensor([seed, 0], dtype=dtype),
            dtype="int32",
            aggregation="only_first_replica",
            name="noise",
        )
        self.inner_optimizer.build(variables)
        super().build(variables)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if not self.built:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        self.inner_optimizer.apply(grads, trainable_variables)
        # A copy: the state is changed before the noise is made of it.
        seed = ops.multiply(self._noise, 1)
        self._noise.assign(ops.add(seed, np.array([0, 1], "int32")))
        backends.update(self._rounded, self._rounding_of, seed)

    def _rounding_of(self, index: int, value: Any, seed: Any) -> Any:
        """The rounded value of the variable number `index`."""
        if self.rounding == "nearest":
            return self.grid.nearest(value)
        # Wraps around, as it should.
        first = (index * _BETWEEN_VARIABLES) & 0xFFFFFFFF
        shift = np.array([first, 0], "uint32").view("int32")
        return self.grid.stochastic(value, ops.bitwise_xor(seed, shift))

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)
        wanted = {id(variable) for variable in var_list}
        for variable in self._rounded:
            if id(variable) in wanted:
                variable.assign(self.grid.nearest(variable))

    @property
    def variables(self) -> list[keras.Variable]:
        return [*super().variables, *self.inner_optimizer.variables]

    @property
    def iterations(self) -> Any:
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def loss_scale_factor(self) -> Any:
        """The inner optimizer's: it scales the gradients back."""
        inner = vars(self).get("inner_optimizer")
        return None if inner is None else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        # Keras sets it before there is an inner optimizer, and to end its scaling.
        if "inner_optimizer" in vars(self):
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss: Any) -> Any:
        return self.inner_optimizer.scale_loss(loss)

    def get_config(self) -> dict[str, Any]:
        # Of the base class's arguments only the name has a meaning here.
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            **dataclasses.asdict(self.grid),
            "rounding": self.rounding,
            "select": keras.saving.serialize_keras_object(self.select),
            "seed": self.seed,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> StochasticRounding:
        made = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in ("optimizer", "select")
        }
        return cls(**{**config, **made})


def _check_inner(optimizer: keras.optimizers.Optimizer) -> None:
    inner: Any = optimizer
    while inner is not None:
        if isinstance(inner, StochasticRounding):
            raise ValueError(
                "Expected an optimizer that does not round yet. Received: one inside a "
                f"StochasticRounding already ({type(optimizer).__name__})"
            )
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "Expected the loss scaling outside: LossScaleOptimizer(StochasticRounding(...)). "
                "Received: a LossScaleOptimizer inside"
            )
        inner = getattr(inner, "inner_optimizer", None)


def _selected(variables: Sequence[keras.Variable], select: Select | None) -> list[keras.Variable]:
    """The variables that are rounded.

    Raises:
        ValueError: if there are none.
    """
    if select is not None:
        chosen = [variable for variable in variables if select(variable)]
    else:
        kernels = [v for v in variables if v.name in _KERNELS and len(v.shape) > 1]
        # Recurrent cells name one of their kernels so.
        cells = {v.path.rpartition("/")[0] for v in variables if v.name == "recurrent_kernel"}
        chosen = [v for v in kernels if v.path.rpartition("/")[0] not in cells][1:-1]
    if not chosen:
        raise ValueError(
            "Expected variables to round: kernels besides the first and the last, or what "
            f"`select` chooses. Received: none of {len(variables)}"
        )
    return chosen
