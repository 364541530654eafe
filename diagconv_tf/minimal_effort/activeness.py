"""How often each hidden unit is among the most active ones, counted while a model trains.

Source: arXiv 1711.06528, section 3.2. A unit is active for an example where its gradient is
among the k largest of the layer's, by absolute value. Only a backward pass knows that, and
no backward pass may write state on JAX. So the counts leave it as a gradient: a layer gets
a trainable variable of which its outputs do not depend, and whose gradient is what this
batch adds to the counts. The optimizer's `apply` adds it, in every step, before the
optimizer's own part sees the gradients: whatever that does (accumulate, skip, scale, clip)
the counts are exact, and it is what it would be without them.

Keras's own way for such variables, `overwrite_with_gradient`, is not exact where gradients
are accumulated: of the steps between two updates it keeps the maximum, and not the sum.

While counters are attached, they are among `model.trainable_weights`: Keras computes the
gradients of nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf import class_swap, keras_internals
from diagconv_tf.distribution import strategy_of
from diagconv_tf.lowbit import backends
from diagconv_tf.minimal_effort.operands import chosen
from diagconv_tf.minimal_effort.unit_graph import HiddenLayer, UnitGraph
from diagconv_tf.model_tree import walk_layers

#: Where a layer keeps its counter.
_COUNTER = "_activeness"
#: Where an optimizer keeps what it does with counters.
_STEPS = "_diagconv_counting"


@dataclasses.dataclass(frozen=True)
class Activeness:
    """How often the units of a layer were active.

    Attributes:
        hits: for each unit the number of examples for which its gradient was not zero and
            among the k largest.
        examples: the number of examples.
    """

    hits: np.ndarray
    examples: int


class ActivenessCounter(keras.layers.Layer):
    """Counts for how many examples each unit of a layer is active.

    As a layer inside the layer it has a place of its own in Keras's files: stock models know
    nothing of it. Counts are floats, because only floats have gradients: they are exact up
    to 2**24 examples.

    An example is what the first axis counts. Where a layer's output has more axes (positions
    of an image, words of a sentence), a unit's gradient is the sum of the absolute values
    over them; the paper has one axis only. It is the top k of each example that counts, also
    where training uses one choice for the whole batch (`unified=True`), as in the paper.

    Args:
        units: how many units the layer has.
        axis: the axis of its outputs along which they lie, from the front.
        k: how many units of an example are active.
    """

    def __init__(self, units: int, axis: int, k: int) -> None:
        super().__init__(name="activeness", dtype="float32")
        self.axis = axis
        self.k = min(k, units)
        # The last number counts the examples. An optimizer that is made for the model while
        # it has counters keeps no state for them.
        self.counts = self.add_weight(
            name="activeness",
            shape=(units + 1,),
            initializer="zeros",
            autocast=False,
            aggregation="only_first_replica",
            overwrite_with_gradient=True,
        )
        self.built = True

    def observe(self, outputs: Any) -> Any:
        """`outputs`, unchanged, whose gradient is counted."""
        if isinstance(outputs, keras.KerasTensor):
            return outputs
        shape, rank = ops.shape(outputs), len(outputs.shape)
        counts = ops.convert_to_tensor(self.counts)
        along = [-1 if axis == self.axis else 1 for axis in range(rank)]
        hits = ops.broadcast_to(ops.reshape(counts[:-1], along), shape)
        hits = backends.through(_Hits(self.axis, self.k), hits)
        one = (shape[0], *[1] * (rank - 1))
        examples = ops.broadcast_to(ops.reshape(counts[-1], [1] * rank), one)
        examples = backends.through(_One(), examples)
        probe = ops.add(hits, examples)
        # Exactly zero, with a gradient.
        zero = ops.subtract(probe, ops.stop_gradient(probe))
        return ops.add(outputs, ops.cast(zero, outputs.dtype))

    def read(self) -> Activeness:
        """The counts."""
        counts = np.rint(ops.convert_to_numpy(self.counts)).astype("int64")
        return Activeness(counts[:-1], int(counts[-1]))

    def reset(self) -> None:
        """Starts again from zero."""
        self.counts.assign(np.zeros(self.counts.shape, "float32"))

    def load_own_variables(self, store: Any) -> None:
        # A file of the model without counters has none.
        if "0" in store:
            self.counts.assign(np.asarray(store["0"]))


@dataclasses.dataclass(frozen=True)
class _Hits:
    """From a gradient to 1 for each unit of each example that is active, else 0."""

    axis: int
    k: int

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        rank = len(gradient.shape)
        size = ops.abs(gradient)
        if rank > 2:
            size = ops.sum(size, axis=[a for a in range(1, rank) if a != self.axis])
        is_hit = ops.logical_and(chosen(size, self.k), size > 0)
        hits = ops.cast(is_hit, gradient.dtype)
        if rank == 2:
            return hits
        # The sum over an example's positions is taken later: they all stand at one of them.
        positions = [a for a in range(1, rank) if a != self.axis]
        hits = ops.expand_dims(hits, positions)
        first = ops.ones_like(gradient)
        for axis in positions:
            size_of_axis = ops.shape(gradient)[axis]
            index = ops.cast(ops.equal(ops.arange(size_of_axis), 0), gradient.dtype)
            along = [-1 if a == axis else 1 for a in range(rank)]
            first = ops.multiply(first, ops.reshape(index, along))
        return ops.multiply(first, hits)


@dataclasses.dataclass(frozen=True)
class _One:
    """From a gradient to ones."""

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        return ops.ones_like(gradient)


def counter_of(layer: keras.layers.Layer) -> ActivenessCounter | None:
    """The counter that a layer has."""
    # PyTorch keeps layers of layers elsewhere than in `vars`.
    return getattr(layer, _COUNTER, None)


def is_counter(variable: Any) -> bool:
    """Whether a variable is that of a counter."""
    return variable.name == "activeness" and getattr(variable, "overwrite_with_gradient", False)


def activeness_of(model: keras.Model) -> dict[str, Activeness]:
    """The present counts: path of each layer that has a counter → its activeness."""
    return {
        place.path: counter.read()
        for place in walk_layers(model)
        if (counter := counter_of(place.layer)) is not None
    }


def attach(model: keras.Model, graph: UnitGraph, layers: Sequence[tuple[HiddenLayer, int]]) -> None:
    """Lets layers count, and the optimizer keep removed units at zero.

    Layers that count already go on. Call it between two steps of a training: on JAX after
    `keras_internals.sync_training_state`.

    Args:
        model: a compiled model.
        graph: its units.
        layers: layers of the graph, each with k.

    Raises:
        ValueError: if the model is not compiled, or its optimizer was built for counters
            that another training left.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not hasattr(optimizer, "apply"):
        raise ValueError(
            f"Expected a model that is compiled with an optimizer. Received: '{model.name}', "
            "which is not"
        )
    strategy = strategy_of(model)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        if not optimizer.built:
            optimizer.build([v for v in model.trainable_variables if not is_counter(v)])
        if any(map(is_counter, keras_internals.optimized_variables(optimizer))):
            raise ValueError(
                "Expected an optimizer that was built for the model's weights. Received: one that "
                "was built while the model had counters; compile the model again"
            )
        for hidden, k in layers:
            if counter_of(hidden.layer) is None:
                # PyTorch finds variables by their paths, which must differ.
                with contextlib.ExitStack() as scopes:
                    for name in hidden.path.split("/"):
                        scopes.enter_context(keras.name_scope(name))
                    counter = ActivenessCounter(hidden.count, hidden.axis, k)
                _set_counter(hidden.layer, counter)
    guard = _Guard.of(graph, [hidden for hidden, _ in layers])
    _Steps(tuple(model.trainable_variables), guard).set(optimizer)
    _refresh(model)


def detach(model: keras.Model) -> None:
    """Takes the counters away. Layers and optimizer are as if they never had any."""
    optimizer = getattr(model, "optimizer", None)
    counting = [p.layer for p in walk_layers(model) if counter_of(p.layer) is not None]
    if not counting and (optimizer is None or _STEPS not in vars(optimizer)):
        return
    for layer in counting:
        _set_counter(layer, None)
    if optimizer is not None:
        _Steps.unset(optimizer)
    _refresh(model)


def _refresh(model: keras.Model) -> None:
    """Tells PyTorch of the present variables, and lets what is compiled be compiled again."""
    if keras.backend.backend() == "torch":
        keras_internals.track_torch_variables(model)
    for kind in class_swap.STEP_KINDS:
        if getattr(model, f"{kind}_function", None) is not None:
            class_swap.recompile(model, kind)


def _set_counter(layer: keras.layers.Layer, counter: ActivenessCounter | None) -> None:
    # A built layer takes no more state, unless it is told to.
    tracker = keras_internals.tracker(layer)
    locked = tracker.locked
    tracker.unlock()
    try:
        if counter is None:
            tracker.untrack(counter_of(layer))
            delattr(layer, _COUNTER)
        else:
            setattr(layer, _COUNTER, counter)
    finally:
        if locked:
            tracker.lock()


@dataclasses.dataclass(frozen=True, eq=False)
class _Guard:
    """Keeps the weights of removed units at zero, by zeros in their gradients.

    The own weights of a removed unit have no gradient anyway, as nothing reads it. But the
    rows that read it would, where zeros in front of its activation are no zeros behind it
    (a sigmoid).

    Attributes:
        own: variables and axes of the weights that make the units, layer by layer.
        read: variable, axis, and the places of its units among those of `own`, put behind
            each other, for each kernel that reads them. The last place stands for none.
    """

    own: tuple[tuple[tuple[keras.Variable, int], ...], ...]
    read: tuple[tuple[keras.Variable, int, np.ndarray], ...]

    @classmethod
    def of(cls, graph: UnitGraph, layers: Sequence[HiddenLayer]) -> _Guard:
        """The guard for layers of a graph."""
        places = np.full(graph.count + 1, sum(layer.count for layer in layers))
        own, first = [], 0
        for layer in layers:
            parts = [part for part in graph.own if part.layer is layer.layer]
            own.append(tuple((part.variable, part.axis) for part in parts))
            places[layer.numbers] = np.arange(first, first + layer.count)
            first += layer.count
        read = [(part.variable, part.axis, places[part.units]) for part in graph.read]
        return cls(tuple(own), tuple(r for r in read if np.any(r[2] != first)))

    def guarded(self, variables: Sequence[keras.Variable], gradients: Sequence[Any]) -> list[Any]:
        """`gradients` with zeros for the rows that read removed units."""
        guarded = list(gradients)
        index = {id(variable): i for i, variable in enumerate(variables)}
        used = None
        for variable, axis, places in self.read:
            i = index.get(id(variable))
            if i is None or guarded[i] is None:
                continue
            if used is None:
                used = self._used()
            keep = ops.logical_or(ops.take(used, places), _any(variable, axis))
            along = [-1 if a == axis else 1 for a in range(len(variable.shape))]
            gradient = guarded[i]
            guarded[i] = ops.where(ops.reshape(keep, along), gradient, ops.zeros_like(gradient))
        return guarded

    def _used(self) -> Any:
        """For each place whether the unit has own weights that are not zero."""
        found = []
        for parts in self.own:
            flags = [_any(variable, axis) for variable, axis in parts]
            found.append(flags[0] if len(flags) == 1 else ops.logical_or(*flags))
        return ops.concatenate([*found, ops.ones((1,), "bool")])


def _any(variable: keras.Variable, axis: int) -> Any:
    """For each index of an axis whether any entry is not zero."""
    others = tuple(a for a in range(len(variable.shape)) if a != axis)
    flags = ops.not_equal(ops.convert_to_tensor(variable), 0)
    return ops.any(flags, axis=others) if others else flags


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """What an optimizer does around its own steps.

    Bound methods in the optimizer's own attributes run first: the optimizer keeps its class,
    its config and its state, and so do files and copies of it.

    Attributes:
        variables: the model's trainable ones, in their order, with the counters'.
        guard: of the removed units.
    """

    variables: tuple[keras.Variable, ...]
    guard: _Guard

    def set(self, optimizer: keras.optimizers.Optimizer) -> None:
        attributes = vars(optimizer)
        attributes[_STEPS] = self
        for name, function in _METHODS.items():
            attributes[name] = types.MethodType(function, optimizer)

    @staticmethod
    def unset(optimizer: keras.optimizers.Optimizer) -> None:
        for name in (_STEPS, *_METHODS):
            vars(optimizer).pop(name, None)


def _apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
    steps: _Steps = vars(optimizer)[_STEPS]
    grads = list(grads)
    if trainable_variables is None:
        if len(grads) != len(steps.variables):
            # From `_stateless_apply`.
            return type(optimizer).apply(optimizer, grads)
        trainable_variables = steps.variables
    others, their_grads = [], []
    for variable, gradient in zip(trainable_variables, grads, strict=True):
        if not is_counter(variable):
            others.append(variable)
            their_grads.append(gradient)
        elif gradient is not None:
            variable.assign(ops.add(variable, backends.sum_over_replicas(gradient)))
    return type(optimizer).apply(optimizer, steps.guard.guarded(others, their_grads), others)


def _stateless_apply(
    optimizer: Any, optimizer_variables: Any, grads: Any, trainable_variables: Any
) -> tuple[list[Any], list[Any]]:
    steps: _Steps = vars(optimizer)[_STEPS]
    values = list(trainable_variables)
    places = [i for i, variable in enumerate(steps.variables) if not is_counter(variable)]
    for i, variable in enumerate(steps.variables):
        if is_counter(variable):
            values[i] = ops.add(values[i], grads[i])
    others = [steps.variables[i] for i in places]
    with keras.StatelessScope(state_mapping=list(zip(steps.variables, values, strict=True))):
        their_grads = steps.guard.guarded(others, [grads[i] for i in places])
    new_values, optimizer_variables = type(optimizer).stateless_apply(
        optimizer, optimizer_variables, their_grads, [values[i] for i in places]
    )
    for i, value in zip(places, new_values, strict=True):
        values[i] = value
    return values, optimizer_variables


def _finalize_variable_values(optimizer: Any, var_list: Iterable[keras.Variable]) -> None:
    others = [variable for variable in var_list if not is_counter(variable)]
    type(optimizer).finalize_variable_values(optimizer, others)


_METHODS: dict[str, Callable[..., Any]] = {
    "apply": _apply,
    "stateless_apply": _stateless_apply,
    "finalize_variable_values": _finalize_variable_values,
}
