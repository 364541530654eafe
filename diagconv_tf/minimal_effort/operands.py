"""Which elements of an output gradient a backward pass keeps.

Sources: Training Simplification and Model Simplification for Deep Learning: A Minimal Effort
Back Propagation Method, arXiv 1711.06528, sections 2.1 (meProp) and 2.2 (unified); meProp,
arXiv 1706.06197; where these leave something open, the authors' PyTorch code
(`lancopku/meProp`): the bias gets the whole gradient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import keras
from keras import ops

from diagconv_tf.lowbit import backends, noise
from diagconv_tf.lowbit.operands import Serialisable


def check_choice(k: Any, ratio: Any) -> None:
    """Refuses what does not say how many units are kept.

    Raises:
        ValueError: unless exactly one is given, and `k` is an integer from 1, or `ratio` a
            number above 0 and up to 1.
    """
    if (k is None) == (ratio is None):
        raise ValueError(f"Expected one of `k` and `ratio`. Received: k={k!r}, ratio={ratio!r}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"Expected `k` to be an integer of at least 1. Received: k={k!r}")
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if ratio is not None and not (is_number and 0 < ratio <= 1):
        raise ValueError(
            f"Expected `ratio` to be a number above 0 and up to 1. Received: ratio={ratio!r}"
        )


def chosen(gradient: Any, k: int) -> Any:
    """Which elements of each row are its k largest by magnitude.

    Of equal ones those of the lower units are; NaN counts as the largest. Exactly k of each
    row are chosen, also where fewer are not zero.

    Args:
        gradient: tensor, units on the last axis.
        k: at least 1; what is more than there are units means all of them.

    Returns:
        A boolean tensor of the gradient's shape.
    """
    gradient = ops.convert_to_tensor(gradient)
    if k >= gradient.shape[-1]:
        return ops.ones_like(gradient, dtype="bool")
    return backends.largest(_magnitudes(gradient), k)


def _magnitudes(gradient: Any) -> Any:
    # A gradient that is NaN must stay so: scaling of losses and people look for it.
    size = ops.abs(gradient)
    return ops.where(ops.isnan(size), ops.full_like(size, math.inf), size)


@dataclasses.dataclass(frozen=True)
class _Kept(Serialisable):
    """How many units are kept: a number, or a share of those that there are."""

    k: int | None = None
    ratio: float | None = None

    #: The products alone have a sparse gradient (authors' code).
    covers_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self.k, self.ratio)

    def keeps(self, units: int) -> int:
        """How many of so many units are kept.

        `ratio` is rounded to a whole number of units, at least one.
        """
        if self.k is not None:
            return min(self.k, units)
        assert self.ratio is not None
        return min(units, max(1, round(self.ratio * units)))

    @property
    def _amount(self) -> str:
        return f"{self.k}" if self.k is not None else f"{100 * self.ratio:g} %"  # type: ignore[operator]


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class TopK(_Kept):
    """Keeps the k largest elements of an output gradient, and zeros elsewhere.

    Per example (arXiv 1711.06528, section 2.1): of each row the k elements of largest
    magnitude; of equal ones, those of the lower units. A row is one output vector of a
    product: an example, and where the inputs have further axes, one position of it.

    Unified (section 2.2): the k units j with the largest sum over rows of |g_ij|, the same
    for all rows of a batch, so that the backward pass has dense products of k columns. A
    replica of a `tf.distribute` strategy chooses by its own part of the batch.

    Attributes:
        k: units that are kept; where a layer has no more, nothing changes.
        ratio: the share of units that are kept, instead of `k`.
        unified: whether all rows keep the same units.

    Raises:
        ValueError: unless exactly one of `k` and `ratio` is given, `k` an integer from 1,
            `ratio` above 0 and up to 1.
    """

    unified: bool = False

    uses_seed: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"top {self._amount} {'of the batch' if self.unified else 'per example'}"

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        """`gradient` with zeros where it is not kept.

        Args:
            gradient: tensor of shape (rows, units), or (rows, groups, units), whose groups
                choose each for itself.
            seed: not used.
        """
        gradient = ops.convert_to_tensor(gradient)
        units = gradient.shape[-1]
        if self.keeps(units) == units:
            return gradient
        of = self._totals(gradient) if self.unified else gradient
        kept = chosen(of, self.keeps(units))
        return ops.where(kept, gradient, ops.zeros_like(gradient))

    def columns(self, gradient: Any) -> Any:
        """The units that all rows keep, as `UnitOperand.columns`."""
        totals = self._totals(ops.convert_to_tensor(gradient))
        return backends.largest_columns(totals, self.keeps(totals.shape[-1]))

    @staticmethod
    def _totals(gradient: Any) -> Any:
        # Many rows of a half-precision gradient would leave its range, or its precision.
        wide = _magnitudes(gradient)
        if keras.backend.standardize_dtype(wide.dtype) != "float64":
            wide = ops.cast(wide, "float32")
        return ops.sum(wide, axis=0)


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class RandomK(_Kept):
    """Keeps k random elements of each row, whatever their size.

    The comparison of arXiv 1706.06197, figure 4, which shows that the choice matters. As
    there, the kept elements are not scaled.

    Attributes:
        k: as of `TopK`.
        ratio: as of `TopK`.
        seed: of the choice; None draws one for each layer when it gets the operand, which
            `keras.utils.set_random_seed` decides.
    """

    seed: int | None = None

    uses_seed: ClassVar[bool] = True
    unified: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"random {self._amount} per example"

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        """`gradient` with zeros where it is not kept.

        Args:
            gradient: as of `TopK`.
            seed: integer tensor of shape (2,), or an integer; None means 0.
        """
        gradient = ops.convert_to_tensor(gradient)
        units = gradient.shape[-1]
        if self.keeps(units) == units:
            return gradient
        if seed is None or isinstance(seed, int):
            seed = noise.as_seed(seed or 0)
        drawn = noise.uniform(ops.shape(gradient), seed)
        kept = backends.largest(drawn, self.keeps(units))
        return ops.where(kept, gradient, ops.zeros_like(gradient))

    def columns(self, gradient: Any) -> Any:
        raise NotImplementedError("Each row keeps units of its own.")
