"""MinimalEffort: which layers of a model train with few elements of their output gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import keras

from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.lowbit.operands import UnitOperand
from diagconv_tf.lowbit.units import unit_count
from diagconv_tf.minimal_effort.operands import TopK, check_choice
from diagconv_tf.model_tree import PlacedLayer
from diagconv_tf.treatment import LAST, Facts, SelectiveTreatment, TreatedLayer

#: Units from which unified products made the backward pass of a dense layer faster, of the
#: sizes that were measured: 128 rows, a sixteenth of the units, CPUs, TensorFlow and JAX
#: (scripts/benchmark_minimal_effort.py).
PAYS_FROM = 1024


@dataclasses.dataclass(frozen=True)
class MinimalEffort(SelectiveTreatment):
    """Minimal effort back-propagation (meProp, arXiv 1711.06528) for the layers of a model.

    The backward pass of each layer's product takes the `k` elements of largest magnitude of
    the output gradient, or the share `ratio` of them. The forward pass, the gradient of the
    bias, and all that is no product stay as they are.

    Dense, einsum, LSTM and GRU layers are the paper's; of a recurrent layer each gate keeps
    k units in each step. For convolutions, where the channels of each position are the
    units, there is no source: they are an extension. Layers of other kinds stay as they are.

    As in the authors' code the output layer is exempt: no layer with a kernel comes after.
    Layers keep their lowerings, and their low-bit kernels and inputs.

    Attributes:
        k: elements that are kept; a layer that has no more units stays as it is.
        ratio: the share of units that are kept, instead of `k`; rounded, at least one.
        unified: whether all examples of a batch keep the same units, so that the products
            of the backward pass are small. Only then can it be faster.
        skip: layers that stay as they are: `"first"`, `"last"`, paths or globs.
        include: paths or globs of the layers to treat; None means all. A path that names a
            container means all that is in it.
        exclude: the same, for layers to leave as they are.

    Raises:
        ValueError: unless exactly one of `k` and `ratio` is given, `k` an integer from 1,
            `ratio` above 0 and up to 1.
    """

    kinds: ClassVar[tuple[str, str]] = (
        "dense, convolution and recurrent layers",
        "dense, convolution or recurrent layer",
    )
    effect: ClassVar[str] = "This changes the gradients of training, not what the model computes."
    needs: ClassVar[str] = "gradients"

    k: int | None = None
    ratio: float | None = None
    unified: bool = False
    skip: tuple[str, ...] = (LAST,)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self.k, self.ratio)
        self.check_selection()

    @property
    def _operand(self) -> TopK:
        return TopK(self.k, self.ratio, self.unified)

    def __str__(self) -> str:
        amount = f"k={self.k}" if self.k is not None else f"ratio={self.ratio:g}"
        return f"MinimalEffort({amount}{', unified=True' if self.unified else ''})"

    def _treated(self, place: PlacedLayer, facts: Facts) -> TreatedLayer:
        layer, operand = place.layer, self._operand
        name = type(layer).__name__
        if reasons := _why_not(layer):
            return TreatedLayer(place.path, name, None, tuple(reasons))
        count = unit_count(layer)
        assert count is not None  # Else there are reasons.
        kept = operand.keeps(count)
        if kept == count:
            reason = f"ordinary back-propagation: it would keep all of its {count} units"
            return TreatedLayer(place.path, name, None, (reason,))
        operands = dataclasses.replace(operands_of(layer), gradients=operand)
        why = (f"keeps {kept} of {count} units",)
        return TreatedLayer(place.path, name, operands, why, tuple(self._costs(count)))

    def _costs(self, count: int) -> Iterator[str]:
        """What the report says of layers whose backward pass does not become faster."""
        if not self.unified:
            yield "has a slower backward pass: whole products, and a choice in each row"
        elif count < PAYS_FROM:
            yield f"has no faster backward pass, with fewer than {PAYS_FROM} units"


def _why_not(layer: keras.layers.Layer) -> list[str]:
    reasons = []
    if isinstance(layer, keras.layers.DepthwiseConv2D | keras.layers.SeparableConv2D):
        reasons.append("a depthwise convolution: each of its channels is a product of its own")
    before = operands_of(layer).gradients
    if before is not None and not isinstance(before, UnitOperand):
        reasons.append(f"its output gradient goes through {before} already")
    return reasons
