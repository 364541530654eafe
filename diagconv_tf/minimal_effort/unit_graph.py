"""Which weights of a model belong to which hidden unit, as far as its graph tells.

A unit is a column of a dense layer, or a channel of a convolution. Its output passes layers
that treat each unit apart (activations, batch norms, depthwise convolutions, pooling, …),
and is read by the next layers with a kernel, each of which has rows for it. Only functional
and sequential models have a graph, in models inside them too.

A unit is *removed* where its own weights are zero, and so are the rows that read it. Then it
contributes nothing, whatever the layers in between make of it. So the weights themselves say
which units are removed: nothing else needs to be saved, copied or restored.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from diagconv_tf import keras_internals
from diagconv_tf.lowbit.layers import operands_of, why_not_operands
from diagconv_tf.model_tree import check_built, walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, stock_class

#: Stands for "no unit" among numbers of units.
NO_UNIT = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """Where units lie in a tensor or a variable.

    Attributes:
        axis: the axis along which they lie, from the front.
        units: the number of the unit for each index of that axis, or `NO_UNIT`.
    """

    axis: int
    units: np.ndarray

    def kept(self, removed: np.ndarray) -> np.ndarray:
        """Indices of the axis that stay when the units flagged in `removed` go."""
        return np.flatnonzero(~np.append(removed, False)[self.units])


@dataclasses.dataclass(frozen=True, eq=False)
class Part(Flow):
    """Entries of a variable that belong to units.

    Attributes:
        layer: the layer that has the variable.
        name: its attribute.
    """

    layer: keras.layers.Layer
    name: str

    @property
    def variable(self) -> keras.Variable:
        """The variable."""
        return getattr(self.layer, self.name)

    def is_zero(self) -> np.ndarray:
        """For each index of the axis whether all entries are zero."""
        values = ops.convert_to_numpy(self.variable)
        others = tuple(axis for axis in range(values.ndim) if axis != self.axis)
        return ~np.any(values != 0, axis=others)


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenLayer:
    """A layer whose columns or channels are units.

    Attributes:
        layer: the layer.
        path: its path.
        axis: the axis of its outputs along which its units lie, from the front.
        first: number of its first unit.
        count: how many units it has.
        reasons: why none of them can be removed; empty means that they can.
    """

    layer: keras.layers.Layer
    path: str
    axis: int
    first: int
    count: int
    reasons: tuple[str, ...]

    @property
    def numbers(self) -> slice:
        """The numbers of its units."""
        return slice(self.first, self.first + self.count)


@dataclasses.dataclass(frozen=True, eq=False)
class UnitGraph:
    """The units of a model, numbered through, and the weights that belong to them.

    Attributes:
        hidden: the layers with units, in the graph's order.
        own: kernels' columns and biases: the weights that make a unit's output.
        between: the weights of layers that treat each unit apart.
        read: rows of the kernels that read units.
        target_shapes: `id` of a `Reshape` layer behind units → its `target_shape`, where -1
            stands for the axis along which the units lie.
        inputs: `id` of a model inside the model → where the units lie in its inputs, each
            None where there are none.
    """

    hidden: tuple[HiddenLayer, ...]
    own: tuple[Part, ...]
    between: tuple[Part, ...]
    read: tuple[Part, ...]
    target_shapes: dict[int, tuple[int, ...]]
    inputs: dict[int, tuple[Flow | None, ...]]

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(layer.count for layer in self.hidden)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts."""
        return (*self.own, *self.between, *self.read)

    def removed(self) -> np.ndarray:
        """A flag for each unit: whether it is removed, and can be taken out.

        Of a layer whose units are all removed, the first one stays.
        """
        removed: np.ndarray = np.ones(self.count, bool)
        for part in (*self.own, *self.read):
            owned = part.units != NO_UNIT
            np.logical_and.at(removed, part.units[owned], part.is_zero()[owned])
        for layer in self.hidden:
            if layer.reasons:
                removed[layer.numbers] = False
            elif removed[layer.numbers].all():
                removed[layer.first] = False
        return removed


def unit_graph(model: keras.Model, *, rules: Sequence[Rule] = DEFAULT_RULES) -> UnitGraph:
    """Follows the units of a model's layers to the kernels that read them.

    Args:
        model: a built functional or sequential model.
        rules: those that `rewrite` was given.

    Raises:
        ValueError: if `model` is not a built Keras model, or has no graph.
    """
    check_built(model)
    graph = keras_internals.graph(model)
    if graph is None:
        raise ValueError(
            "Expected a functional or sequential model, whose graph tells which layers read a "
            f"unit. Received: '{model.name}' of class {type(model).__name__}"
        )
    follower = _Follower({id(p.layer): p.path for p in walk_layers(model)}, rules)
    outputs = follower.follow(graph, [None] * len(graph.inputs))
    for flow in outputs:
        follower.block(flow, "its outputs are the model's")
    return follower.finish()


class _LeftWholeError(Exception):
    """Says why an operation does not let units pass."""


@dataclasses.dataclass(eq=False)
class _Found:
    """A hidden layer, while the graph is followed."""

    layer: keras.layers.Layer
    path: str
    axis: int
    first: int
    count: int
    reasons: dict[str, None]


class _Follower:
    """Goes through a graph from inputs to outputs, and notes what belongs to which unit."""

    def __init__(self, paths: dict[int, str], rules: Sequence[Rule]) -> None:
        self.paths = paths
        self.rules = rules
        self.calls: collections.Counter[int] = collections.Counter()
        self.hidden: list[_Found] = []
        self.owners: list[_Found] = []  # One for each unit.
        self.own: list[Part] = []
        self.between: list[Part] = []
        self.read: list[Part] = []
        self.target_shapes: dict[int, tuple[int, ...]] = {}
        self.inputs: dict[int, tuple[Flow | None, ...]] = {}

    def finish(self) -> UnitGraph:
        for parts in (self.own, self.between, self.read):
            for part in parts:
                path = self.path(part.layer)
                if self.calls[id(part.layer)] > 1:
                    self.block_units(part.units, f"'{path}' is called more than once")
                if operands_of(part.layer).kernel is not None:
                    self.block_units(part.units, f"'{path}' quantizes its kernel")
        hidden = tuple(
            HiddenLayer(f.layer, f.path, f.axis, f.first, f.count, tuple(f.reasons))
            for f in self.hidden
        )
        return UnitGraph(
            hidden,
            tuple(self.own),
            tuple(self.between),
            tuple(self.read),
            self.target_shapes,
            self.inputs,
        )

    def path(self, operation: Any) -> str:
        return self.paths.get(id(operation), operation.name)

    def block(self, flow: Flow | None, reason: str) -> None:
        if flow is not None:
            self.block_units(flow.units, reason)

    def block_units(self, units: np.ndarray, reason: str) -> None:
        for unit in np.unique(units[units != NO_UNIT]):
            self.owners[unit].reasons[reason] = None

    def follow(self, graph: keras.Function, flows: Sequence[Flow | None]) -> list[Flow | None]:
        """The flows at a graph's outputs."""
        found = {id(t): flow for t, flow in zip(graph.inputs, flows, strict=True)}
        depths = keras_internals.nodes_by_depth(graph)
        for depth in sorted(depths, reverse=True):
            for node in depths[depth]:
                if not node.input_tensors:
                    continue
                inputs = [found.get(id(tensor)) for tensor in node.input_tensors]
                inner = keras_internals.graph(node.operation)
                if inner is not None and len(inner.inputs) == len(inputs):
                    self.enter(node.operation, inputs)
                    outputs = self.follow(inner, inputs)
                else:
                    outputs = [self.call(node, inputs)] * len(node.outputs)
                found.update(zip(map(id, node.outputs), outputs, strict=True))
        return [found.get(id(tensor)) for tensor in graph.outputs]

    def enter(self, model: keras.Model, inputs: Sequence[Flow | None]) -> None:
        """Notes the flows into a model inside the model."""
        before = self.inputs.setdefault(id(model), tuple(inputs))
        self.calls[id(model)] += 1
        if self.calls[id(model)] > 1:
            for flow in (*before, *inputs):
                self.block(flow, f"'{self.path(model)}' is called more than once")

    def call(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        """The flow behind one call of an operation without a graph of its own."""
        operation = node.operation
        is_layer = isinstance(operation, keras.layers.Layer)
        kind = stock_class(type(operation), self.rules) if is_layer else type(operation)
        self.calls[id(operation)] += 1
        handler = _HANDLERS.get(kind)
        if handler is None and not is_layer and _is_elementwise_operation(kind):
            handler = _Follower.keep
        try:
            if handler is not None:
                return handler(self, node, inputs)
            if any(inputs):
                name = type(operation).__name__
                raise _LeftWholeError(f"'{self.path(operation)}' ({name}) reads its outputs")
        except _LeftWholeError as reason:
            for flow in inputs:
                self.block(flow, str(reason))
        return None

    # One method for each kind of operation: the flow behind it.

    def keep(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        (flow,) = inputs
        activation = getattr(node.operation, "activation", None)
        if flow is not None and activation is not None and not _is_elementwise(activation):
            raise _LeftWholeError(f"the activation of '{self.path(node.operation)}' mixes units")
        return flow

    def keep_channels(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        flow = self.channels(node, inputs)
        if flow is None:
            return None
        return Flow(_channel_axis(node.operation, node.outputs[0]), flow.units)

    def channels(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        """The flow into an operation, along the axis of its channels."""
        (flow,) = inputs
        if flow is not None and flow.axis != _channel_axis(node.operation, node.input_tensors[0]):
            raise _LeftWholeError(f"'{self.path(node.operation)}' has its channels elsewhere")
        return flow

    def normalize(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        (flow,) = inputs
        layer = node.operation
        if flow is None:
            return None
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        if axis % len(node.input_tensors[0].shape) != flow.axis:
            raise _LeftWholeError(f"'{self.path(layer)}' normalizes another axis")
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            self.add(self.between, layer, name, 0, flow.units)
        return flow

    def prelu(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        (flow,) = inputs
        if flow is not None and node.operation.alpha.shape[flow.axis - 1] != 1:
            self.add(self.between, node.operation, "alpha", flow.axis - 1, flow.units)
        return flow

    def flatten(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        spread = self.spread(node, inputs)
        if spread is None:
            return None
        if node.operation.data_format == "channels_first" and spread.ndim > 1:
            spread = np.moveaxis(spread, 0, -1)
        return Flow(1, spread.ravel())

    def reshape(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        spread = self.spread(node, inputs)
        if spread is None:
            return None
        spread = spread.reshape(node.outputs[0].shape[1:])
        for axis in range(spread.ndim):
            units = np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1)
            if (units == units[:, :1]).all():
                target = list(spread.shape)
                target[axis] = -1
                self.target_shapes[id(node.operation)] = tuple(target)
                return Flow(axis + 1, units[:, 0])
        raise _LeftWholeError(f"'{self.path(node.operation)}' divides its units among axes")

    def spread(self, node: Any, inputs: Sequence[Flow | None]) -> np.ndarray | None:
        """The number of the unit for each element of an example."""
        (flow,) = inputs
        shape = node.input_tensors[0].shape[1:]
        if flow is None:
            return None
        if None in shape or None in node.outputs[0].shape[1:]:
            raise _LeftWholeError(f"'{self.path(node.operation)}' has inputs of unknown size")
        if flow.axis == 0:
            raise _LeftWholeError(f"'{self.path(node.operation)}' has its units as examples")
        along = [-1 if axis == flow.axis - 1 else 1 for axis in range(len(shape))]
        return np.broadcast_to(flow.units.reshape(along), shape)

    def permute(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        (flow,) = inputs
        return flow and Flow(1 + node.operation.dims.index(flow.axis), flow.units)

    def concatenate(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        if not any(inputs):
            return None
        axis = node.operation.axis % len(node.input_tensors[0].shape)
        if any(flow is not None and flow.axis != axis for flow in inputs):
            raise _LeftWholeError(f"'{self.path(node.operation)}' joins along another axis")
        parts = []
        for tensor, flow in zip(node.input_tensors, inputs, strict=True):
            if flow is None and tensor.shape[axis] is None:
                raise _LeftWholeError(f"'{self.path(node.operation)}' has inputs of unknown size")
            none = np.full(tensor.shape[axis] or 0, NO_UNIT)
            parts.append(none if flow is None else flow.units)
        return Flow(axis, np.concatenate(parts))

    def depthwise(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        flow = self.channels(node, inputs)
        layer = node.operation
        if flow is None:
            return None
        if not _is_elementwise(layer.activation):
            raise _LeftWholeError(f"the activation of '{self.path(layer)}' mixes units")
        self.add(self.between, layer, "kernel", -2, flow.units)
        units: np.ndarray = np.repeat(flow.units, layer.depth_multiplier)
        self.add(self.between, layer, "bias", 0, units)
        return Flow(_channel_axis(layer, node.outputs[0]), units)

    def dense(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        (flow,) = inputs
        layer = node.operation
        if flow is not None and flow.axis != len(node.input_tensors[0].shape) - 1:
            # Its units are new ones all the same.
            self.block(flow, f"'{self.path(layer)}' multiplies another axis")
        elif flow is not None:
            self.add_reader(layer, "kernel", flow.units)
        return self.source(layer, layer.units, "kernel", len(node.outputs[0].shape) - 1)

    def convolve(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        layer = node.operation
        if layer.groups > 1:
            for flow in inputs:
                self.block(flow, f"'{self.path(layer)}' has groups")
            return None
        flow = self.channels(node, inputs)
        if flow is not None:
            self.add_reader(layer, "kernel", flow.units)
        return self.source(layer, layer.filters, "kernel", _channel_axis(layer, node.outputs[0]))

    def convolve_separable(self, node: Any, inputs: Sequence[Flow | None]) -> Flow | None:
        layer = node.operation
        flow = self.channels(node, inputs)
        if flow is not None:
            self.add(self.between, layer, "depthwise_kernel", -2, flow.units)
            units: np.ndarray = np.repeat(flow.units, layer.depth_multiplier)
            self.add_reader(layer, "pointwise_kernel", units)
        return self.source(
            layer, layer.filters, "pointwise_kernel", _channel_axis(layer, node.outputs[0])
        )

    def source(self, layer: keras.layers.Layer, count: int, kernel: str, axis: int) -> Flow | None:
        """The flow of the units that a layer makes."""
        if self.calls[id(layer)] > 1:
            return None  # Known already; `finish` says why it is left whole.
        found = _Found(layer, self.path(layer), axis, len(self.owners), count, {})
        for reason in why_not_operands(layer):
            found.reasons[reason] = None
        if not _is_elementwise(layer.activation):
            found.reasons["its activation mixes units"] = None
        self.hidden.append(found)
        self.owners += [found] * count
        units: np.ndarray = np.arange(found.first, found.first + count)
        self.add(self.own, layer, kernel, -1, units)
        self.add(self.own, layer, "bias", 0, units)
        return Flow(axis, units)

    def add_reader(self, layer: keras.layers.Layer, kernel: str, units: np.ndarray) -> None:
        for reason in why_not_operands(layer):
            self.block_units(units, f"'{self.path(layer)}' reads its outputs: {reason}")
        self.add(self.read, layer, kernel, -2, units)

    def add(
        self, parts: list[Part], layer: keras.layers.Layer, name: str, axis: int, units: np.ndarray
    ) -> None:
        variable = getattr(layer, name, None)
        # Not every layer has a bias, or a scale. A kernel with LoRA weights is no variable.
        if isinstance(variable, keras.Variable):
            parts.append(Part(axis % len(variable.shape), units, layer, name))


def _channel_axis(operation: Any, tensor: keras.KerasTensor) -> int:
    # Some layers of one dimension have no choice.
    first = getattr(operation, "data_format", "channels_last") == "channels_first"
    return 1 if first else len(tensor.shape) - 1


#: Functions of `keras.activations` that treat each number apart.
_ELEMENTWISE = frozenset(
    {
        "celu",
        "elu",
        "exponential",
        "gelu",
        "hard_shrink",
        "hard_sigmoid",
        "hard_silu",
        "hard_tanh",
        "leaky_relu",
        "linear",
        "log_sigmoid",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "soft_shrink",
        "softplus",
        "softsign",
        "sparse_plus",
        "sparse_sigmoid",
        "squareplus",
        "tanh",
        "tanh_shrink",
        "threshold",
    }
)


def _is_elementwise(activation: Callable | None) -> bool:
    if activation is None:
        return True
    if isinstance(activation, keras.layers.Layer):
        return stock_class(type(activation)) in _ELEMENTWISE_LAYERS
    # A user's function may have any name.
    is_kerass = getattr(activation, "__module__", "").startswith("keras.")
    return is_kerass and getattr(activation, "__name__", "") in _ELEMENTWISE


def _is_elementwise_operation(kind: type) -> bool:
    names = {name.replace("_", "") for name in _ELEMENTWISE} | {"identity"}
    return kind.__module__.startswith("keras.") and kind.__name__.lower() in names


_ELEMENTWISE_LAYERS = (
    layers.ActivityRegularization,
    layers.AlphaDropout,
    layers.Dropout,
    layers.ELU,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.LeakyReLU,
    layers.ReLU,
)

_Handler = Callable[[_Follower, Any, Sequence[Flow | None]], "Flow | None"]


def _handlers() -> Iterable[tuple[type, _Handler]]:
    for kind in (*_ELEMENTWISE_LAYERS, layers.Activation):
        yield kind, _Follower.keep
    for name in (
        "AveragePooling",
        "Cropping",
        "GlobalAveragePooling",
        "GlobalMaxPooling",
        "MaxPooling",
        "SpatialDropout",
        "UpSampling",
        "ZeroPadding",
    ):
        for dimensions in (1, 2, 3):
            yield getattr(layers, f"{name}{dimensions}D"), _Follower.keep_channels
    for kind in (layers.Conv1D, layers.Conv2D, layers.Conv3D):
        yield kind, _Follower.convolve
    for kind in (layers.DepthwiseConv1D, layers.DepthwiseConv2D):
        yield kind, _Follower.depthwise
    for kind in (layers.SeparableConv1D, layers.SeparableConv2D):
        yield kind, _Follower.convolve_separable
    yield layers.Dense, _Follower.dense
    yield layers.BatchNormalization, _Follower.normalize
    yield layers.PReLU, _Follower.prelu
    yield layers.Flatten, _Follower.flatten
    yield layers.Reshape, _Follower.reshape
    yield layers.Permute, _Follower.permute
    yield layers.Concatenate, _Follower.concatenate


#: By stock classes: a subclass may do anything.
_HANDLERS: dict[type, _Handler] = dict(_handlers())


def kept_elements(parts: Iterable[Part], removed: np.ndarray, variable: keras.Variable) -> int:
    """How many elements of a variable stay when units go."""
    shape = list(variable.shape)
    for part in parts:
        if part.variable is variable:
            shape[part.axis] = len(part.kept(removed))
    return math.prod(shape)
