"""A faithful copy of a Keras model; it knows nothing of convolutions.

`copy_model` copies the objects that a model is made of, attribute by attribute,
instead of building a second model from configurations. So whatever is in no
configuration comes along: names and paths that came from global counters, flags,
attributes set later, layers shared across nesting levels, classes that are not
registered for serialisation, optimizer slots, metrics. The price is to know the
few places where Keras keeps what must not be copied as it stands:

- nodes of graphs that the model is no part of (`_link_graph`),
- numbers that are the `id`s of objects (`_translate_ids`),
- compiled functions and what the last call left behind (`RESET`, `EMPTIED`),
- tables that live in the framework's runtime (`_copy_by_config`).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src.ops.function import make_node_key
from keras.src.ops.node import KerasHistory

#: Attributes of models that Keras makes anew when it needs them: functions compiled
#: for the model's own variables, and what exists only while `fit` runs.
RESET = {
    "train_function": None,
    "test_function": None,
    "predict_function": None,
    "_eval_epoch_iterator": None,
    "_jax_state": None,
    "_jax_state_synced": True,
}

#: Lists and sets that start empty. `_link_graph` fills in the nodes; the losses of
#: the last call may be tensors of a compiled function's graph.
EMPTIED = ("_inbound_nodes", "_outbound_nodes", "_losses", "_loss_ids")

#: Where TensorFlow lists the attributes that belong into a checkpoint.
DEPENDENCIES = (
    "_self_unconditional_checkpoint_dependencies",
    "_self_unconditional_dependency_names",
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

#: What cannot change, and hardware, which cannot be copied.
SHARED_TYPES = (
    type(None),
    type(...),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    type,
    types.ModuleType,
    re.Pattern,
    np.dtype,
    np.generic,
    keras.distribution.DeviceMesh,
    keras.distribution.TensorLayout,
)


def copy_model(model: keras.Model) -> keras.Model:
    """Copies a model with all of its state; the two share nothing that can change.

    The copy has the same class, layers, names, paths, values, flags, attributes,
    compile configuration, metrics and optimizer state, so training goes on from
    the same point. Functions, classes, devices and distribution strategies are
    shared; but a function that refers to the model, or to a part of it, through
    its closure or default arguments becomes one that refers to the copy. Layers
    called outside the model, as in a larger model built on its output, are left
    behind.

    Args:
        model: Keras model: functional, sequential or subclassed, compiled or not.
            It is not changed.

    Returns:
        The copy. It does not keep `model` alive.

    Raises:
        ValueError: If `model` is no Keras model, or holds something that cannot
            be copied, such as an open file, a lock or a loaded SavedModel.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a `keras.Model`. Received: model={model!r}")
    if hasattr(model, "jax_state_sync"):
        # While `fit` runs on JAX, variables lag behind the state of the loop.
        model.jax_state_sync()
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

    def __init__(self) -> None:
        self.copies: dict[int, Any] = {}
        # An `id` is that of an object only as long as the object lives.
        self.originals: list[Any] = []
        # A chain of layers is longer than Python's stack is deep: objects of
        # Keras are made empty when they are met, and filled in turn.
        self.unfilled: collections.deque[tuple[Any, Any]] = collections.deque()
        self.operations: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[keras.KerasTensor, KerasHistory]] = []
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
        if _is_tensorflow_container(original):
            return self._copy_tensorflow_container(original)
        if _is_shared(original):
            return original
        if _is_array(original):
            return self._remember(original, _copy_array(original))
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
        if isinstance(original, keras.Layer) and _has_assets(original):
            duplicate = self._remember(original, _copy_by_config(original))
        else:
            duplicate = self._remember(original, object.__new__(type(original)))
        if isinstance(original, (keras.Operation, keras.Function)):
            for name in vars(original).keys() & set(EMPTIED):
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
        names = sorted(vars(original), key=lambda name: name in DEPENDENCIES)
        for name in names:
            if name in attributes:
                continue
            value = vars(original)[name]
            with _refusing(original, f"attribute `{name}`"):
                if name in RESET and isinstance(original, keras.Model):
                    attributes[name] = RESET[name]
                elif name == "_keras_history":
                    self._copy_producer(duplicate, value)
                else:
                    if name in DEPENDENCIES:
                        value = _without_reset(value)
                    attributes[name] = self.copy(value)

    def _copy_producer(self, tensor: keras.KerasTensor, history: KerasHistory) -> None:
        """Copies the node that a tensor comes from, and so all before it."""
        self.tensors.append((tensor, history))
        if history.operation is not None:
            self.copy(history.operation._inbound_nodes[history.node_index])

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
            if not _is_empty(original_cell):
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
            _set_state(duplicate, self.copy(state), self.copy(set_state))
        # Past the methods of subclasses: Keras's lists track what is appended.
        container = _builtin_base(duplicate)
        for item in items or ():
            container.append(duplicate, self.copy(item))
        for key, value in pairs or ():
            container.__setitem__(duplicate, self.copy(key), self.copy(value))
        if isinstance(duplicate, (set, dict)) and any(type(key) is int for key in duplicate):
            self.keyed_by_numbers.append(duplicate)
        return duplicate

    def _copy_tensorflow_container(self, original: Any) -> Any:
        # Not by giving it its items: it would track them before they are filled.
        duplicate = self._remember(original, type(original)(()))
        if hasattr(original, "__wrapped__"):
            duplicate.__wrapped__ = self.copy(original.__wrapped__)
        # The wrapper of tuples shows the attributes of the tuple, which has none.
        for name in getattr(original, "__dict__", DEPENDENCIES):
            # The sentinel is a cache, with weak references to other containers.
            own = not name.startswith("__") and name != "_self_attribute_sentinel"
            if own and hasattr(original, name):
                setattr(duplicate, name, self.copy(getattr(original, name)))
        return duplicate

    def _link_graph(self) -> None:
        """Gives operations and tensors the nodes that were copied, and no others.

        An operation knows every graph that it was called in. Copied are only the
        nodes that the tensors of the model come from.
        """
        for original, duplicate in self.operations:
            for name in ("_inbound_nodes", "_outbound_nodes"):
                nodes = [self.copies.get(id(node)) for node in vars(original)[name]]
                vars(duplicate)[name].extend(node for node in nodes if node is not None)
        for tensor, (operation, index, position) in self.tensors:
            if operation is not None:
                node = self.copies[id(operation._inbound_nodes[index])]
                operation = node.operation
                index = operation._inbound_nodes.index(node)
            tensor._keras_history = KerasHistory(operation, index, position)
        for function in self.functions:
            nodes = [node for nodes in function._nodes_by_depth.values() for node in nodes]
            vars(function)["_nodes"] = {
                make_node_key(node.operation, node.operation._inbound_nodes.index(node))
                for node in nodes
            }

    def _translate_ids(self) -> None:
        """Replaces the keys by which Keras finds what it tracks."""
        for container in self.keyed_by_numbers:
            # Keras's own keys are the `id`s of objects.
            _replace_keys(
                container,
                {key: id(self.copies[key]) for key in container if key in self.copies},
            )
        for original, duplicate in self.optimizers:
            keys = {original._var_key(old): duplicate._var_key(new) for old, new in self.variables}
            for value in vars(duplicate).values():
                if isinstance(value, (set, dict)):
                    _replace_keys(value, keys)


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
        vars(duplicate)["_path"] = original.path
    return duplicate


def _has_assets(layer: keras.Layer) -> bool:
    return hasattr(layer, "save_assets") and hasattr(layer, "load_assets")


def _is_shared(value: Any) -> bool:
    if isinstance(value, SHARED_TYPES):
        return True
    if isinstance(value, types.FunctionType) and not (
        value.__closure__ or value.__defaults__ or value.__kwdefaults__ or vars(value)
    ):
        return True
    tf, jax = sys.modules.get("tensorflow"), sys.modules.get("jax")
    if tf and isinstance(value, (tf.DType, tf.TensorShape, tf.distribute.Strategy)):
        return True
    if jax and isinstance(value, (jax.Device, jax.sharding.Sharding, jax.sharding.Mesh)):
        return True
    return callable(value) and _is_importable(value)


def _is_tensorflow_container(value: Any) -> bool:
    """Whether `value` is a list or dict that TensorFlow wrapped to track its items."""
    tf = sys.modules.get("tensorflow")
    # By its type, since the proxies among them show the class of what they wrap.
    return tf is not None and issubclass(
        type(value), tf.__internal__.tracking.TrackableDataStructure
    )


def _is_importable(value: Any) -> bool:
    """Whether `value` is what its module holds under its name."""
    name = getattr(value, "__qualname__", None)
    found = sys.modules.get(getattr(value, "__module__", None) or "")
    if not isinstance(name, str) or found is None:
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _array_types() -> Iterator[type]:
    yield np.ndarray
    # A framework that is not loaded made no arrays, and must not be imported.
    if tf := sys.modules.get("tensorflow"):
        yield from (tf.Variable, tf.Tensor)
    if jax := sys.modules.get("jax"):
        yield jax.Array
    if torch := sys.modules.get("torch"):
        yield torch.Tensor


def _is_array(value: Any) -> bool:
    return isinstance(value, tuple(_array_types()))


def _copy_array(value: Any) -> Any:
    # Arrays of NumPy's objects, and TensorFlow's handles to tables and the like.
    if getattr(value.dtype, "name", None) in ("object", "resource", "variant"):
        raise TypeError(f"an array of {value.dtype.name} refers to something else")
    # On JAX this is no formality: training gives the buffers of its variables
    # away, and an array that shares them would be deleted.
    return copy.deepcopy(value)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _set_state(target: Any, state: Any, set_state: Callable | None) -> None:
    if set_state is not None:
        set_state(target, state)
    elif hasattr(type(target), "__setstate__"):
        target.__setstate__(state)
    else:
        attributes, slots = state if isinstance(state, tuple) else (state, None)
        if attributes:
            vars(target).update(attributes)
        for name, value in (slots or {}).items():
            object.__setattr__(target, name, value)


def _replace_keys(container: set | dict, keys: dict[Any, Any]) -> None:
    if keys.keys().isdisjoint(container):
        return
    if _is_tensorflow_container(container):
        _replace_keys(container.__wrapped__, keys)
        container._update_snapshot()
        return
    if isinstance(container, dict):
        entries = {keys.get(key, key): value for key, value in container.items()}
    else:
        entries = {keys.get(key, key) for key in container}
    # Past the methods of subclasses: Keras's would track the values again.
    base = _builtin_base(container)
    base.clear(container)
    base.update(container, entries)


def _without_reset(dependencies: Any) -> Any:
    if isinstance(dependencies, dict):
        return {name: value for name, value in dependencies.items() if name not in RESET}
    return [reference for reference in dependencies if reference.name not in RESET]


def _builtin_base(container: Any) -> Any:
    return next(
        base for base in type(container).__mro__ if base.__module__ in ("builtins", "collections")
    )


@contextlib.contextmanager
def _refusing(owner: Any, part: str) -> Iterator[None]:
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:
        name = getattr(owner, "path", None) or getattr(owner, "name", "")
        raise _RefusedError(
            f"Expected a model that can be copied. Received: {part} of {type(owner).__name__} "
            f"'{name}', which cannot: {error}. Use `in_place=True` to change the model itself."
        ) from error


class _RefusedError(ValueError):
    """Already says which object cannot be copied."""
