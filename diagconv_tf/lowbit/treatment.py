"""Treatments: which operands each layer of a model gets, as values one can print."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from rich.table import Table

from diagconv_tf.lowbit import graph
from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.lowbit.operands import (
    FLOAT_BITS,
    DoReFaActivations,
    DoReFaGradients,
    DoReFaWeights,
    Operands,
    check_bits,
    check_limit,
)
from diagconv_tf.model_tree import PlacedLayer, select_paths
from diagconv_tf.text import as_text

#: The words that stand for the layers at the ends of a graph.
FIRST, LAST = "first", "last"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer whose operands could go through something.

    Attributes:
        place: the layer and its paths.
        reasons: why it must stay as it is; empty means that it can be treated.
    """

    place: PlacedLayer
    reasons: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of the layer."""
        return (self.place.path, *self.place.other_paths)


@dataclasses.dataclass(frozen=True)
class TreatedLayer:
    """What a treatment does with one layer.

    Attributes:
        path: the layer's path.
        class_name: name of its class before.
        operands: what it gets; None leaves it as it is.
        reasons: why it gets these, or is left as it is.
        changes: what becomes different by more than rounding, for people.
    """

    path: str
    class_name: str
    operands: Operands | None
    reasons: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Treated:
    """What a treatment does with a model; prints as a table.

    Attributes:
        model_name: the model's name.
        treatment: the treatment.
        layers: one for each dense layer and convolution that a rule names.
    """

    model_name: str
    treatment: Treatment
    layers: tuple[TreatedLayer, ...]

    def __rich__(self) -> Table:
        return _table(self)

    def __str__(self) -> str:
        return as_text(self)


class Treatment(abc.ABC):
    """Decides which operands the layers of a model get; changes nothing itself."""

    @abc.abstractmethod
    def decide(self, model: keras.Model, candidates: Sequence[Candidate]) -> Treated:
        """What becomes of each of `candidates`, in their order.

        Raises:
            ValueError: if the treatment does not fit the model; the message says why.
        """


@dataclasses.dataclass(frozen=True)
class LowBit(Treatment):
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
        for name in ("skip", "include", "exclude"):
            patterns = getattr(self, name)
            if patterns is None and name == "include":
                continue
            patterns = (patterns,) if isinstance(patterns, str) else patterns
            is_list = isinstance(patterns, Sequence)
            if not (is_list and all(isinstance(pattern, str) for pattern in patterns)):
                raise ValueError(
                    f"Expected `{name}` to be a layer path, a glob, or a list of these. "
                    f"Received: {name}={patterns!r}"
                )
            object.__setattr__(self, name, tuple(patterns))

    def __str__(self) -> str:
        return f"LowBit({', '.join(map(str, self._bits))})"

    @property
    def _bits(self) -> tuple[int, int, int]:
        return self.weights, self.activations, self.gradients

    def decide(self, model: keras.Model, candidates: Sequence[Candidate]) -> Treated:
        facts = graph.layer_facts(model)
        self._check_ends(model, candidates, facts)
        included = None
        if self.include is not None:
            included = _matching("include", self.include, candidates)
        excluded = _matching("exclude", self.exclude, candidates)
        named = tuple(pattern for pattern in self.skip if pattern not in (FIRST, LAST))
        skipped = _matching("skip", named, candidates)
        layers = []
        for candidate in candidates:
            if included is not None and candidate.place.path not in included:
                reasons: tuple[str, ...] = ("not included",)
            elif candidate.place.path in excluded:
                reasons = ("excluded",)
            elif candidate.place.path in skipped:
                reasons = ("in `skip`",)
            else:
                reasons = candidate.reasons or tuple(self._at_an_end(candidate, facts))
            if reasons:
                name = type(candidate.place.layer).__name__
                layers.append(TreatedLayer(candidate.place.path, name, None, reasons))
            else:
                layers.append(self._treated(candidate.place, facts))
        return Treated(model.name, self, tuple(layers))

    def _check_ends(
        self,
        model: keras.Model,
        candidates: Sequence[Candidate],
        facts: dict[int, graph.LayerFacts] | None,
    ) -> None:
        """Refuses to guess which layers are first and last."""
        for end in (FIRST, LAST):
            if end not in self.skip or not candidates:
                continue
            unclear = [c.place for c in candidates if facts is None or _end(c, facts, end) is None]
            if not unclear:
                continue
            if facts is None:
                what = f"the model '{model.name}' of class {type(model).__name__}, which has none"
            else:
                inside = unclear[0].path.rpartition("/")[0]
                what = f"the layer '{inside}', whose inside is in no graph"
            first, last = candidates[0].place.path, candidates[-1].place.path
            raise ValueError(
                f"Expected a graph (a functional or sequential model) that tells the {end} layer, "
                f"which stays float. Received: {what}; name the layers that stay float: "
                f"LowBit(..., skip=('{first}', '{last}')), or skip=() for none"
            )

    def _at_an_end(
        self, candidate: Candidate, facts: dict[int, graph.LayerFacts] | None
    ) -> Iterator[str]:
        for end in (FIRST, LAST):
            if end in self.skip and facts is not None and _end(candidate, facts, end):
                yield f"the graph's {end} layer"

    def _treated(
        self, place: PlacedLayer, facts: dict[int, graph.LayerFacts] | None
    ) -> TreatedLayer:
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
            self._gradients(place.path) if self.gradients != FLOAT_BITS else None,
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

    def _gradients(self, path: str) -> DoReFaGradients:
        # Not `hash`, which differs from process to process.
        seed = None if self.seed is None else zlib.crc32(f"{self.seed} {path}".encode())
        return DoReFaGradients(self.gradients, seed=None if seed is None else seed & 0x7FFFFFFF)


def _end(candidate: Candidate, facts: dict[int, graph.LayerFacts], end: str) -> bool | None:
    """Whether a layer is at an end of the graph; None where that is not clear."""
    known = facts.get(id(candidate.place.layer))
    if known is None:
        return False
    return known.is_first if end == FIRST else known.is_last


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


def _matching(argument: str, patterns: Sequence[str], candidates: Sequence[Candidate]) -> set[str]:
    paths = [candidate.paths for candidate in candidates]
    return select_paths(argument, patterns, paths, "dense layer or convolution")


def _table(treated: Treated) -> Table:
    count = sum(layer.operands is not None for layer in treated.layers)
    table = Table(
        title=f"{treated.model_name}: {treated.treatment} for {count} of {len(treated.layers)} "
        "dense layers and convolutions",
        title_justify="left",
    )
    for name in ("layer", "class", "kernel", "inputs", "gradients", "why", "changes"):
        table.add_column(name, overflow="fold")
    for layer in treated.layers:
        operands = layer.operands
        cells = [layer.path, layer.class_name]
        for part in ("kernel", "inputs", "gradients"):
            cells.append("" if operands is None else describe(getattr(operands, part)))
        why = "; ".join(layer.reasons)
        cells.append(why if operands is not None else f"left as it is: {why}")
        table.add_row(*cells, "; ".join(layer.changes))
    return table


def describe(operand: Any) -> str:
    """An operand in a few letters, for tables."""
    if operand is None:
        return "float"
    if isinstance(operand, DoReFaActivations):
        sign = "±" if operand.signed else "0 … "
        return f"{operand.bits} bit, {sign}{operand.limit:g}"
    bits = getattr(operand, "bits", None)
    return str(operand) if bits is None else f"{bits} bit"


def holds_operands(layer: keras.layers.Layer) -> bool:
    """Whether any operand of a layer goes through something now."""
    return operands_of(layer) != Operands()
