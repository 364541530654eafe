"""Which layer class may become which, and why a layer may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras

from diagconv_tf.layers import (
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    DiagonalwiseSeparableConv2D,
    LoweredLayer,
)


def _nothing(layer: keras.layers.Layer) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Rule:
    """A layer class and the one it is replaced with.

    A layer is replaced by changing its class, so the replacement must have
    the same variables and config, and further arguments need defaults. To
    cover a subclass of your own, say `MyDepthwise(DepthwiseConv2D)`, derive
    `class MyFast(MyDepthwise, DiagonalwiseDepthwiseConv2D)` and add
    `Rule(MyDepthwise, MyFast)` to `DEFAULT_RULES`.

    Attributes:
        source: the class that is replaced; its subclasses are not.
        replacement: a subclass of `source`.
        why_not: returns every reason why a layer of class `source` must stay
            as it is; an empty list means that it can be replaced.

    Raises:
        ValueError: if `replacement` is not a subclass of `source`.
    """

    source: type[keras.layers.Layer]
    replacement: type[keras.layers.Layer]
    why_not: Callable[[keras.layers.Layer], list[str]] = _nothing

    def __post_init__(self) -> None:
        for cls in (self.source, self.replacement):
            if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
                raise ValueError(f"Expected a subclass of keras.layers.Layer. Received: {cls!r}")
        if self.replacement is self.source or not issubclass(self.replacement, self.source):
            raise ValueError(
                "Expected `replacement` to be a subclass of `source`, because layers change "
                f"their class and keep their variables. Received: source={self.source.__name__}, "
                f"replacement={self.replacement.__name__}"
            )


def _standard_convolution(layer: keras.layers.Layer) -> list[str]:
    return [] if layer.groups > 1 else ["groups=1: a standard convolution already"]


#: Keras's three layers and ours.
DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(keras.layers.DepthwiseConv2D, DiagonalwiseDepthwiseConv2D),
    Rule(keras.layers.SeparableConv2D, DiagonalwiseSeparableConv2D),
    Rule(keras.layers.Conv2D, DiagonalwiseConv2D, _standard_convolution),
)


def find_rule(layer: keras.layers.Layer, rules: Sequence[Rule]) -> Rule | None:
    """The first rule whose source or replacement is the class of `layer`."""
    for rule in rules:
        if type(layer) in (rule.source, rule.replacement):
            return rule
    return None


def stock_class(
    layer_class: type[keras.layers.Layer], rules: Sequence[Rule] = DEFAULT_RULES
) -> type[keras.layers.Layer]:
    """The class that a layer would have without this package.

    Args:
        layer_class: any class of layers.
        rules: those that the layer's model was rewritten with.

    Returns:
        The source of the rule that makes `layer_class`. Without a rule, the first
        base class that has nothing of ours: of `MyFast(MyDepthwise,
        DiagonalwiseDepthwiseConv2D)`, `MyDepthwise`.
    """
    for rule in rules:
        if layer_class is rule.replacement:
            return rule.source
    return next(
        base
        for base in layer_class.__mro__
        if issubclass(base, keras.layers.Layer) and not issubclass(base, LoweredLayer)
    )
