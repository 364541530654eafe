"""compact: a smaller model without the hidden units that were removed."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import layers, ops
from rich.table import Table

from diagconv_tf import class_swap, flops, keras_internals, tracing
from diagconv_tf.distribution import strategy_of
from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.minimal_effort import activeness
from diagconv_tf.minimal_effort.optimizer_state import twin_of
from diagconv_tf.minimal_effort.unit_graph import UnitGraph, kept_elements, unit_graph
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.preserving import preserved_state
from diagconv_tf.rewriting import restore
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.text import as_text, summarize_error


@dataclasses.dataclass(frozen=True)
class CompactedLayer:
    """What compaction does with one layer with units.

    Attributes:
        path: the layer's path.
        class_name: name of its class.
        before: its units: columns of a dense layer, channels of a convolution.
        after: those that stay.
        reasons: why all of them stay, whatever their weights; may be empty.
    """

    path: str
    class_name: str
    before: int
    after: int
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compaction:
    """What `compact` does with a model; prints as a table.

    Attributes:
        model_name: the model's name.
        layers: one for each dense layer and convolution.
        parameters: numbers of the model's weights, before and after.
        flops: floating-point operations of one example's forward pass in convolutions and
            dense layers, before and after; None where a size is not known.
    """

    model_name: str
    layers: tuple[CompactedLayer, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None

    @property
    def removed(self) -> int:
        """How many units go."""
        return sum(layer.before - layer.after for layer in self.layers)

    def __rich__(self) -> Table:
        before, after = self.parameters
        title = f"{self.model_name}: {before:,} → {after:,} parameters"
        if self.flops is not None:
            title += f", {self.flops[0] / 1e6:,.2f} → {self.flops[1] / 1e6:,.2f} MFLOPs"
        table = Table(title=title, title_justify="left")
        for name in ("layer", "class", "units", "left", "left whole because"):
            table.add_column(name, overflow="fold")
        for layer in self.layers:
            counts = str(layer.before), str(layer.after)
            table.add_row(layer.path, layer.class_name, *counts, "; ".join(layer.reasons))
        return table

    def __str__(self) -> str:
        return as_text(self)


def plan_compaction(model: keras.Model, *, rules: Sequence[Rule] = DEFAULT_RULES) -> Compaction:
    """What `compact(model)` would do; changes nothing.

    Args:
        model: a built functional or sequential model.
        rules: those that `rewrite` was given.

    Raises:
        ValueError: if `model` is not a built Keras model, or has no graph.
    """
    with class_swap.lock:
        return _plan(model, unit_graph(model, rules=rules))


def _plan(model: keras.Model, graph: UnitGraph) -> Compaction:
    removed = graph.removed()
    sizes = {
        id(variable): (math.prod(variable.shape), kept_elements(graph.parts, removed, variable))
        for variable in model.weights
        if not activeness.is_counter(variable)
    }
    found = tuple(
        CompactedLayer(
            hidden.path,
            type(hidden.layer).__name__,
            hidden.count,
            hidden.count - int(removed[hidden.numbers].sum()),
            hidden.reasons,
        )
        for hidden in graph.hidden
    )
    before, after = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    return Compaction(model.name, found, (before, after), _flops(model, sizes))


def _flops(model: keras.Model, sizes: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
    """FLOPs before and after; they are in proportion to the size of each kernel."""
    counted = [p.layer for p in walk_layers(model) if isinstance(p.layer, flops.COUNTED)]
    try:
        with preserved_state(model):
            inputs = tracing.symbolic_inputs(model)
            shapes = tracing.record_input_shapes(model, counted, inputs)
    except tracing.UntraceableError:
        return None
    before = after = 0
    for layer, calls in zip(counted, shapes, strict=True):
        own = sum(flops.layer_flops(layer, shape) for shape in calls)
        kernels = [sizes[id(w)] for w in layer.weights if "kernel" in w.name and id(w) in sizes]
        whole, kept = (sum(kernel[i] for kernel in kernels) for i in (0, 1))
        before += own
        after += own * kept // whole if whole else own
    return before, after


def compact(model: keras.Model, *, rules: Sequence[Rule] = DEFAULT_RULES) -> keras.Model:
    """A smaller model of stock Keras layers, without the units that were removed.

    A unit is a column of a dense layer or a channel of a convolution. It is removed where
    its own weights are zero, and so are the rows of the next kernels that read it: `MeSimp`
    leaves units so (arXiv 1711.06528, section 3.2), and so may any other pruning. Taken out are
    its column and bias, its weights in the layers in between that treat each unit apart
    (batch norms, depthwise convolutions, …), and the rows that read it. So the model
    computes what it computed, up to the order in which numbers are summed.

    A layer stays whole where its units cannot be told apart behind it: where it is an
    output, where an addition or a layer that is not known reads it, where it or its reader
    is called more than once. The log (level INFO) has the table of `plan_compaction`, with
    the reasons.

    What belongs to a weight in the optimizer's state is cut as the weight is, so that
    training goes on. The model is compiled as the old one was. It is built anew, as
    `keras.models.clone_model` does; a subclass of a functional model becomes a functional one.

    Args:
        model: a built functional or sequential model. It is not changed.
        rules: those that `rewrite` was given.

    Returns:
        The smaller model.

    Raises:
        ValueError: if `model` is not a built Keras model, has no graph, quantizes kernels
            or inputs, or has no removed unit that can be taken out; or if no copy of it can
            be made.
    """
    with class_swap.lock:
        plan = plan_compaction(model, rules=rules)
        _check(model, plan)
        # A copy whose optimizer, loss and metrics can be handed on.
        source = restore(model, rules=rules)
        activeness.detach(source)
        strategy = strategy_of(source)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            smaller = _Compactor(source).compact()
    logging.info("%s", plan)
    return smaller


def _check(model: keras.Model, plan: Compaction) -> None:
    for place in walk_layers(model):
        operands = operands_of(place.layer)
        if operands.kernel is not None or operands.inputs is not None:
            raise ValueError(
                "Expected a model whose kernels and inputs are float: `restore(model)` or "
                f"`deploy(model)` first. Received: '{model.name}', whose layer '{place.path}' "
                "quantizes them"
            )
    if plan.removed:
        return
    whole = [f"{layer.path} ({'; '.join(layer.reasons)})" for layer in plan.layers if layer.reasons]
    raise ValueError(
        "Expected a model with removed hidden units, as MeSimp leaves them: with only zeros in "
        f"their own weights and in the rows that read them. Received: '{model.name}', which has "
        "none that can be taken out" + (f"; left whole: {', '.join(whole)}" if whole else "")
    )


class _Compactor:
    """Builds the smaller model after `source`, which it uses up."""

    def __init__(self, source: keras.Model) -> None:
        self.source = source
        graph = unit_graph(source)
        self.removed = removed = graph.removed()
        self.inputs = graph.inputs
        self.target_shapes = graph.target_shapes
        self.units = {
            id(hidden.layer): hidden.count - int(removed[hidden.numbers].sum())
            for hidden in graph.hidden
        }
        #: `id` of a variable → axis and the indices that stay.
        self.kept: dict[int, list[tuple[int, np.ndarray]]] = collections.defaultdict(list)
        for part in graph.parts:
            self.kept[id(part.variable)].append((part.axis, part.kept(removed)))
        self.layers: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
        self.clones: dict[int, Any] = {}
        #: `id` of a variable of `source` → that of the smaller model.
        self.variables: dict[int, keras.Variable] = {}

    def compact(self) -> keras.Model:
        compiled, self.source.compiled = self.source.compiled, False  # Else Keras compiles it.
        smaller = self.clone_model(self.source)
        for old, new in self.layers:
            for theirs, ours in zip(old.variables, new.variables, strict=True):
                self.variables[id(theirs)] = ours
                ours.assign(self.cut(theirs, ops.convert_to_numpy(theirs)))
        # Containers come first: their flag sets those of their layers.
        smaller.trainable = self.source.trainable
        for theirs, ours in zip(walk_layers(self.source), walk_layers(smaller), strict=True):
            ours.layer.trainable = theirs.layer.trainable
        if compiled:
            self.compile(smaller)
        return smaller

    def clone(self, layer: Any) -> Any:
        """A new layer, model or operation, of the size that it will have."""
        new = self.clones.get(id(layer))
        if new is None:
            is_model = keras_internals.graph(layer) is not None
            new = self.clone_model(layer) if is_model else self.clone_layer(layer)
            self.clones[id(layer)] = new
        return new

    def clone_model(self, model: keras.Model) -> keras.Model:
        """A new model; `model` is the whole one, or one inside it."""
        if isinstance(model, keras.Sequential):
            if model is self.source:
                return keras.models.clone_model(model, clone_function=self.clone)
            # It finds the size of its inputs when it is called.
            return keras.Sequential(list(map(self.clone, model.layers)), name=model.name)
        flows = self.inputs.get(id(model), [None] * len(model.inputs))
        inputs = []
        for tensor, flow in zip(model.inputs, flows, strict=True):
            layer, shape = keras_internals.history(tensor)[0], list(tensor.shape)
            if flow is not None:
                shape[flow.axis] = len(flow.kept(self.removed))
            # Keras would name it after the tensor.
            inputs.append(keras.Input(batch_shape=shape, dtype=tensor.dtype, name=layer.name))
        packed = keras.tree.pack_sequence_as(model.input, inputs)
        return keras.models.clone_model(model, input_tensors=packed, clone_function=self.clone)

    def clone_layer(self, layer: Any) -> Any:
        config = layer.get_config()
        count = self.units.get(id(layer))
        if count is not None:
            config["units" if isinstance(layer, layers.Dense) else "filters"] = count
        if id(layer) in self.target_shapes:
            config["target_shape"] = self.target_shapes[id(layer)]
        try:
            new = type(layer).from_config(config)
        except Exception as error:
            raise ValueError(
                "Expected layers that can be made anew from their configuration. Received: "
                f"'{layer.name}' of class {type(layer).__name__}: {summarize_error(error)}"
            ) from error
        if isinstance(layer, keras.layers.Layer):
            self.layers.append((layer, new))
        return new

    def cut(self, variable: keras.Variable, values: np.ndarray) -> np.ndarray:
        """The values of what stays of a variable, or of one like it."""
        for axis, indices in self.kept.get(id(variable), ()):
            values = np.take(values, indices, axis)
        return values

    def compile(self, smaller: keras.Model) -> None:
        """Compiles as `source` was compiled, with the optimizer's state."""
        arguments = dict(keras_internals.compile_arguments(self.source))
        old = self.source.optimizer
        arguments["optimizer"] = old
        if old is not None:
            smaller_optimizer = type(old).from_config(old.get_config())
            if old.built:
                smaller_optimizer = self.optimizer()
            arguments["optimizer"] = smaller_optimizer
        scaled = isinstance(old, keras.optimizers.LossScaleOptimizer)
        smaller.compile(**arguments, auto_scale_loss=scaled)

    def optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer of the smaller model, with what stays of the old one's state."""
        old = self.source.optimizer
        trained = keras_internals.optimized_variables(old)
        twin = twin_of(old, [self.variables[id(variable)] for variable in trained])
        fresh = []
        pairs = zip(old.variables, twin.optimizer.variables, strict=True)
        for position, (theirs, ours) in enumerate(pairs):
            values = ops.convert_to_numpy(theirs)
            if position in twin.slots:
                values = self.cut(trained[twin.slots[position]], values)
            if values.shape == tuple(ours.shape):
                ours.assign(values)
            else:
                fresh.append(ours.name)
        if fresh:
            logging.warning(
                "%s: new, because it cannot be cut, is of the optimizer's state: %s.",
                self.source.name,
                ", ".join(fresh),
            )
        return twin.optimizer
