"""A functional model as a flat list of calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from diagconv_tf import keras_internals
from diagconv_tf.model_tree import walk_layers


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One call of a layer or operation.

    Attributes:
        operation: what is called.
        path: the layer's path in the model, or the operation's name.
        inputs: numbers of the values that it takes.
        outputs: numbers of the values that it gives.
        arguments: all arguments of the call, with symbolic tensors; None where the inputs
            are all there is.
        symbols: the `id` of the symbolic tensor of each input.
    """

    operation: keras.Operation
    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Any = None
    symbols: tuple[int, ...] = ()

    def call(self, values: Mapping[int, Any]) -> list[Any]:
        """Calls the operation on `values`, by number, and returns its outputs."""
        inputs = [values[number] for number in self.inputs]
        if self.arguments is None:
            return keras.tree.flatten(self.operation(*inputs))
        args, kwargs = self.arguments.fill_in(dict(zip(self.symbols, inputs, strict=True)))
        return keras.tree.flatten(self.operation(*args, **kwargs))


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The calls of a model, each after those whose outputs it takes.

    Attributes:
        steps: the calls; none of them is of a functional model.
        inputs: numbers of the model's inputs, in the order of `keras.tree.flatten`.
        outputs: the same of its outputs.
        values: number → a symbolic tensor, for shape and dtype.
        output: the model's symbolic outputs, in their structure.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    values: Mapping[int, keras.KerasTensor]
    output: Any

    def shape(self, number: int) -> tuple[int | None, ...]:
        return tuple(self.values[number].shape)


def flat_steps(model: keras.Model) -> Steps | None:
    """The calls of a functional or sequential model; None for one without a graph."""
    graph = keras_internals.graph(model)
    if graph is None:
        return None
    flattening = _Flattening({id(placed.layer): placed.path for placed in walk_layers(model)})
    inputs = [flattening.number(tensor) for tensor in graph.inputs]
    outputs = flattening.follow(graph, inputs)
    steps = tuple(flattening.steps)
    return Steps(steps, tuple(inputs), tuple(outputs), flattening.values, graph.output)


class _Flattening:
    def __init__(self, paths: Mapping[int, str]) -> None:
        self._paths = paths
        self.steps: list[Step] = []
        self.values: dict[int, keras.KerasTensor] = {}

    def number(self, tensor: keras.KerasTensor) -> int:
        """A new number for a value with the shape and dtype of `tensor`."""
        self.values[len(self.values)] = tensor
        return len(self.values) - 1

    def follow(self, graph: keras.Function, inputs: Sequence[int]) -> list[int]:
        """Adds the calls of a graph, and returns the numbers of its outputs."""
        # By call: a model that is called twice has two values for each of its tensors.
        found = {id(t): number for t, number in zip(graph.inputs, inputs, strict=True)}
        depths = keras_internals.nodes_by_depth(graph)
        for depth in sorted(depths, reverse=True):
            for node in depths[depth]:
                if not node.input_tensors:
                    continue
                taken = [found[id(tensor)] for tensor in node.input_tensors]
                inner = keras_internals.graph(node.operation)
                if inner is not None and len(inner.inputs) == len(taken):
                    given = self.follow(inner, taken)
                else:
                    given = [self.number(tensor) for tensor in node.outputs]
                    self.steps.append(
                        Step(
                            node.operation,
                            self._paths.get(id(node.operation), node.operation.name),
                            tuple(taken),
                            tuple(given),
                            node.arguments,
                            tuple(id(tensor) for tensor in node.input_tensors),
                        )
                    )
                found.update({id(t): n for t, n in zip(node.outputs, given, strict=True)})
        return [found[id(tensor)] for tensor in graph.outputs]


class StepsLayer(keras.layers.Layer):
    """Steps as a layer, which calls their operations.

    Not as a functional model: of layers from several models two may have one name.

    Args:
        steps: the steps, in order.
        inputs: numbers of the values that the layer takes, as a list.
        outputs: numbers of the values that it gives, as a list.
    """

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[int], outputs: Sequence[int]
    ) -> None:
        super().__init__(name="steps", autocast=False)
        self.steps, self.taken, self.given = tuple(steps), tuple(inputs), tuple(outputs)
        # Tracked with their weights.
        self.operations = [s.operation for s in steps if isinstance(s.operation, keras.Layer)]

    def call(self, inputs: list[Any]) -> list[Any]:
        values = dict(zip(self.taken, inputs, strict=True))
        for step in self.steps:
            values.update(zip(step.outputs, step.call(values), strict=True))
        return [values[number] for number in self.given]
