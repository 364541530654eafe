"""Decides which objects a copy of a model has of its own, and which it shares.

Two kinds of objects are told apart:

- *State* is the model's. The model is state, and so is everything that state holds
  in attributes and containers: layers, variables, the graph, optimizer, metrics,
  Keras's own containers, and data that a user set as an attribute of a layer or of
  the model. A copy has its own.
- *Code* is what others hand to the model to be called: functions, bound methods,
  `functools.partial`s, losses, regularizers, initializers, schedules and any other
  callable object that is not part of a network. Code, and what only code holds,
  belongs to whoever wrote it. A copy shares it, so that a variable, a list or a
  cache that the user keeps a handle on serves both models.

There is one exception: code that reaches state, at any depth, would make the copy
depend on the original. The objects on the way from such code to the state are copied;
what hangs beside that way is still shared.
"""

from __future__ import annotations

import collections
import dis
import enum
import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from diagconv_tf import keras_internals, plain_objects
from diagconv_tf.keras_internals import (
    CONTAINER_CACHE_ATTRIBUTE,
    DISTRIBUTION_ATTRIBUTES,
    EMPTIED_ATTRIBUTES,
    HISTORY_ATTRIBUTE,
    RESET_ATTRIBUTES,
)

#: Classes whose instances are copied attribute by attribute. They are listed because
#: Keras pickles its own objects as `.keras` files.
KERAS_TYPES = (
    keras.Operation,
    keras.Function,
    keras.Variable,
    keras.KerasTensor,
    keras.metrics.Metric,
    keras.losses.Loss,
    keras.optimizers.Optimizer,
)

#: Packages whose module-level functions are never looked into. They refer to no
#: model, but some of them to caches of the whole process.
_LIBRARIES = {"keras", "tensorflow", "jax", "jaxlib", "torch", "numpy", *sys.stdlib_module_names}

_CONTAINERS = (list, dict, set, collections.deque)


class Role(enum.Enum):
    """What an object is to the model that it was found in."""

    CONSTANT = enum.auto()  # cannot change, or is hardware: never copied
    STATE = enum.auto()
    CODE = enum.auto()
    BY_VALUE = enum.auto()  # functions and classes: their type does not tell


class Ownership:
    """Which of the objects that a model reaches are copied with it.

    Args:
        model: the model. It is only read.
        distributed: False also takes variables and arrays on several devices for
            state, whoever holds them: a copy on one device cannot use them.
    """

    def __init__(self, model: keras.Model, *, distributed: bool = True) -> None:
        self._distributed = distributed
        self._roles: dict[type, Role] = {}
        self._readers: dict[type, Callable[[Any], Iterable[Any]]] = {}
        # Holds the objects, because an `id` is unique only among living objects.
        self._seen: dict[int, Any] = {}
        self._state: set[int] = set()
        self._copied: set[int] = set()
        self._left_out: dict[int, Any] = {}
        self._outside: list[Any] = []
        # For the objects that code holds: the `id`s of their holders.
        self._holders: dict[int, list[int]] = collections.defaultdict(list)
        self._unread_code: list[Any] = []
        self._newly_copied: list[int] = []
        self._add_state(model)
        while self._unread_code or self._newly_copied:
            self._read_code()
            self._copy_holders()

    def is_shared(self, value: Any) -> bool:
        """Whether the copy holds `value` itself.

        Objects that were not found in the model are temporary, such as the parts of a
        reduction. Only functions and classes among them are shared.
        """
        if id(value) in self._copied:
            return False
        if id(value) in self._seen:
            return True
        return self._role_of_type(value) in (Role.CONSTANT, Role.BY_VALUE)

    def describe_copied_code(self) -> list[str]:
        """Names the code of users that is copied because it refers to the model.

        These are the objects on which a user may keep a handle that does not reach
        the copy.
        """
        names = [f"{type(value).__name__} '{value.name}'" for value in self._outside]
        for key in self._copied - self._state:
            value = self._seen[key]
            if isinstance(value, types.FunctionType):
                if not _is_of_library(value.__globals__.get("__name__")):
                    names.append(f"function {value.__qualname__}")
                    names += self._copied_containers(value)
            elif not isinstance(value, type) and not _is_of_library(type(value).__module__):
                names.append(f"{type(value).__qualname__} object")
        return sorted(set(names))

    def _copied_containers(self, function: types.FunctionType) -> Iterator[str]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            if plain_objects.is_empty(cell) or type(cell.cell_contents) not in _CONTAINERS:
                continue
            if self._is_copied_code(id(cell.cell_contents)):
                yield f"{type(cell.cell_contents).__name__} `{name}`"

    def _is_copied_code(self, key: int) -> bool:
        return key in self._copied and key not in self._state

    def describe_global_reads(self) -> list[str]:
        """Names functions that read a part of the model from a global variable.

        A module's variables cannot be copied, so such a function goes on reading the
        original.
        """
        return sorted(
            f"`{name}` in function {function.__qualname__}"
            for function in self._seen.values()
            if isinstance(function, types.FunctionType)
            and not _is_of_library(function.__globals__.get("__name__"))
            for name in _global_names(function.__code__)
            if id(value := function.__globals__.get(name)) in self._state
            and isinstance(value, KERAS_TYPES)
        )

    def _add_state(self, root: Any) -> None:
        """Makes `root` state, and what it holds."""
        pending = [root]
        while pending:
            value = pending.pop()
            if id(value) in self._state:
                continue
            # A tuple cannot change: Python itself may use one for many holders.
            if type(value) is not tuple:
                self._seen[id(value)] = value
                self._state.add(id(value))
                self._copied.add(id(value))
                self._newly_copied.append(id(value))
            for part in self._parts(value):
                role = self._role(part)
                if role is Role.STATE:
                    pending.append(part)
                elif role is Role.CODE:
                    self._unread_code.append(part)

    def _read_code(self) -> None:
        """Finds what code holds, down to the first state."""
        while self._unread_code:
            holder = self._unread_code.pop()
            if id(holder) in self._seen:
                continue
            self._seen[id(holder)] = holder
            for part in self._parts(holder):
                if self._role(part) is Role.CONSTANT:
                    continue
                if not self._distributed and plain_objects.is_on_several_devices(part):
                    self._add_state(part)
                self._holders[id(part)].append(id(holder))
                if id(part) in self._copied:
                    self._newly_copied.append(id(part))
                else:
                    self._unread_code.append(part)

    def _copy_holders(self) -> None:
        """Marks for copying what holds an object that is copied."""
        while self._newly_copied:
            for key in self._holders.pop(self._newly_copied.pop(), ()):
                if key in self._copied:
                    continue
                self._copied.add(key)
                self._newly_copied.append(key)
                holder = self._seen[key]
                if _is_part_of_network(holder):
                    # For example a larger model that contains this one. Half of a
                    # graph cannot be shared.
                    self._add_state(holder)
                    if isinstance(holder, (keras.Operation, keras.optimizers.Optimizer)):
                        self._outside.append(holder)

    def _role(self, value: Any) -> Role:
        role = self._role_of_type(value)
        if id(value) in self._left_out:
            return Role.CONSTANT
        if role is Role.BY_VALUE:
            return Role.CONSTANT if _is_global_of_library(value) else Role.CODE
        return role

    def _role_of_type(self, value: Any) -> Role:
        role = self._roles.get(type(value))
        if role is None:
            role = self._roles[type(value)] = _role_of_type(value)
        return role

    def _parts(self, value: Any) -> Iterable[Any]:
        """What `value` refers to; of Keras's objects without what a copy leaves out."""
        parts = self._readers.get(type(value))
        if parts is None:
            parts = self._readers[type(value)] = self._find_reader(value)
        return parts(value)

    def _find_reader(self, value: Any) -> Callable[[Any], Iterable[Any]]:
        """The function that gives the parts of objects of the type of `value`."""
        if isinstance(value, KERAS_TYPES):
            return self._parts_of_keras_object
        for reader, kinds in _READERS.items():
            if isinstance(value, kinds):
                return reader
        if keras_internals.is_tensorflow_container(value):
            return _parts_of_tensorflow_container
        if plain_objects.is_array(value):
            return _parts_of_array
        if plain_objects.is_tensorflow_function(value):
            return lambda compiled: [compiled.python_function]
        return _parts_of_other_object

    def _parts_of_keras_object(self, value: Any) -> list[Any]:
        left_out = set(DISTRIBUTION_ATTRIBUTES)
        if isinstance(value, (keras.Operation, keras.Function)):
            left_out.update(EMPTIED_ATTRIBUTES)
        if isinstance(value, keras.Model):
            left_out.update(RESET_ATTRIBUTES)
        parts = [type(value)]
        for name, part in vars(value).items():
            if name in left_out:
                # TensorFlow's list of dependencies has it too.
                self._left_out[id(part)] = part
            elif name != HISTORY_ATTRIBUTE:
                parts.append(part)
            elif part[0] is not None:
                operation, index, _ = part
                parts.append(keras_internals.inbound_nodes(operation)[index])
        return parts


def _parts_of_function(value: types.FunctionType) -> list[Any]:
    parts = [*(value.__closure__ or ()), *(value.__defaults__ or ())]
    return [*parts, *(value.__kwdefaults__ or {}).values(), *vars(value).values()]


def _parts_of_tensorflow_container(value: Any) -> list[Any]:
    attributes = getattr(value, "__dict__", {}).items()
    parts = [part for name, part in attributes if name != CONTAINER_CACHE_ATTRIBUTE]
    return [getattr(value, "__wrapped__", None), *parts]


def _parts_of_array(value: Any) -> Iterable[Any]:
    return value.flat if isinstance(value, np.ndarray) and value.dtype.hasobject else ()


def _parts_of_other_object(value: Any) -> list[Any]:
    # The garbage collector knows what objects hold, those written in C too.
    parts = gc.get_referents(value)
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        parts = [part for part in parts if part is not attributes]
        parts += attributes.values()
    return parts


_READERS: dict[Callable[[Any], Iterable[Any]], type] = {
    _parts_of_function: types.FunctionType,
    lambda value: [*vars(value).values(), *value.__bases__]: type,
    lambda value: [value.__wrapped__]: plain_objects.CACHED_FUNCTION,
    lambda value: [value(), value.__callback__]: weakref.ref,
    lambda value: value.f_locals.values(): types.FrameType,
}


def _role_of_type(value: Any) -> Role:
    """The role that all objects of the type of `value` have."""
    if isinstance(value, (type, types.FunctionType)):
        return Role.BY_VALUE
    if plain_objects.is_constant(value):
        return Role.CONSTANT
    if _is_part_of_network(value) or keras_internals.is_tensorflow_container(value):
        return Role.STATE
    return Role.CODE if callable(value) else Role.STATE


def _is_part_of_network(value: Any) -> bool:
    """Whether `value` is state where state holds it, although it may be callable."""
    if isinstance(value, keras.losses.Loss):
        # Keras's own container has the metrics that track the losses.
        return isinstance(value, keras_internals.compile_loss_class())
    if isinstance(value, KERAS_TYPES):
        return True
    tf, torch = sys.modules.get("tensorflow"), sys.modules.get("torch")
    return bool(
        (tf and isinstance(value, tf.Module)) or (torch and isinstance(value, torch.nn.Module))
    )


def _is_of_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _is_global_of_library(value: types.FunctionType | type) -> bool:
    """Whether `value` is a class of a module, or a function of a library's module."""
    if isinstance(value, type):
        return "<locals>" not in value.__qualname__
    return _is_of_library(value.__module__) and plain_objects.is_importable(value)


def _global_names(code: types.CodeType) -> Iterator[str]:
    """The global variables that `code` reads, its inner functions included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
