"""MinimalEffort: which layers of a model train with few elements of their output gradients."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import keras

from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.lowbit.operands import UnitOperand
from diagconv_tf.minimal_effort.layers import einsum_units
from diagconv_tf.minimal_effort.operands import TopK, check_choice
from diagconv_tf.model_tree import PlacedLayer
from diagconv_tf.treatment import LAST, Facts, SelectiveTreatment, TreatedLayer


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
        self._check_selection()

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
        count = units_of(layer)
        kept = operand.keeps(count)
        if kept == count:
            reason = f"ordinary back-propagation: it would keep all of its {count} units"
            return TreatedLayer(place.path, name, None, (reason,))
        operands = dataclasses.replace(operands_of(layer), gradients=operand)
        return TreatedLayer(place.path, name, operands, (f"keeps {kept} of {count} units",))


def _why_not(layer: keras.layers.Layer) -> list[str]:
    reasons = []
    if isinstance(layer, keras.layers.DepthwiseConv2D | keras.layers.SeparableConv2D):
        reasons.append("a depthwise convolution: each of its channels is a product of its own")
    before = operands_of(layer).gradients
    if before is not None and not isinstance(before, UnitOperand):
        reasons.append(f"its output gradient goes through {before} already")
    return reasons


def units_of(layer: keras.layers.Layer) -> int:
    """The units of a layer's product, or of each of its gates."""
    for name in ("units", "filters"):
        if (count := getattr(layer, name, None)) is not None:
            return count
    return einsum_units(layer)
