"""Objects that are not Keras's: which are constant, and how the others are copied."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from diagconv_tf import keras_internals

#: Objects that cannot change, that have only their identity, or that stand for
#: something of the process.
_CONSTANT_TYPES = (
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
    types.ModuleType,
    types.CodeType,
    types.GetSetDescriptorType,
    re.Pattern,
    enum.Enum,
    logging.Logger,
    np.dtype,
    np.generic,
    keras.distribution.DeviceMesh,
    keras.distribution.TensorLayout,
)

#: The type of functions decorated with `functools.lru_cache`.
CACHED_FUNCTION = type(functools.lru_cache(lambda: None))


def is_constant(value: Any) -> bool:
    """Whether `value`, like all of its type, cannot change, or is hardware."""
    if isinstance(value, _CONSTANT_TYPES) or type(value) is object:
        return True
    if isinstance(value, keras.DTypePolicy):
        return not isinstance(value, keras.dtype_policies.DTypePolicyMap)
    tf, jax = sys.modules.get("tensorflow"), sys.modules.get("jax")
    if tf and isinstance(value, (tf.DType, tf.TensorShape, tf.Graph, tf.distribute.Strategy)):
        return True
    return bool(jax and isinstance(value, (jax.Device, jax.sharding.Sharding, jax.sharding.Mesh)))


def is_tensorflow_function(value: Any) -> bool:
    """Whether `value` is a `tf.function`."""
    tf = sys.modules.get("tensorflow")
    return bool(tf and isinstance(value, tf.types.experimental.PolymorphicFunction))


def is_importable(value: Any) -> bool:
    """Whether the module of `value` holds it under its name."""
    name = getattr(value, "__qualname__", None)
    found = sys.modules.get(getattr(value, "__module__", None) or "")
    if not isinstance(name, str) or found is None:
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _array_types() -> Iterator[type]:
    yield np.ndarray
    # A framework that is not loaded has made no arrays, and is not imported for this.
    if tf := sys.modules.get("tensorflow"):
        yield from (tf.Variable, tf.Tensor)
    if jax := sys.modules.get("jax"):
        yield jax.Array
    if torch := sys.modules.get("torch"):
        yield torch.Tensor


def is_array(value: Any) -> bool:
    """Whether `value` is an array or variable of NumPy or a framework in use."""
    return isinstance(value, tuple(_array_types()))


def is_on_several_devices(value: Any) -> bool:
    """Whether `value` is an array or variable that is mirrored or sharded."""
    tf, jax = sys.modules.get("tensorflow"), sys.modules.get("jax")
    if tf and isinstance(value, tf.distribute.DistributedValues):
        return True
    return bool(jax and isinstance(value, jax.Array) and len(value.sharding.device_set) > 1)


def copy_array(value: Any) -> Any:
    """Copies an array or variable.

    Raises:
        TypeError: If it holds references to other objects.
    """
    # NumPy's arrays of objects, and TensorFlow's handles of tables and the like.
    if getattr(value.dtype, "name", None) in ("object", "resource", "variant"):
        raise TypeError(f"an array of {value.dtype.name} refers to something else")
    # JAX needs a copy too: training deletes the buffers that it is given.
    return copy.deepcopy(value)


def copy_array_here(value: Any) -> Any:
    """Copies an array or variable to one device of this process.

    Of an array that is sharded among processes this one knows a part, which is
    repeated to fill the shape.

    Raises:
        TypeError: If it holds references to other objects.
    """
    if not is_on_several_devices(value):
        return copy_array(value)
    if hasattr(value, "values"):  # TensorFlow's: one for each replica
        return copy_array(value.values[0])
    jax = sys.modules["jax"]
    if value.is_fully_addressable or value.is_fully_replicated:
        return jax.numpy.array(np.asarray(value))
    return jax.numpy.array(np.resize(np.asarray(value.addressable_data(0)), value.shape))


def is_empty(cell: types.CellType) -> bool:
    """Whether the cell of a closure has no value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def set_state(target: Any, state: Any, set_state: Callable | None) -> None:
    """Sets the state that an object's reduction gave, by the protocol of `pickle`."""
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


def replace_keys(container: Any, keys: dict[Any, Any]) -> None:
    """Replaces in place the keys of a set or dict that `keys` maps to new ones; keeps the order."""
    if keys.keys().isdisjoint(container):
        return
    if keras_internals.is_tensorflow_container(container):
        replace_keys(container.__wrapped__, keys)
        keras_internals.update_container_snapshot(container)
        return
    entries: set | dict
    if isinstance(container, dict):
        entries = {keys.get(key, key): value for key, value in container.items()}
    else:
        entries = {keys.get(key, key) for key in container}
    # Not by the methods of the subclass: Keras's would track the values again.
    base = builtin_base(container)
    base.clear(container)
    base.update(container, entries)


def builtin_base(container: Any) -> Any:
    """The built-in class, such as `list`, that `container` derives from."""
    return next(
        base for base in type(container).__mro__ if base.__module__ in ("builtins", "collections")
    )
