"""Copies a Keras model faithfully; knows nothing of convolutions.

`copy_model` copies the objects that a model is made of, attribute by attribute. It
does not build a second model from configurations. So the copy also has what no
configuration has: names and paths that came from global counters, flags, attributes
set later, layers shared across nesting levels, classes that are not registered for
serialisation, optimizer slots, metrics.

`Ownership` decides which objects are copied. This module then needs to know the few
places where Keras keeps what must not be copied as it is:

- nodes of graphs that the model is no part of (`_link_graph`),
- numbers that are the `id`s of objects (`_translate_ids`),
- compiled functions and results of the last call (`RESET_ATTRIBUTES`, `EMPTIED_ATTRIBUTES`),
- tables that live in the framework's runtime (`_copy_by_config`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
from absl import logging

from diagconv_tf import class_swap, keras_internals, plain_objects
from diagconv_tf.keras_internals import (
    CONTAINER_CACHE_ATTRIBUTE,
    DEPENDENCY_ATTRIBUTES,
    DISTRIBUTION_ATTRIBUTES,
    EMPTIED_ATTRIBUTES,
    HISTORY_ATTRIBUTE,
    RESET_ATTRIBUTES,
)
from diagconv_tf.ownership import KERAS_TYPES, Ownership


def copy_model(model: keras.Model, *, distributed: bool = True) -> keras.Model:
    """Copies a model with all of its state.

    The copy has the same class, layers, names, paths, values, flags, attributes,
    compile configuration, metrics and optimizer state. Training goes on from the same
    point, and training one model does not change the other.

    Copied is what the model owns: layers, variables, graph, optimizer, metrics (those
    that were passed to `compile` too), and the attributes of all these, with the
    lists, dictionaries, arrays and plain objects in them.

    Shared is the code that others handed to the model, with what only that code
    holds: functions, bound methods, `functools.partial`s, losses, regularizers,
    schedules and other callable objects, and the variables, lists and caches that
    they refer to. A `keras.Variable` that a loss reads and a callback changes serves
    both models. Classes, devices and distribution strategies are shared as well.

    Code that refers to the model or to a part of it, at any depth, is copied so that
    it refers to the copy. One line of the log (level INFO) names it: a handle that the
    user keeps on such code, or on a list with parts of the model in it, is one on the
    original's. A copied `functools.lru_cache` starts empty, a
    copied `tf.function` untraced. A function that reads a
    part of the model from a global variable goes on reading the original's; a warning
    names it.

    Layers called outside the model, as in a larger model built on its output, are left
    behind. The variables of the copy are mirrored or sharded as the model's are,
    whether or not the model's strategy or distribution is current.

    Args:
        model: Keras model: functional, sequential or subclassed, compiled or not.
            It is not changed.
        distributed: False makes a copy without strategy and layouts. Its variables,
            and the distributed ones that its losses read, are on one device of this
            process. Values that are sharded among processes repeat this process's
            part, which is enough for measuring. No strategy or distribution must be
            current then.

    Returns:
        The copy. It does not keep `model` alive.

    Raises:
        ValueError: If `model` is no Keras model; if its state has something that cannot
            be copied, such as an open file, a lock or a loaded SavedModel; or if code
            that cannot be copied, such as a generator, refers to the model.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a `keras.Model`. Received: model={model!r}")
    # While `fit` runs on JAX, variables lag behind the state of the loop.
    keras_internals.sync_training_state(model)
    # Another thread may have given layers other classes for a moment.
    with class_swap.lock:
        ownership = Ownership(model, distributed=distributed)
        with _strategy_scope(model) if distributed else contextlib.nullcontext():
            duplicate = _Copier(ownership, distributed).copy_model(model)
    if copied := ownership.describe_copied_code():
        logging.info("Copied with %s, which they refer to: %s.", model.name, ", ".join(copied))
    if read := ownership.describe_global_reads():
        logging.warning(
            "The copy of %s reads parts of the original from global variables: %s. Assign the "
            "copy's to them, or use `in_place=True` to change the model itself.",
            model.name,
            ", ".join(read),
        )
    return duplicate


@contextlib.contextmanager
def _strategy_scope(model: keras.Model) -> Iterator[None]:
    if keras.backend.backend() == "tensorflow":
        # Variables of a strategy can only be created inside its scope.
        with model.distribute_strategy.scope():
            yield
    else:
        yield


class _Copier:
    """Copies one model. What it meets twice it copies once."""

    def __init__(self, ownership: Ownership, distributed: bool) -> None:
        self.ownership = ownership
        self.distributed = distributed
        self.copies: dict[int, Any] = {}
        self.methods: dict[type, Callable[[Any], Any]] = {}
        # Holds the originals, because an `id` is unique only among living objects.
        self.originals: list[Any] = []
        # A chain of layers is longer than Python's stack is deep. So Keras's objects
        # are created empty where they are met, and filled one after the other.
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
        """The counterpart of `original` in the copy, which may be itself."""
        if id(original) in self.copies:
            return self.copies[id(original)]
        if self.ownership.is_shared(original):
            return original
        method = self.methods.get(type(original))
        if method is None:
            method = self.methods[type(original)] = self._find_method(original)
        return method(original)

    def _find_method(self, original: Any) -> Callable[[Any], Any]:
        """The method that copies objects of the type of `original`."""
        exact: dict[type, Callable[[Any], Any]] = {
            tuple: self._copy_tuple,
            list: self._copy_list,
            dict: self._copy_dict,
            types.FunctionType: self._copy_function,
            types.CellType: self._copy_cell,
            types.MethodType: self._copy_method,
            plain_objects.CACHED_FUNCTION: self._copy_cached_function,
            weakref.ref: self._copy_weak_reference,
        }
        if type(original) in exact:
            return exact[type(original)]
        if isinstance(original, KERAS_TYPES):
            return self._copy_keras_object
        if keras_internals.is_tensorflow_container(original):
            return self._copy_tensorflow_container
        if plain_objects.is_array(original):
            return self._copy_array
        if plain_objects.is_tensorflow_function(original):
            return self._copy_tensorflow_function
        return self._copy_by_reduction

    def _must_copy(self, original: Any) -> bool:
        return id(original) not in self.copies and not self.ownership.is_shared(original)

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
                # At once, because TensorFlow's list of dependencies has them too.
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
        # Dependencies come last, so that a refusal names the attribute that the user set.
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
        """Copies the node that a tensor comes from, and by it the graph before."""
        self.tensors.append((tensor, history))
        operation, index, _ = history
        if operation is not None:
            self.copy(keras_internals.inbound_nodes(operation)[index])

    def _copy_array(self, original: Any) -> Any:
        copy_array = plain_objects.copy_array if self.distributed else plain_objects.copy_array_here
        return self._remember(original, copy_array(original))

    def _copy_tuple(self, original: tuple) -> tuple:
        parts = tuple(map(self.copy, original))
        if id(original) in self.copies:  # one of its parts refers to it
            return self.copies[id(original)]
        unchanged = all(map(operator.is_, parts, original))
        return self._remember(original, original if unchanged else parts)

    def _copy_list(self, original: list) -> list:
        duplicate = self._remember(original, [])
        duplicate.extend(map(self.copy, original))
        return duplicate

    def _copy_dict(self, original: dict) -> dict:
        duplicate = self._remember(original, {})
        for key, value in original.items():
            duplicate[self.copy(key)] = self.copy(value)
        self._note_keys(duplicate)
        return duplicate

    def _note_keys(self, container: set | dict) -> None:
        if any(type(key) is int for key in container):
            self.keyed_by_numbers.append(container)

    def _copy_method(self, original: types.MethodType) -> types.MethodType:
        method = types.MethodType(self.copy(original.__func__), self.copy(original.__self__))
        return self._remember(original, method)

    def _copy_cached_function(self, original: Any) -> Any:
        cached = functools.lru_cache(**original.cache_parameters())
        return self._remember(original, cached(self.copy(original.__wrapped__)))

    def _copy_tensorflow_function(self, original: Any) -> Any:
        function = self.copy(original.python_function)
        # A trace has the original's variables in it. The copy is traced when it is called.
        return self._remember(original, keras_internals.with_other_function(original, function))

    def _copy_weak_reference(self, original: weakref.ref) -> weakref.ref:
        reference = weakref.ref(self.copy(original()), self.copy(original.__callback__))
        return self._remember(original, reference)

    def _copy_cell(self, original: types.CellType) -> types.CellType:
        duplicate = self._remember(original, types.CellType())
        self._fill_cell(original)
        return duplicate

    def _fill_cell(self, original: types.CellType) -> None:
        if not plain_objects.is_empty(original):
            self.copies[id(original)].cell_contents = self.copy(original.cell_contents)

    def _copy_function(self, original: types.FunctionType) -> types.FunctionType:
        closure = original.__closure__ or ()
        # Empty at first, because a function may refer to itself.
        cells = [cell for cell in closure if self._must_copy(cell)]
        for cell in cells:
            self._remember(cell, types.CellType())
        duplicate = types.FunctionType(
            original.__code__,
            original.__globals__,
            original.__name__,
            None,
            tuple(map(self.copy, closure)) or None,
        )
        self._remember(original, duplicate)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(duplicate, name, getattr(original, name))
        duplicate.__defaults__ = self.copy(original.__defaults__)
        duplicate.__kwdefaults__ = self.copy(original.__kwdefaults__)
        vars(duplicate).update({name: self.copy(part) for name, part in vars(original).items()})
        for cell in cells:
            self._fill_cell(cell)
        return duplicate

    def _copy_by_reduction(self, original: Any) -> Any:
        """Copies containers and plain objects by the protocol of `pickle`."""
        if isinstance(original, type):
            raise TypeError(f"class {original.__qualname__} refers to the model")
        reduction = original.__reduce_ex__(4)
        if isinstance(reduction, str):
            if plain_objects.is_importable(original) or not callable(original):
                return original
            raise TypeError(f"{type(original).__name__} '{reduction}' refers to the model")
        make, arguments, state, items, pairs, set_state = (*reduction, *[None] * 4)[:6]
        duplicate = self._remember(original, self.copy(make)(*map(self.copy, arguments)))
        if state is not None:
            plain_objects.set_state(duplicate, self.copy(state), self.copy(set_state))
        # Not by the methods of the subclass: Keras's lists track what is appended.
        container = plain_objects.builtin_base(duplicate)
        for item in items or ():
            container.append(duplicate, self.copy(item))
        for key, value in pairs or ():
            container.__setitem__(duplicate, self.copy(key), self.copy(value))
        if isinstance(duplicate, (set, dict)):
            self._note_keys(duplicate)
        return duplicate

    def _copy_tensorflow_container(self, original: Any) -> Any:
        keras_internals.check_copyable(original)
        # Created empty: it would track items before they are filled.
        duplicate = self._remember(original, type(original)(()))
        if hasattr(original, "__wrapped__"):
            duplicate.__wrapped__ = self.copy(original.__wrapped__)
        # The wrapper of a tuple has no `__dict__` of its own.
        for name in getattr(original, "__dict__", DEPENDENCY_ATTRIBUTES):
            # The sentinel is a cache, with weak references to other containers.
            own = not name.startswith("__") and name != CONTAINER_CACHE_ATTRIBUTE
            if own and hasattr(original, name):
                setattr(duplicate, name, self.copy(getattr(original, name)))
        return duplicate

    def _link_graph(self) -> None:
        """Gives operations and tensors the copied nodes.

        An operation lists the nodes of every graph that it was called in. The copy
        has only those that the model's tensors come from.
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
        """Replaces the `id`s by which Keras finds what it tracks."""
        for container in self.keyed_by_numbers:
            # Keras's own keys are the `id`s of objects.
            plain_objects.replace_keys(
                container,
                {key: id(self.copies[key]) for key in container if key in self.copies},
            )
        for original, duplicate in self.optimizers:
            # TensorFlow's are not `id`s; elsewhere nothing is left to do.
            key = keras_internals.variable_key
            keys = {key(original, old): key(duplicate, new) for old, new in self.variables}
            for value in vars(duplicate).values():
                if isinstance(value, (set, dict)):
                    plain_objects.replace_keys(value, keys)


def _copy_by_config(original: keras.Layer) -> keras.Layer:
    """Copies a layer with assets, such as a vocabulary, as Keras saves and loads it."""
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
            f"'{name}', which cannot be copied: {error}. Use `in_place=True` to change the model "
            "itself."
        ) from error


class _RefusedError(ValueError):
    """Names the object that cannot be copied."""
