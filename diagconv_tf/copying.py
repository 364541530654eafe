"""A faithful copy of a Keras model; it knows nothing of convolutions.

`copy_model` copies the objects that a model is made of, attribute by attribute,
instead of building a second model from configurations. So whatever is in no
configuration comes along: names and paths that came from global counters, flags,
attributes set later, layers shared across nesting levels, classes that are not
registered for serialisation, optimizer slots, metrics. The price is to know the
few places where Keras keeps what must not be copied as it stands:

- nodes of graphs that the model is no part of (`_link_graph`),
- numbers that are the `id`s of objects (`_translate_ids`),
- compiled functions and what the last call left behind (`RESET_ATTRIBUTES`, `EMPTIED_ATTRIBUTES`),
- tables that live in the framework's runtime (`_copy_by_config`).
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import keras

from diagconv_tf import keras_internals, plain_objects
from diagconv_tf.keras_internals import (
    CONTAINER_CACHE_ATTRIBUTE,
    DEPENDENCY_ATTRIBUTES,
    DISTRIBUTION_ATTRIBUTES,
    EMPTIED_ATTRIBUTES,
    HISTORY_ATTRIBUTE,
    RESET_ATTRIBUTES,
)

#: Objects whose attributes are copied one by one. They have to be named because
#: Keras's own objects reduce themselves to `.keras` files when they are copied.
KERAS_TYPES = (
    keras.Operation,
    keras.Function,
    keras.Variable,
    keras.KerasTensor,
    keras.metrics.Metric,
    keras.losses.Loss,
    keras.optimizers.Optimizer,
)


def copy_model(model: keras.Model, *, distributed: bool = True) -> keras.Model:
    """Copies a model with all of its state; the two share nothing that can change.

    The copy has the same class, layers, names, paths, values, flags, attributes,
    compile configuration, metrics and optimizer state, so training goes on from
    the same point. Functions, classes, devices and distribution strategies are
    shared; but a function that refers to the model, or to a part of it, through
    its closure or default arguments becomes one that refers to the copy. Layers
    called outside the model, as in a larger model built on its output, are left
    behind. The variables of the copy are mirrored, or divided among devices, as
    the model's are, whether its strategy or distribution is current or not.

    Args:
        model: Keras model: functional, sequential or subclassed, compiled or not.
            It is not changed.
        distributed: False makes a copy that knows of no strategy or layout, with
            its variables on one device of this process; of values that are
            divided among processes it repeats this one's part, which is enough
            for measuring. No strategy or distribution must be current then.

    Returns:
        The copy. It does not keep `model` alive.

    Raises:
        ValueError: If `model` is no Keras model, or holds something that cannot
            be copied, such as an open file, a lock or a loaded SavedModel.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a `keras.Model`. Received: model={model!r}")
    # While `fit` runs on JAX, variables lag behind the state of the loop.
    keras_internals.sync_training_state(model)
    if not distributed:
        return _Copier(distributed=False).copy_model(model)
    with _strategy_scope(model):
        return _Copier().copy_model(model)


@contextlib.contextmanager
def _strategy_scope(model: keras.Model) -> Iterator[None]:
    if keras.backend.backend() == "tensorflow":
        # Variables of a strategy can only be made inside it.
        with model.distribute_strategy.scope():
            yield
    else:
        yield


class _Copier:
    """Copies one model: what is met twice is copied once."""

    def __init__(self, distributed: bool = True) -> None:
        self.distributed = distributed
        self.copies: dict[int, Any] = {}
        # An `id` is that of an object only as long as the object lives.
        self.originals: list[Any] = []
        # A chain of layers is longer than Python's stack is deep: objects of
        # Keras are made empty when they are met, and filled in turn.
        self.unfilled: collections.deque[tuple[Any, Any]] = collections.deque()
        self.operations: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[keras.KerasTensor, tuple[Any, int, int]]] = []
        self.functions: list[keras.Function] = []
        self.variables: list[tuple[keras.Variable, keras.Variable]] = []
        self.optimizers: list[tuple[Any, Any]] = []
        self.keyed_by_numbers: list[set | dict] = []

    def copy_model(self, model: keras.Model) -> keras.Model:
        duplicate = self.copy(model)
        while self.unfilled:
            self._fill(*self.unfilled.popleft())
        self._link_graph()
        self._translate_ids()
        return duplicate

    def copy(self, original: Any) -> Any:
        if id(original) in self.copies:
            return self.copies[id(original)]
        if isinstance(original, KERAS_TYPES):
            return self._copy_keras_object(original)
        if keras_internals.is_tensorflow_container(original):
            return self._copy_tensorflow_container(original)
        if plain_objects.is_shared(original):
            return original
        if plain_objects.is_array(original):
            copy_array = plain_objects.copy_array
            if not self.distributed:
                copy_array = plain_objects.copy_array_here
            return self._remember(original, copy_array(original))
        if isinstance(original, types.FunctionType):
            return self._copy_function(original)
        if isinstance(original, types.MethodType):
            method = types.MethodType(original.__func__, self.copy(original.__self__))
            return self._remember(original, method)
        if type(original) is tuple:
            return self._remember(original, tuple(map(self.copy, original)))
        return self._copy_by_reduction(original)

    def _remember(self, original: Any, duplicate: Any) -> Any:
        self.copies[id(original)] = duplicate
        self.originals.append(original)
        return duplicate

    def _copy_keras_object(self, original: Any) -> Any:
        keras_internals.check_copyable(original)
        if isinstance(original, keras.Layer) and _has_assets(original):
            duplicate = self._remember(original, _copy_by_config(original))
        else:
            duplicate = self._remember(original, object.__new__(type(original)))
        if isinstance(original, (keras.Operation, keras.Function)):
            for name in vars(original).keys() & set(EMPTIED_ATTRIBUTES):
                # Now, because TensorFlow's list of dependencies has them too.
                empty = type(vars(original)[name])([])
                vars(duplicate)[name] = self._remember(vars(original)[name], empty)
            self.operations.append((original, duplicate))
        if isinstance(original, keras.Function):
            self.functions.append(duplicate)
        if isinstance(original, keras.optimizers.Optimizer):
            self.optimizers.append((original, duplicate))
        if isinstance(original, keras.Variable):
            self.variables.append((original, duplicate))
        self.unfilled.append((original, duplicate))
        return duplicate

    def _fill(self, original: Any, duplicate: Any) -> None:
        attributes = vars(duplicate)
        # The dependencies last, so that a refusal names the user's own attribute.
        names = sorted(vars(original), key=lambda name: name in DEPENDENCY_ATTRIBUTES)
        for name in names:
            if name in attributes:
                continue
            value = vars(original)[name]
            with _refusing(original, f"attribute `{name}`"):
                if name in RESET_ATTRIBUTES and isinstance(original, keras.Model):
                    attributes[name] = RESET_ATTRIBUTES[name]
                elif name in DISTRIBUTION_ATTRIBUTES and not self.distributed:
                    attributes[name] = DISTRIBUTION_ATTRIBUTES[name]()
                elif name == HISTORY_ATTRIBUTE:
                    self._copy_producer(duplicate, value)
                else:
                    if name in DEPENDENCY_ATTRIBUTES:
                        value = _without_reset(value)
                    attributes[name] = self.copy(value)

    def _copy_producer(self, tensor: keras.KerasTensor, history: tuple[Any, int, int]) -> None:
        """Copies the node that a tensor comes from, and so all before it."""
        self.tensors.append((tensor, history))
        operation, index, _ = history
        if operation is not None:
            self.copy(keras_internals.inbound_nodes(operation)[index])

    def _copy_function(self, original: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in original.__closure__ or ())
        duplicate = types.FunctionType(
            original.__code__, original.__globals__, original.__name__, None, cells or None
        )
        # Before its parts: a function may refer to itself.
        self._remember(original, duplicate)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(duplicate, name, getattr(original, name))
        duplicate.__defaults__ = self.copy(original.__defaults__)
        duplicate.__kwdefaults__ = self.copy(original.__kwdefaults__)
        vars(duplicate).update(self.copy(vars(original)))
        for cell, original_cell in zip(cells, original.__closure__ or (), strict=True):
            if not plain_objects.is_empty(original_cell):
                cell.cell_contents = self.copy(original_cell.cell_contents)
        return duplicate

    def _copy_by_reduction(self, original: Any) -> Any:
        """Copies containers and plain objects by the protocol of `pickle`."""
        reduction = original.__reduce_ex__(4)
        if isinstance(reduction, str):  # the name of something global
            return original
        make, arguments, state, items, pairs, set_state = (*reduction, *[None] * 4)[:6]
        duplicate = self._remember(original, self.copy(make)(*map(self.copy, arguments)))
        if state is not None:
            plain_objects.set_state(duplicate, self.copy(state), self.copy(set_state))
        # Past the methods of subclasses: Keras's lists track what is appended.
        container = plain_objects.builtin_base(duplicate)
        for item in items or ():
            container.append(duplicate, self.copy(item))
        for key, value in pairs or ():
            container.__setitem__(duplicate, self.copy(key), self.copy(value))
        if isinstance(duplicate, (set, dict)) and any(type(key) is int for key in duplicate):
            self.keyed_by_numbers.append(duplicate)
        return duplicate

    def _copy_tensorflow_container(self, original: Any) -> Any:
        keras_internals.check_copyable(original)
        # Not by giving it its items: it would track them before they are filled.
        duplicate = self._remember(original, type(original)(()))
        if hasattr(original, "__wrapped__"):
            duplicate.__wrapped__ = self.copy(original.__wrapped__)
        # The wrapper of tuples shows the attributes of the tuple, which has none.
        for name in getattr(original, "__dict__", DEPENDENCY_ATTRIBUTES):
            # The sentinel is a cache, with weak references to other containers.
            own = not name.startswith("__") and name != CONTAINER_CACHE_ATTRIBUTE
            if own and hasattr(original, name):
                setattr(duplicate, name, self.copy(getattr(original, name)))
        return duplicate

    def _link_graph(self) -> None:
        """Gives operations and tensors the nodes that were copied, and no others.

        An operation knows every graph that it was called in. Copied are only the
        nodes that the tensors of the model come from.
        """
        for original, duplicate in self.operations:
            for nodes_of in (keras_internals.inbound_nodes, keras_internals.outbound_nodes):
                nodes = [self.copies.get(id(node)) for node in nodes_of(original)]
                nodes_of(duplicate).extend(node for node in nodes if node is not None)
        for tensor, (operation, index, position) in self.tensors:
            if operation is not None:
                node = self.copies[id(keras_internals.inbound_nodes(operation)[index])]
                operation = node.operation
                index = keras_internals.inbound_nodes(operation).index(node)
            keras_internals.set_history(tensor, operation, index, position)
        for function in self.functions:
            depths = keras_internals.nodes_by_depth(function).values()
            keras_internals.set_node_keys(function, [node for nodes in depths for node in nodes])

    def _translate_ids(self) -> None:
        """Replaces the keys by which Keras finds what it tracks."""
        for container in self.keyed_by_numbers:
            # Keras's own keys are the `id`s of objects.
            plain_objects.replace_keys(
                container,
                {key: id(self.copies[key]) for key in container if key in self.copies},
            )
        for original, duplicate in self.optimizers:
            key = keras_internals.variable_key
            keys = {key(original, old): key(duplicate, new) for old, new in self.variables}
            for value in vars(duplicate).values():
                if isinstance(value, (set, dict)):
                    plain_objects.replace_keys(value, keys)


def _copy_by_config(original: keras.Layer) -> keras.Layer:
    """Copies a layer with assets, such as a vocabulary, the way Keras saves it."""
    with _refusing(original, "assets"), contextlib.ExitStack() as scopes:
        for parent in (original.path or "").split("/")[:-1]:
            scopes.enter_context(keras.name_scope(parent))
        config = original.get_config()
        duplicate = type(original).from_config(config)
        if original.built:
            duplicate.build_from_config(original.get_build_config() or {})
        variables: dict[str, Any] = {}
        original.save_own_variables(variables)
        duplicate.load_own_variables(variables)
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            duplicate.load_assets(folder)
        if original.variables or duplicate.variables or duplicate.get_config() != config:
            raise TypeError("its configuration and assets do not restore it")
        keras_internals.set_layer_path(duplicate, original.path)
    return duplicate


def _has_assets(layer: keras.Layer) -> bool:
    return hasattr(layer, "save_assets") and hasattr(layer, "load_assets")


def _without_reset(dependencies: Any) -> Any:
    if isinstance(dependencies, dict):
        return {name: value for name, value in dependencies.items() if name not in RESET_ATTRIBUTES}
    return [reference for reference in dependencies if reference.name not in RESET_ATTRIBUTES]


@contextlib.contextmanager
def _refusing(owner: Any, part: str) -> Iterator[None]:
    try:
        yield
    except (_RefusedError, keras_internals.MissingNameError):
        raise
    except Exception as error:
        name = getattr(owner, "path", None) or getattr(owner, "name", "")
        raise _RefusedError(
            f"Expected a model that can be copied. Received: {part} of {type(owner).__name__} "
            f"'{name}', which cannot: {error}. Use `in_place=True` to change the model itself."
        ) from error


class _RefusedError(ValueError):
    """Already says which object cannot be copied."""
