"""What the graph of a model tells of its layers: their place, and what they are fed.

Only functional and sequential models have a graph, in models and layers inside them too.
What happens inside a composite layer, or a subclassed model, is not known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from diagconv_tf import keras_internals

_INF = math.inf


@dataclasses.dataclass(frozen=True)
class Range:
    """Between which numbers a tensor's elements lie, as far as the graph tells.

    Attributes:
        low: the lower bound, may be infinite.
        high: the upper bound, may be infinite.
        origin: which operation decides that, for people.
    """

    low: float
    high: float
    origin: str

    def hull(self, other: Range) -> Range:
        """The numbers of both."""
        wider = self if self.low <= other.low and self.high >= other.high else other
        return Range(min(self.low, other.low), max(self.high, other.high), wider.origin)


@dataclasses.dataclass
class LayerFacts:
    """What is known of a layer.

    Attributes:
        is_first: whether no layer with a kernel comes before it, in one of its calls.
            None where it is inside something first whose graph is not known.
        is_last: the same for layers after it.
        inputs: between which numbers the inputs of all its calls lie.
    """

    is_first: bool | None = False
    is_last: bool | None = False
    inputs: Range | None = None

    def add_call(self, inputs: Range) -> None:
        self.inputs = inputs if self.inputs is None else self.inputs.hull(inputs)


def layer_facts(model: keras.Model) -> dict[int, LayerFacts] | None:
    """What the graph tells of the layers inside a model.

    A layer has a kernel where one of its weights has two axes or more, unless it scales its
    inputs element by element, as normalizations do.

    Args:
        model: a built model.

    Returns:
        `id` of a layer → what is known; None for a model without a graph. A layer that the
        graph does not reach is missing.
    """
    graph = keras_internals.graph(model)
    if graph is None:
        return None
    facts: dict[int, LayerFacts] = {}
    unknown = [_unbounded("the model's input", tensor) for tensor in graph.inputs]
    _follow(graph, unknown, [False] * len(unknown), facts)
    _follow_back(graph, [False] * len(graph.outputs), facts)
    return facts


def _unbounded(what: str, tensor: Any = None) -> Range:
    name = f" `{tensor.name}`" if tensor is not None else ""
    return Range(-_INF, _INF, f"{what}{name}")


def _follow(
    graph: keras.Function,
    ranges: Sequence[Range],
    after_kernel: Sequence[bool],
    facts: dict[int, LayerFacts],
) -> tuple[list[Range], list[bool]]:
    """Goes through a graph from inputs to outputs.

    Args:
        graph: the graph.
        ranges: of its inputs.
        after_kernel: for each input, whether a layer with a kernel comes before.
        facts: is added to.

    Returns:
        The same two of the graph's outputs.
    """
    found: dict[int, tuple[Range, bool]] = {}
    for tensor, both in zip(graph.inputs, zip(ranges, after_kernel, strict=True), strict=True):
        found[id(tensor)] = both
    depths = keras_internals.nodes_by_depth(graph)
    for depth in sorted(depths, reverse=True):
        for node in depths[depth]:
            if not node.input_tensors:
                continue
            operation = node.operation
            inputs = [found[id(tensor)] for tensor in node.input_tensors]
            ranges = [r for r, _ in inputs]
            after = any(flag for _, flag in inputs)
            inner = keras_internals.graph(operation)
            if inner is not None and len(inner.inputs) == len(inputs):
                followed = _follow(inner, ranges, [flag for _, flag in inputs], facts)
                results = list(zip(*followed, strict=True))
            else:
                _note_call(operation, ranges, after, facts)
                after = after or _has_kernel(operation)
                results = [(_range_after(operation, ranges), after)] * len(node.outputs)
            for tensor, result in zip(node.outputs, results, strict=True):
                found[id(tensor)] = result
    outputs = [found[id(tensor)] for tensor in graph.outputs]
    return [r for r, _ in outputs], [flag for _, flag in outputs]


def _follow_back(
    graph: keras.Function, before_kernel: Sequence[bool], facts: dict[int, LayerFacts]
) -> list[bool]:
    """Goes through a graph from outputs to inputs, as `_follow` the other way."""
    found: dict[int, bool] = {}
    for tensor, flag in zip(graph.outputs, before_kernel, strict=True):
        found[id(tensor)] = found.get(id(tensor), False) or flag
    depths = keras_internals.nodes_by_depth(graph)
    for depth in sorted(depths):
        for node in depths[depth]:
            operation = node.operation
            flags = [found.get(id(tensor), False) for tensor in node.outputs]
            inner = keras_internals.graph(operation)
            if inner is not None and len(inner.inputs) == len(node.input_tensors):
                before = _follow_back(inner, flags, facts)
            else:
                if not any(flags):
                    _note_end(operation, "is_last", facts)
                before = [any(flags) or _has_kernel(operation)] * len(node.input_tensors)
            for tensor, flag in zip(node.input_tensors, before, strict=True):
                found[id(tensor)] = found.get(id(tensor), False) or flag
    return [found.get(id(tensor), False) for tensor in graph.inputs]


def _note_call(
    operation: Any, ranges: Sequence[Range], after: bool, facts: dict[int, LayerFacts]
) -> None:
    unknown = _unbounded(f"the composite layer `{operation.name}`, whose graph is not known")
    called = _called(operation)
    for layer in called:
        inputs = ranges[0] if layer is called[0] else unknown
        facts.setdefault(id(layer), LayerFacts()).add_call(inputs)
    if not after:
        _note_end(operation, "is_first", facts)


def _note_end(operation: Any, end: str, facts: dict[int, LayerFacts]) -> None:
    with_kernel = [layer for layer in _called(operation) if _has_own_kernel(layer)]
    for layer in with_kernel:
        known = facts.setdefault(id(layer), LayerFacts())
        # Of several layers inside one, either may be the first.
        setattr(known, end, True if len(with_kernel) == 1 else getattr(known, end) or None)


def _called(operation: Any) -> list[keras.layers.Layer]:
    """The layers that a call of `operation` calls: itself, or those inside it.

    The first one gets its inputs, if there is only one.
    """
    if not isinstance(operation, keras.layers.Layer):
        return []
    inside = list(keras_internals.flatten_layers(operation, include_self=False))
    if not inside:
        return [operation]
    # A wrapper hands on slices of its inputs.
    is_wrapper = isinstance(operation, keras.layers.TimeDistributed) and len(inside) == 1
    return inside if is_wrapper else [operation, *inside]


def _has_kernel(operation: Any) -> bool:
    return any(map(_has_own_kernel, _called(operation)))


#: Layers that scale their inputs element by element, whatever the shape of their weights.
_ELEMENTWISE = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
)


def _has_own_kernel(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, _ELEMENTWISE):
        return False
    inside = {id(v) for child in _children(layer) for v in child.weights}
    own = (v for v in layer.weights if id(v) not in inside)
    return any(len(variable.shape) > 1 for variable in own)


def _children(layer: keras.layers.Layer) -> Iterable[keras.layers.Layer]:
    return keras_internals.flatten_layers(layer, include_self=False, recursive=False)


# Ranges -------------------------------------------------------------------

#: Activation functions and operations, by name → the range of their outputs.
_BOUNDED = {
    "relu": (0.0, _INF),
    "relu6": (0.0, 6.0),
    "sigmoid": (0.0, 1.0),
    "hard_sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "softplus": (0.0, _INF),
    "exponential": (0.0, _INF),
    "exp": (0.0, _INF),
    "abs": (0.0, _INF),
    "absolute": (0.0, _INF),
    "square": (0.0, _INF),
    "sqrt": (0.0, _INF),
    "tanh": (-1.0, 1.0),
    "hard_tanh": (-1.0, 1.0),
    "softsign": (-1.0, 1.0),
    # Minima of x * sigmoid(x) and of x * Phi(x).
    "silu": (-0.2785, _INF),
    "gelu": (-0.17, _INF),
    "elu": (-1.0, _INF),
}

#: Layers whose outputs lie between their smallest and largest inputs.
_KEEPING = (
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.Identity,
    keras.layers.Average,
    keras.layers.Concatenate,
)

#: Operations of `keras.ops` that keep a range, by the names of their classes.
_KEEPING_OPERATIONS = {
    "concatenate",
    "expanddims",
    "flip",
    "getitem",
    "identity",
    "max",
    "mean",
    "min",
    "ravel",
    "reshape",
    "squeeze",
    "stack",
    "transpose",
}

#: Layers that put zeros among their inputs. Dropout also scales them in training, which
#: makes them larger than when the model is used: that is left out.
_WITH_ZEROS = (
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)


def _range_after(operation: Any, inputs: Sequence[Range]) -> Range:
    name = f"`{operation.name}` ({type(operation).__name__})"
    kind = type(operation).__name__.lower().replace("_", "")
    if isinstance(operation, keras.layers.ReLU):
        high = _INF if operation.max_value is None else float(operation.max_value)
        return Range(-_INF if operation.negative_slope else 0.0, high, name)
    if isinstance(operation, keras.layers.Softmax):
        return Range(0.0, 1.0, name)
    if isinstance(operation, keras.layers.Layer):
        activation = getattr(operation, "activation", None)
        # A user's function may have any name.
        if getattr(activation, "__module__", "").startswith("keras."):
            bounded = _BOUNDED.get(getattr(activation, "__name__", ""))
            if bounded is not None:
                return Range(*bounded, name)
        if isinstance(operation, keras.layers.Activation):
            is_linear = operation.activation is keras.activations.linear
            return inputs[0] if is_linear else _unbounded(name)
        if isinstance(operation, _KEEPING):
            return _hull(inputs)
        if isinstance(operation, _WITH_ZEROS):
            return inputs[0].hull(Range(0.0, 0.0, inputs[0].origin))
    # A user's class may have any name.
    if not type(operation).__module__.startswith("keras."):
        return _unbounded(name)
    if isinstance(operation, keras.layers.Layer):
        combine = _COMBINING.get(kind)
        return _combined(combine, inputs, name) if combine else _unbounded(name)
    if kind in _KEEPING_OPERATIONS and inputs:
        return _hull(inputs)
    by_name = {key.replace("_", ""): bounds for key, bounds in _BOUNDED.items()}
    if kind in by_name:
        return Range(*by_name[kind], name)
    combine = _COMBINING.get(kind)
    # An operation with a number among its arguments has fewer tensors.
    return _combined(combine, inputs, name) if combine and len(inputs) > 1 else _unbounded(name)


def _hull(ranges: Sequence[Range]) -> Range:
    hull = ranges[0]
    for other in ranges[1:]:
        hull = hull.hull(other)
    return hull


def _combined(
    combine: Callable[[Range, Range], tuple[float, float]], inputs: Sequence[Range], name: str
) -> Range:
    result = inputs[0]
    for other in inputs[1:]:
        low, high = combine(result, other)
        # Whichever has no bound below decides the sign.
        origin = next((r.origin for r in (result, other) if r.low < 0 and low < 0), name)
        result = Range(low, high, origin)
    return result


def _product(a: Range, b: Range) -> tuple[float, float]:
    # Zero times infinity is zero: the infinite bound is never reached.
    ends = [0.0 if 0.0 in (x, y) else x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(ends), max(ends)


_COMBINING: dict[str, Callable[[Range, Range], tuple[float, float]]] = {
    "add": lambda a, b: (a.low + b.low, a.high + b.high),
    "subtract": lambda a, b: (a.low - b.high, a.high - b.low),
    "multiply": _product,
    "maximum": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "minimum": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
}
