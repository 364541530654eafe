"""Layers change class: the one mechanism of rewriting.

Our layers are subclasses of Keras's with the same variables. So a layer becomes
ours, and stock again, by a change of its class: nothing is copied, and whatever
refers to the layer or its variables (graphs, optimizers, wrappers, other models)
goes on doing so.

`swap` changes layers for good, with the functions that Keras compiled from them.
`swapped` changes them for a while. Both restore everything when they are
interrupted, and both hold `lock`. Calls of the layers need no lock: a layer's
settings are set before its class becomes ours, and stay during `swapped`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

from diagconv_tf import keras_internals
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.lowbit.layers import new_noise, noise_of, set_noise
from diagconv_tf.lowbit.noise import NoiseSource
from diagconv_tf.lowbit.operands import Operands
from diagconv_tf.lowerings import LoweringChoice, LoweringLike, parse
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import LOWERING, OPERANDS, Family
from diagconv_tf.spec import STOCK

#: Held by whoever changes layers, or decides by their classes. It is one for all
#: models, because models share layers; the thread that holds it may take it again.
lock = threading.RLock()

#: What `fit`, `evaluate` and `predict` run.
STEP_KINDS = ("train", "test", "predict")


@dataclasses.dataclass(frozen=True)
class LayerState:
    """What rewriting changes in a layer.

    Attributes:
        layer: the layer.
        layer_class: its class.
        lowering: the lowering that the layer itself holds; None where that of
            its class holds, or there is none.
        operands: what the layer's operands go through; None where they go
            through nothing.
        noise: the layer's source of noise, or None.
    """

    layer: keras.layers.Layer
    layer_class: type[keras.layers.Layer]
    lowering: LoweringChoice | None
    operands: Operands | None = None
    noise: NoiseSource | None = None

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> LayerState:
        """The present state of `layer`."""
        held = vars(layer)
        lowering, operands = held.get("_lowering"), held.get("_operands")
        return cls(layer, type(layer), lowering, operands, noise_of(layer))

    def with_lowering(self, family: Family, lowering: LoweringLike | LoweringChoice) -> LayerState:
        """This state with another lowering; the layer is not changed.

        Args:
            family: the layer's.
            lowering: `"stock"` for none, else what the layer computes with. A class
                that is no layer of ours has none.

        Raises:
            ValueError: if `lowering` is not known.
        """
        choice = None if lowering == STOCK else parse(lowering)
        settings = self._settings(family) - {LOWERING} | ({LOWERING} if choice else set())
        layer_class = family.class_for(settings, self.layer_class)
        if not issubclass(layer_class, LoweredLayer):
            choice = None
        return dataclasses.replace(self, layer_class=layer_class, lowering=choice)

    def with_operands(self, family: Family, operands: Operands | None) -> LayerState:
        """This state with other operands; the layer is not changed.

        Args:
            family: the layer's.
            operands: what they go through; None for nothing. A layer that needs noise
                keeps the source that it has, unless a seed asks for another one.

        Raises:
            ValueError: if no class of the family holds the layer's settings.
        """
        if operands == Operands():
            operands = None
        settings = self._settings(family) - {OPERANDS} | ({OPERANDS} if operands else set())
        noise = None
        if operands is not None and operands.uses_seed:
            noise = self.noise if self._keeps_noise(operands) else new_noise(operands)
        lowering = None
        if LOWERING in settings:
            # A low-bit class has no lowering of its own.
            lowering = self.lowering or getattr(self.layer_class, "_lowering", None)
        layer_class = family.class_for(settings, self.layer_class)
        return LayerState(self.layer, layer_class, lowering, operands, noise)

    def _keeps_noise(self, operands: Operands) -> bool:
        if self.noise is None or self.operands is None:
            return False
        seeds = [getattr(of.gradients, "seed", None) for of in (self.operands, operands)]
        return seeds[1] in (None, seeds[0])

    def _settings(self, family: Family) -> set[str]:
        """The settings that the layer has, not only could have."""
        has = {OPERANDS} if self.operands is not None else set()
        held = family.held_by(self.layer_class)
        if self.lowering is not None or held == {LOWERING}:
            has.add(LOWERING)
        return has

    def set(self) -> None:
        """Brings the layer into this state; takes some microseconds."""
        # Another thread may be calling the layer: one of ours must find its settings.
        settings = {"_lowering": self.lowering, "_operands": self.operands}
        held = {name: value for name, value in settings.items() if value is not None}
        vars(self.layer).update(held)
        set_noise(self.layer, self.noise)
        set_class(self.layer, self.layer_class)
        for name in settings.keys() - held.keys():
            vars(self.layer).pop(name, None)


def set_class(layer: keras.layers.Layer, layer_class: type[keras.layers.Layer]) -> None:
    """Changes the class of a layer; Keras's bookkeeping of attributes is not told."""
    object.__setattr__(layer, "__class__", layer_class)


def become(
    layer: keras.layers.Layer, family: Family, lowering: LoweringLike | LoweringChoice
) -> LayerState:
    """Gives `layer` a lowering, or `"stock"`, and returns its state."""
    state = LayerState.of(layer).with_lowering(family, lowering)
    state.set()
    return state


def swap(model: keras.Model, states: Sequence[LayerState]) -> None:
    """Brings layers of a model into `states`, and recompiles what used them: all or nothing.

    Recompiled are the functions that the model, or a model inside it, has made
    for `fit`, `evaluate` and `predict`. When an exception or Ctrl-C interrupts
    this, layers and functions are restored.
    """
    with lock:
        models = (model, *(place.layer for place in walk_layers(model)))
        functions = [
            (owner, kind, function)
            for owner in models
            for kind in STEP_KINDS
            if (function := getattr(owner, f"{kind}_function", None)) is not None
        ]
        before = [LayerState.of(state.layer) for state in states]
        new_noise = any(a.noise is not b.noise for a, b in zip(states, before, strict=True))
        retrack = new_noise and keras.backend.backend() == "torch"
        try:
            _set_all(states)
            if retrack:
                # Containers list the variables of what is inside them, too.
                keras_internals.track_torch_variables(model)
            for owner, kind, _ in functions:
                recompile(owner, kind)
        except BaseException:
            _set_all(before)
            if retrack:
                keras_internals.track_torch_variables(model)
            for owner, kind, function in functions:
                setattr(owner, f"{kind}_function", function)
            raise


@contextlib.contextmanager
def swapped(
    layers: Iterable[keras.layers.Layer], change: Callable[[LayerState], LayerState]
) -> Iterator[None]:
    """Changes layers inside the `with` block; restores them on exit.

    Nothing is recompiled: functions that were compiled before remain right, and
    none that is compiled inside may be kept. Blocks of one thread nest; those of
    several threads wait for each other.

    Args:
        layers: the layers.
        change: from a layer's present state to the one inside.
    """
    with lock:
        before = [LayerState.of(layer) for layer in layers]
        after = [change(state) for state in before]
        try:
            _set_all(after)
            yield
        finally:
            _set_all(before)


def _set_all(states: Sequence[LayerState]) -> None:
    """Sets all states, also when Ctrl-C arrives in the middle."""
    try:
        for state in states:
            state.set()
    except BaseException:
        for state in states:
            state.set()
        raise


@contextlib.contextmanager
def instance_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an instance attribute that shadows the class's; restores it on exit.

    Keras, TensorFlow and PyTorch, which watch attributes, are not told.
    """
    with lock:
        attributes = vars(owner)
        before = {name: attributes[name]} if name in attributes else {}
        try:
            attributes[name] = value
            yield
        finally:
            attributes.pop(name, None)
            attributes.update(before)


def recompile(model: keras.Model, kind: str) -> None:
    """Recreates a function of a model, to be traced with the present layers.

    JAX finds what it has compiled by equal functions, and a model's `train_step`
    equals itself: as long as anybody holds the old function (the traceback of an
    interrupted `fit`, say) its program would be used again. So Keras gets another
    step.

    Args:
        model: a model that has, or could make, the function.
        kind: one of `STEP_KINDS`.
    """
    step = getattr(model, f"{kind}_step")

    @functools.wraps(step)
    def another_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    with instance_attribute(model, f"{kind}_step", another_step):
        getattr(model, f"make_{kind}_function")(force=True)
