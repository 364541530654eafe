"""Layers change class: the one mechanism of rewriting.

Our layers are subclasses of Keras's with the same variables. So a layer becomes
ours, and stock again, by a change of its class: nothing is copied, and whatever
refers to the layer or its variables (graphs, optimizers, wrappers, other models)
goes on doing so.

`swap` changes layers for good, with the functions that Keras compiled from them.
`swapped` changes them for a while. Both restore everything when they are
interrupted, and both hold `lock`. Calls of the layers need no lock: a layer's
`_lowering` is set before its class becomes ours, and stays during `swapped`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras

from diagconv_tf.layers import LoweredLayer
from diagconv_tf.lowerings import LoweringChoice, LoweringLike, parse
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import Rule
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
    """

    layer: keras.layers.Layer
    layer_class: type[keras.layers.Layer]
    lowering: LoweringChoice | None

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> LayerState:
        """The present state of `layer`."""
        return cls(layer, type(layer), vars(layer).get("_lowering"))

    @classmethod
    def by_rule(
        cls, layer: keras.layers.Layer, rule: Rule, lowering: LoweringLike | LoweringChoice
    ) -> LayerState:
        """The state that a rule and a lowering give to `layer`; the layer is not changed.

        Args:
            layer: a layer of the rule's source or replacement.
            rule: what the layer can be.
            lowering: `"stock"` for the rule's source, else what the replacement
                computes with. A replacement that is no layer of ours has none.

        Raises:
            ValueError: if `lowering` is not known.
        """
        if lowering == STOCK:
            return cls(layer, rule.source, None)
        choice = parse(lowering)
        lowered = issubclass(rule.replacement, LoweredLayer)
        return cls(layer, rule.replacement, choice if lowered else None)

    def set(self) -> None:
        """Brings the layer into this state; takes about a microsecond."""
        # Another thread may be calling the layer: one of ours must find its lowering.
        if self.lowering is not None:
            vars(self.layer)["_lowering"] = self.lowering
        set_class(self.layer, self.layer_class)
        if self.lowering is None:
            vars(self.layer).pop("_lowering", None)


def set_class(layer: keras.layers.Layer, layer_class: type[keras.layers.Layer]) -> None:
    """Changes the class of a layer; Keras's bookkeeping of attributes is not told."""
    object.__setattr__(layer, "__class__", layer_class)


def become(
    layer: keras.layers.Layer, rule: Rule, lowering: LoweringLike | LoweringChoice
) -> LayerState:
    """Brings `layer` into the state of `LayerState.by_rule`, and returns it."""
    state = LayerState.by_rule(layer, rule, lowering)
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
        try:
            _set_all(states)
            for owner, kind, _ in functions:
                recompile(owner, kind)
        except BaseException:
            _set_all(before)
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
