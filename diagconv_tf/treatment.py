"""Treatments: which operands each layer of a model gets, as values one can print."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import keras
from rich.table import Table

from diagconv_tf.lowbit import graph
from diagconv_tf.lowbit.operands import DoReFaActivations, Operands
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
        held: the operands that it can hold, of the fields of `Operands`.
    """

    place: PlacedLayer
    reasons: tuple[str, ...] = ()
    held: frozenset[str] = frozenset({"kernel", "inputs", "gradients"})

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
        layers: one for each layer that a rule names, of the kinds that it treats.
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

    #: The layers that it treats, for people: several, and one.
    kinds: ClassVar[tuple[str, str]] = ("layers", "layer")

    #: What it changes, for people: a sentence.
    effect: ClassVar[str] = "This changes what the model computes."

    @abc.abstractmethod
    def decide(self, model: keras.Model, candidates: Sequence[Candidate]) -> Treated:
        """What becomes of each of `candidates`, in their order.

        Raises:
            ValueError: if the treatment does not fit the model; the message says why.
        """


#: `id` of a layer → what the graph tells of it; None where there is no graph.
Facts = Mapping[int, graph.LayerFacts] | None


class SelectiveTreatment(Treatment):
    """A treatment of the layers that are not left out, by their paths or place in the graph.

    Subclasses are frozen data classes with the attributes below, and say what a layer gets.

    Attributes:
        skip: layers that stay as they are: `"first"`, `"last"`, paths or globs.
        include: paths or globs of the layers to treat; None means all. A path that names a
            container means all that is in it.
        exclude: the same, for layers to leave as they are.
    """

    #: An operand that a layer must be able to hold, else the treatment does not know it.
    needs: ClassVar[str]

    skip: tuple[str, ...]
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    def check_selection(self) -> None:
        """Makes tuples of the three attributes.

        Raises:
            ValueError: if one is no path, glob or list of these.
        """
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

    @abc.abstractmethod
    def _treated(self, place: PlacedLayer, facts: Facts) -> TreatedLayer:
        """What a layer gets that nothing leaves out."""

    def decide(self, model: keras.Model, candidates: Sequence[Candidate]) -> Treated:
        candidates = [candidate for candidate in candidates if self.needs in candidate.held]
        facts = graph.layer_facts(model)
        self._check_ends(model, candidates, facts)
        included = None
        if self.include is not None:
            included = self._matching("include", self.include, candidates)
        excluded = self._matching("exclude", self.exclude, candidates)
        named = tuple(pattern for pattern in self.skip if pattern not in (FIRST, LAST))
        skipped = self._matching("skip", named, candidates)
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
        self, model: keras.Model, candidates: Sequence[Candidate], facts: Facts
    ) -> None:
        """Refuses to guess which layers are first and last."""
        ends = [end for end in (FIRST, LAST) if end in self.skip]
        for end in ends:
            if not candidates:
                continue
            unclear = [c.place for c in candidates if facts is None or _end(c, facts, end) is None]
            if not unclear:
                continue
            if facts is None:
                what = f"the model '{model.name}' of class {type(model).__name__}, which has none"
            else:
                inside = unclear[0].path.rpartition("/")[0]
                what = f"the layer '{inside}', whose inside is in no graph"
            paths = {FIRST: candidates[0].place.path, LAST: candidates[-1].place.path}
            named = ", ".join(f"'{paths[end]}'" for end in ends)
            named += "," if len(ends) == 1 else ""
            raise ValueError(
                f"Expected a graph (a functional or sequential model) that tells the {end} layer, "
                f"which stays as it is. Received: {what}; name the layers that stay: "
                f"{type(self).__name__}(..., skip=({named})), or skip=() for none"
            )

    def _at_an_end(self, candidate: Candidate, facts: Facts) -> Iterator[str]:
        for end in (FIRST, LAST):
            if end in self.skip and facts is not None and _end(candidate, facts, end):
                yield f"the graph's {end} layer"

    def _matching(
        self, argument: str, patterns: Sequence[str], candidates: Sequence[Candidate]
    ) -> set[str]:
        paths = [candidate.paths for candidate in candidates]
        return select_paths(argument, patterns, paths, self.kinds[1])


def _end(candidate: Candidate, facts: Mapping[int, graph.LayerFacts], end: str) -> bool | None:
    """Whether a layer is at an end of the graph; None where that is not clear."""
    layer = candidate.place.layer
    # The kernels of a recurrent layer are its cell's.
    known = facts.get(id(getattr(layer, "cell", layer)))
    if known is None:
        return False
    return known.is_first if end == FIRST else known.is_last


def _table(treated: Treated) -> Table:
    count = sum(layer.operands is not None for layer in treated.layers)
    table = Table(
        title=f"{treated.model_name}: {treated.treatment} for {count} of {len(treated.layers)} "
        f"{treated.treatment.kinds[0]}",
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
