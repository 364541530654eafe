"""LowBit: DoReFa-Net's quantizers for the layers of a model."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import ClassVar

from diagconv_tf.lowbit import graph
from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.lowbit.operands import (
    FLOAT_BITS,
    DoReFaActivations,
    DoReFaGradients,
    DoReFaWeights,
    GradientOperand,
    Operands,
    UnitOperand,
    check_bits,
    check_limit,
)
from diagconv_tf.model_tree import PlacedLayer
from diagconv_tf.treatment import FIRST, LAST, Facts, SelectiveTreatment, TreatedLayer


@dataclasses.dataclass(frozen=True)
class LowBit(SelectiveTreatment):
    """DoReFa-Net's quantizers (arXiv 1606.06160) for the layers of a model.

    `LowBit(1, 2, 6)` means 1-bit weights, 2-bit activations and 6-bit gradients, the
    paper's notation (W, A, G). 32 bits mean float.

    As in the paper, the first and the last layers stay float. The graph tells which these
    are: no layer with a kernel comes before, or after. (The paper's authors also clip the
    last layer's inputs. Here these stay as they are.) Activations are quantized where a
    layer takes its inputs, so that pooling and batch norms in between are where they were.

    Attributes:
        weights: bits of a weight.
        activations: bits of an input.
        gradients: bits of an output gradient, rounded stochastically.
        limit: the largest activation. None means what bounds the inputs by the graph, such
            as 6 behind a ReLU6, and 1, as in the paper, where nothing does.
        signed: whether inputs can be negative; None means what the graph tells, and
            that they can where it does not.
        skip: layers that stay float: `"first"`, `"last"`, paths or globs.
        include: paths or globs of the layers to treat; None means all. A path that
            names a container means all that is in it.
        exclude: the same, for layers to leave as they are.
        seed: of the noise of gradients; each layer's follows from it and its path. None
            draws one per layer, which `keras.utils.set_random_seed` decides.

    Raises:
        ValueError: if a number of bits is neither 1 to 8 nor 32, or all three are 32.
    """

    kinds: ClassVar[tuple[str, str]] = (
        "dense layers and convolutions",
        "dense layer or convolution",
    )
    needs: ClassVar[str] = "kernel"

    weights: int = FLOAT_BITS
    activations: int = FLOAT_BITS
    gradients: int = FLOAT_BITS
    limit: float | None = None
    signed: bool | None = None
    skip: tuple[str, ...] = (FIRST, LAST)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "gradients"):
            check_bits(getattr(self, name), name)
        if self._bits == (FLOAT_BITS,) * 3:
            raise ValueError(
                "Expected fewer than 32 bits for weights, activations or gradients. "
                "Received: 32 for all, which `restore` means"
            )
        if self.limit is not None:
            check_limit(self.limit)
        self.check_selection()

    def __str__(self) -> str:
        return f"LowBit({', '.join(map(str, self._bits))})"

    @property
    def _bits(self) -> tuple[int, int, int]:
        return self.weights, self.activations, self.gradients

    def _treated(self, place: PlacedLayer, facts: Facts) -> TreatedLayer:
        known = facts.get(id(place.layer)) if facts is not None else None
        inputs = known.inputs if known is not None else None
        reasons: list[str] = []
        changes: list[str] = []
        activations = None
        if self.activations != FLOAT_BITS:
            activations, why = self._activations(inputs)
            reasons.append(why)
            changes += _clipping(activations, inputs)
        operands = Operands(
            DoReFaWeights(self.weights) if self.weights != FLOAT_BITS else None,
            activations,
            self._gradients(place),
        )
        name = type(place.layer).__name__
        return TreatedLayer(place.path, name, operands, tuple(reasons), tuple(changes))

    def _activations(self, inputs: graph.Range | None) -> tuple[DoReFaActivations, str]:
        signed = self.signed
        if signed is not None:
            why = "signed" if signed else "unsigned"
            why += ": you say so"
        elif inputs is None:
            signed, why = True, "signed: no graph tells what its inputs are"
        else:
            signed = inputs.low < 0
            sign = "signed: inputs can be negative" if signed else "unsigned: inputs are >= 0"
            why = f"{sign} behind {inputs.origin}"
        limit = self.limit
        if limit is None:
            bound = 0.0 if inputs is None else max(inputs.high, -inputs.low if signed else 0.0)
            limit = bound if 0 < bound < float("inf") else 1.0
        return DoReFaActivations(self.activations, signed, float(limit)), why

    def _gradients(self, place: PlacedLayer) -> GradientOperand | None:
        if self.gradients == FLOAT_BITS:
            # Float, and what another treatment drops of them stays dropped.
            before = operands_of(place.layer).gradients
            return before if isinstance(before, UnitOperand) else None
        # Not `hash`, which differs from process to process.
        seed = None if self.seed is None else zlib.crc32(f"{self.seed} {place.path}".encode())
        return DoReFaGradients(self.gradients, seed=None if seed is None else seed & 0x7FFFFFFF)


def _clipping(activations: DoReFaActivations, inputs: graph.Range | None) -> Iterator[str]:
    """What the clip of activations changes."""
    limit = activations.limit
    low = -limit if activations.signed else 0.0
    clips_below = inputs is None or inputs.low < low
    clips_above = inputs is None or inputs.high > limit
    if clips_below or clips_above:
        kept = f"[{low:g}, {limit:g}]"
        reach = f"reach [{inputs.low:g}, {inputs.high:g}]" if inputs is not None else "are unknown"
        yield f"clips its inputs, which {reach}, to {kept}"
