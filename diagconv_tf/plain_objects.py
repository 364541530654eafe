"""Objects that are not Keras's, as `copying` meets them: which are shared, which copied."""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from diagconv_tf import keras_internals

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


def is_shared(value: Any) -> bool:
    """Whether a copy may hold `value` itself: it cannot change, or is hardware."""
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


def is_array(value: Any) -> bool:
    """Whether `value` is an array or variable of NumPy or a framework in use."""
    return isinstance(value, tuple(_array_types()))


def copy_array(value: Any) -> Any:
    """A copy of an array; TypeError where it holds references to other objects."""
    # Arrays of NumPy's objects, and TensorFlow's handles to tables and the like.
    if getattr(value.dtype, "name", None) in ("object", "resource", "variant"):
        raise TypeError(f"an array of {value.dtype.name} refers to something else")
    # On JAX this is no formality: training gives the buffers of its variables
    # away, and an array that shares them would be deleted.
    return copy.deepcopy(value)


def copy_array_here(value: Any) -> Any:
    """A copy of an array or variable on one device of this process, whatever holds the original.

    Of an array that is divided among processes only the part of this one is
    known here: it is repeated.
    """
    tf, jax = sys.modules.get("tensorflow"), sys.modules.get("jax")
    if tf and isinstance(value, tf.distribute.DistributedValues):
        return copy_array(value.values[0])
    if jax and isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
        if value.is_fully_addressable or value.is_fully_replicated:
            return jax.numpy.array(np.asarray(value))
        return jax.numpy.array(np.resize(np.asarray(value.addressable_data(0)), value.shape))
    return copy_array(value)


def is_empty(cell: types.CellType) -> bool:
    """Whether a closure's cell has no value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def set_state(target: Any, state: Any, set_state: Callable | None) -> None:
    """Gives `target` the state of a reduction, by the protocol of `pickle`."""
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


def replace_keys(container: set | dict, keys: dict[Any, Any]) -> None:
    """Replaces, in place and in order, the keys that are among `keys`."""
    if keys.keys().isdisjoint(container):
        return
    if keras_internals.is_tensorflow_container(container):
        replace_keys(container.__wrapped__, keys)
        keras_internals.update_container_snapshot(container)
        return
    if isinstance(container, dict):
        entries = {keys.get(key, key): value for key, value in container.items()}
    else:
        entries = {keys.get(key, key) for key in container}
    # Past the methods of subclasses: Keras's would track the values again.
    base = builtin_base(container)
    base.clear(container)
    base.update(container, entries)


def builtin_base(container: Any) -> Any:
    """The class of Python's own that `container` derives from."""
    return next(
        base for base in type(container).__mro__ if base.__module__ in ("builtins", "collections")
    )
