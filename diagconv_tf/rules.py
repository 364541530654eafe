"""Which layer class may become which, what it can hold, and why a layer may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import keras

from diagconv_tf.layers import (
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    DiagonalwiseSeparableConv2D,
    LoweredLayer,
)
from diagconv_tf.lowbit.layers import (
    LowBitConv2D,
    LowBitDense,
    LowBitDepthwiseConv2D,
    LowBitSeparableConv2D,
    OperandLayer,
    why_not_operands,
)
from diagconv_tf.minimal_effort.layers import MinimalEffortEinsumDense, why_not_einsum
from diagconv_tf.minimal_effort.recurrent import (
    MinimalEffortGRU,
    MinimalEffortLSTM,
    why_not_recurrent,
)

#: The settings that a layer can have: how it computes, and what its operands go through.
LOWERING, OPERANDS = "lowering", "operands"


def _nothing(layer: keras.layers.Layer) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Rule:
    """A layer class, the one it is replaced with, and what that one can hold.

    A layer is replaced by changing its class, so the replacement must have
    the same variables and config, and further arguments need defaults. To
    cover a subclass of your own, say `MyDepthwise(DepthwiseConv2D)`, derive
    `class MyFast(MyDepthwise, DiagonalwiseDepthwiseConv2D)` and add
    `Rule(MyDepthwise, MyFast)` to `DEFAULT_RULES`; for low-bit training
    `class MyLowBit(MyDepthwise, LowBitDepthwiseConv2D)` and
    `Rule(MyDepthwise, MyLowBit)`.

    Attributes:
        source: the class that is replaced; its subclasses are not.
        replacement: a subclass of `source`.
        why_not: returns every reason why a layer of class `source` must stay
            as it is; an empty list means that it can be replaced.
        settings: the settings that a layer of class `replacement` can hold,
            of `"lowering"` and `"operands"`. None means what the class itself
            says, and `{"lowering"}` of a class that is none of ours.

    Raises:
        ValueError: if `replacement` is not a subclass of `source`, or a
            setting is not known.
    """

    source: type[keras.layers.Layer]
    replacement: type[keras.layers.Layer]
    why_not: Callable[[keras.layers.Layer], list[str]] = _nothing
    settings: Collection[str] | None = None

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
        if not self.held or not self.held <= {LOWERING, OPERANDS}:
            raise ValueError(
                f'Expected `settings` to be of "{LOWERING}" and "{OPERANDS}". '
                f"Received: settings={self.settings!r}"
            )

    @property
    def held(self) -> frozenset[str]:
        """The settings that a layer of class `replacement` can hold."""
        if self.settings is not None:
            return frozenset(self.settings)
        if issubclass(self.replacement, LoweredLayer | OperandLayer):
            return self.replacement.settings
        return frozenset({LOWERING})


def _standard_convolution(layer: keras.layers.Layer) -> list[str]:
    return [] if layer.groups > 1 else ["groups=1: a standard convolution already"]


#: Keras's layers and ours.
DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(keras.layers.DepthwiseConv2D, DiagonalwiseDepthwiseConv2D),
    Rule(keras.layers.SeparableConv2D, DiagonalwiseSeparableConv2D),
    Rule(keras.layers.Conv2D, DiagonalwiseConv2D, _standard_convolution),
    Rule(keras.layers.DepthwiseConv2D, LowBitDepthwiseConv2D, why_not_operands),
    Rule(keras.layers.SeparableConv2D, LowBitSeparableConv2D, why_not_operands),
    Rule(keras.layers.Conv2D, LowBitConv2D, why_not_operands),
    Rule(keras.layers.Dense, LowBitDense, why_not_operands),
    Rule(keras.layers.EinsumDense, MinimalEffortEinsumDense, why_not_einsum),
    Rule(keras.layers.LSTM, MinimalEffortLSTM, why_not_recurrent),
    Rule(keras.layers.GRU, MinimalEffortGRU, why_not_recurrent),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """The classes that one layer can have.

    Attributes:
        stock: the class without any setting.
        rules: what the others are and can hold, in the order in which they were given.
    """

    stock: type[keras.layers.Layer]
    rules: tuple[Rule, ...]

    def holds(self, setting: str) -> bool:
        """Whether any class holds a setting."""
        return any(setting in rule.held for rule in self.rules)

    @property
    def held_operands(self) -> frozenset[str]:
        """The operands, of the fields of `Operands`, that any of the classes can hold."""
        classes = [rule.replacement for rule in self.rules if OPERANDS in rule.held]
        # A class of somebody else's says nothing of them, and can hold all.
        held = (getattr(cls, "held_operands", OperandLayer.held_operands) for cls in classes)
        return frozenset().union(*held)

    def held_by(self, layer_class: type[keras.layers.Layer]) -> frozenset[str]:
        """The settings that one of the classes can hold."""
        return next(
            (rule.held for rule in self.rules if rule.replacement is layer_class), frozenset()
        )

    def class_for(
        self, settings: Collection[str], present: type[keras.layers.Layer]
    ) -> type[keras.layers.Layer]:
        """The simplest class that holds `settings`: it holds the fewest others.

        Args:
            settings: names.
            present: among equally simple classes this one is preferred, then the
                first rule's.

        Raises:
            ValueError: if there is none.
        """
        if not settings:
            return self.stock
        found = [rule for rule in self.rules if rule.held >= set(settings)]
        if not found:
            raise ValueError(
                f"Expected a rule for a {self.stock.__name__} that holds "
                f"{' and '.join(sorted(settings))}. Received: none; pass `rules=`"
            )
        return min(found, key=lambda r: (len(r.held), r.replacement is not present)).replacement

    def why_not(self, layer: keras.layers.Layer, setting: str) -> list[str]:
        """Every reason why a layer of one of the classes cannot get a setting.

        The reasons are those of the rule that holds the fewest other settings.
        """
        found = sorted((r for r in self.rules if setting in r.held), key=lambda r: len(r.held))
        if not found:
            return [f"no rule gives a {self.stock.__name__} {setting}"]
        if any(type(layer) is rule.replacement and rule.held == found[0].held for rule in found):
            return []
        return found[0].why_not(layer)


def find_family(
    layer_class: type[keras.layers.Layer], rules: Sequence[Rule] = DEFAULT_RULES
) -> Family | None:
    """The family of a class; None where no rule names it as source or replacement."""
    rule = next((r for r in rules if layer_class in (r.source, r.replacement)), None)
    if rule is None:
        return None
    stock = rule.source
    # A rule may take its source from another one.
    while (chained := next((r for r in rules if r.replacement is stock), None)) is not None:
        stock = chained.source
    members = {stock}
    for rule in sorted(rules, key=lambda r: len(r.replacement.__mro__)):
        if rule.source in members:
            members.add(rule.replacement)
    return Family(stock, tuple(rule for rule in rules if rule.source in members))


def stock_class(
    layer_class: type[keras.layers.Layer], rules: Sequence[Rule] = DEFAULT_RULES
) -> type[keras.layers.Layer]:
    """The class that a layer would have without this package.

    Args:
        layer_class: any class of layers.
        rules: those that the layer's model was rewritten with.

    Returns:
        The stock class of the family of `layer_class`. Without a rule, the first
        base class that has nothing of ours: of `MyFast(MyDepthwise,
        DiagonalwiseDepthwiseConv2D)`, `MyDepthwise`.
    """
    family = find_family(layer_class, rules)
    if family is not None:
        return family.stock
    return next(
        base
        for base in layer_class.__mro__
        if issubclass(base, keras.layers.Layer)
        and not issubclass(base, LoweredLayer | OperandLayer)
    )
