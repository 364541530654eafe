"""TensorFlow: `tf.custom_gradient`; in graphs, gradients by name."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import tensorflow as tf

from diagconv_tf import keras_internals
from diagconv_tf.backends.tensorflow import keep_apart

# Odd, and far from small numbers: seeds that users choose are often neighbours.
_BETWEEN_REPLICAS = 0x5851F42D


def through(operand: Any, tensor: Any, seed: Any) -> Any:
    seeds = [] if seed is None else [tf.convert_to_tensor(seed)]
    if tf.executing_eagerly():

        @tf.custom_gradient
        def identity(tensor: Any) -> tuple:
            return tf.identity(tensor), lambda gradient: operand(gradient, seed)

        return identity(tensor)
    graph = tf.compat.v1.get_default_graph()
    if not graph.building_function:
        return _in_graph(operand, tensor, *seeds)
    # A tape looks for gradients by the type of an operation, and not by the name that is
    # written on it; inside a function that is called they are found by the name. An
    # attribute of the graph, so that they live no longer than it.
    functions = getattr(graph, "_diagconv_tf_operands", None)
    if functions is None:
        functions = graph._diagconv_tf_operands = {}
    if operand not in functions:
        functions[operand] = tf.function(functools.partial(_in_graph, operand), autograph=False)
    return functions[operand](tensor, *seeds)


def _in_graph(operand: Any, tensor: Any, *seeds: Any) -> Any:
    """`tensor`, by an operation that carries the name of its gradient."""
    graph = tf.compat.v1.get_default_graph()
    registered = _RegisteredGradient.take(operand)
    with graph.gradient_override_map({"IdentityN": registered.name}):
        outputs = tf.identity_n([tensor, *seeds])
    registered.operation = weakref.ref(outputs[0].op)
    weakref.finalize(graph, registered.give_back)
    return outputs[0]


class _RegisteredGradient:
    """A gradient operand under a name by which the operations of graphs refer to it.

    `tf.custom_gradient` would keep every graph alive for good: it registers a new gradient
    for each call in a graph, with tensors of the graph in it. This one finds its seed among
    the inputs of its operation, and its name is used again once the graph is gone. A
    SavedModel stores one gradient for each name, so a name is used once in a graph.
    """

    _free: ClassVar[dict[Any, list[_RegisteredGradient]]] = {}
    _counter = itertools.count()

    def __init__(self, operand: Any) -> None:
        self._operand = operand
        self.name = f"diagconv_tf_operand_{next(self._counter)}"
        self.operation: Callable[[], Any] = lambda: None
        tf.RegisterGradient(self.name)(self._gradient)

    @classmethod
    def take(cls, operand: Any) -> _RegisteredGradient:
        """One that no living graph uses."""
        try:
            return cls._free.setdefault(operand, []).pop()
        except IndexError:  # A check before could race with another thread.
            return cls(operand)

    def give_back(self) -> None:
        self._free[self._operand].append(self)

    @tf.autograph.experimental.do_not_convert
    def _gradient(self, operation: Any, gradient: Any, *seeds: Any) -> Any:
        # A SavedModel's writer names no operation.
        operation = self.operation() if operation is None else operation
        seed = operation.inputs[1] if seeds else None
        return [self._operand(gradient, seed), *(None for _ in seeds)]


def of_this_replica(seed: Any) -> Any:
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return seed
    replica = tf.cast(context.replica_id_in_sync_group, seed.dtype)
    return seed + tf.stack([replica * tf.constant(_BETWEEN_REPLICAS, seed.dtype), 0])


def sum_over_replicas(tensor: Any) -> Any:
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensor
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def outside_graphs() -> contextlib.AbstractContextManager:
    return tf.init_scope()


def update(variables: Sequence[Any], function: Callable[[int, Any, Any], Any], seed: Any) -> None:
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        for index, variable in enumerate(variables):
            variable.assign(function(index, variable.value, seed))
        return

    def update_all(strategy: Any, seed: Any) -> None:
        for index, variable in enumerate(variables):

            def assign(part: Any, seed: Any, index: int = index) -> None:
                part.assign(function(index, tf.convert_to_tensor(part), seed))

            strategy.extended.update(variable.value, assign, args=(seed,), group=False)

    # A mirrored variable is only changed on all replicas at once.
    context.merge_call(update_all, args=(seed,))


def matmul(first: Any, second: Any, transposed: str) -> Any:
    return tf.matmul(
        first, second, transpose_a=transposed == "first", transpose_b=transposed == "second"
    )


def take(tensor: Any, indices: Any, axis: int) -> Any:
    return tf.gather(tensor, indices, axis=axis)


def place_columns(values: Any, columns: Any, count: int) -> Any:
    rows = values.shape[0]
    dtype = tf.int64 if rows * count > tf.int32.max else tf.int32
    places = tf.range(rows, dtype=dtype)[:, None] * count + tf.cast(columns, dtype)[None]
    # It writes 4096 x 4096 numbers in half the time that a scatter of rows and a transpose
    # take, and in a seventh of the time of a gather from compact columns and zeros.
    flat = tf.raw_ops.SparseToDense(
        sparse_indices=tf.reshape(places, (-1,)),
        output_shape=tf.constant([rows * count], dtype),
        sparse_values=tf.reshape(values, (-1,)),
        default_value=tf.zeros((), values.dtype),
        validate_indices=False,
    )
    return tf.reshape(flat, (rows, count))


def largest(magnitudes: Any, k: int) -> Any:
    values, indices = tf.math.top_k(magnitudes, k)
    if keras_internals.is_traced_for_xla(tf.compat.v1.get_default_graph()):
        # As in jax.py: XLA would sort all numbers.
        values, indices = keep_apart([values, indices])
    least, last = values[..., -1:], indices[..., -1:]
    # Of equal numbers `top_k` takes those with the lower indices.
    before = tf.range(tf.shape(magnitudes)[-1]) <= last
    return (magnitudes > least) | ((magnitudes == least) & before)


def largest_columns(totals: Any, k: int) -> Any:
    return tf.math.top_k(totals, k)[1]
