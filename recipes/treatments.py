"""What `--treatment` and `--compare` name: ways of training that are not exact.

    dorefa:W,A,G   DoReFa-Net (arXiv 1606.06160): bits of weights, activations and gradients
    bc             BinaryConnect, as arXiv 1706.02379 compares it: signs of float weights
    sr             its stochastic rounding: weights are on a grid after every update
    bigsr          the same, with updates of larger batches
    r              its deterministic rounding
    meprop:k=K     minimal effort back-propagation (arXiv 1711.06528): of each output gradient
                   the K largest elements; `meprop:unified,k=K` the same ones in all examples
    random:k=K     as many random elements, to compare with

After the name come numbers, words and options, in any order, each after a colon or a comma:
`dorefa:7,8,32:limit=6`, `sr:delta=0.125`. A treatment of a name of its own is one more entry
of `TREATMENTS`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

import diagconv_tf
from diagconv_tf import LowBit, deploy, restore, rewrite
from diagconv_tf.lowbit import (
    BinaryConnect,
    Operands,
    StochasticRounding,
)
from diagconv_tf.lowbit.graph import layer_facts
from diagconv_tf.lowbit.layers import kernels_of
from diagconv_tf.lowbit.operands import FLOAT_BITS
from diagconv_tf.lowbit.rounding import Grid
from diagconv_tf.minimal_effort import MinimalEffort, RandomK
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.treatment import Candidate, Treated, TreatedLayer
from recipes.config import Config, check_names

#: The bits of what is not quantized: weights, activations, gradients.
FLOAT = (FLOAT_BITS,) * 3

#: Of Big SR: the paper's batch of 1024 over that of the others, 128 (section 6).
_BIG_BATCH = 8


class Treatment(abc.ABC):
    """A way of training that changes what a model computes, or its gradients."""

    @property
    @abc.abstractmethod
    def bits(self) -> tuple[int | None, int, int]:
        """Bits of weights, activations and gradients; 32 is float, None a grid without end."""

    #: Whether there are float weights that `finish` leaves out.
    keeps_float_weights: ClassVar[bool] = False

    @property
    def kept(self) -> float | None:
        """Elements of output gradients that are kept, below 1 their share; None for all."""
        return None

    @property
    def can_simplify(self) -> bool:
        """Whether its training tells which hidden units are rarely active."""
        return False

    def settings(self, config: Config) -> Config:
        """The settings with which the model is trained, where they are others than `config`."""
        return config

    def wrap(self, optimizer: keras.Optimizer, model: keras.Model) -> keras.Optimizer:
        """The optimizer that trains `model`, a stock model."""
        del model
        return optimizer

    @abc.abstractmethod
    def apply(self, model: keras.Model) -> None:
        """Changes `model`, which is compiled and may have been rewritten."""

    @abc.abstractmethod
    def finish(self, model: keras.Model) -> keras.Model:
        """A copy of the trained `model`, for inference."""


class _Quantized(Treatment):
    """Layers whose operands are quantized, and whose float weights the optimizer updates."""

    keeps_float_weights = True

    def finish(self, model: keras.Model) -> keras.Model:
        # `restore` would give the float weights, which compute something else.
        return deploy(model)


@dataclasses.dataclass(frozen=True)
class DoReFa(_Quantized):
    """The quantizers of DoReFa-Net.

    Attributes:
        low_bit: which bits, where.
    """

    low_bit: LowBit

    @property
    def bits(self) -> tuple[int, int, int]:
        return self.low_bit.weights, self.low_bit.activations, self.low_bit.gradients

    def apply(self, model: keras.Model) -> None:
        rewrite(model, self.low_bit, in_place=True)


@dataclasses.dataclass(frozen=True)
class SignedConvolutions(diagconv_tf.treatment.Treatment):
    """`BinaryConnect` for all convolutions but a last layer.

    (The paper quantizes the weights of convolutions alone, the first one included.)
    """

    def decide(self, model: keras.Model, candidates: Sequence[Candidate]) -> Treated:
        last = _last_layers(model)
        layers = []
        for candidate in candidates:
            layer = candidate.place.layer
            reasons = list(candidate.reasons)
            if isinstance(layer, keras.layers.Dense):
                reasons.append("a dense layer")
            if id(layer) in last:
                reasons.append("the graph's last layer")
            operands = None if reasons else Operands(kernel=BinaryConnect())
            name = type(layer).__name__
            layers.append(TreatedLayer(candidate.place.path, name, operands, tuple(reasons)))
        return Treated(model.name, self, tuple(layers))

    def __str__(self) -> str:
        return "BinaryConnect"


@dataclasses.dataclass(frozen=True)
class BinaryConnectTraining(_Quantized):
    """Method BC of arXiv 1706.02379, section 3: layers compute with the signs of float weights.

    The float weights are kept between -1 and 1 (arXiv 1511.00363, section 2.4), beyond which
    they would not change the signs.
    """

    bits = (1, FLOAT_BITS, FLOAT_BITS)

    def apply(self, model: keras.Model) -> None:
        convolutions = _convolutions(model)
        rewrite(model, SignedConvolutions(), in_place=True)
        for layer in convolutions:
            for kernel in kernels_of(layer):
                # Only the variable's: no file of the model has to know it.
                kernel.constraint = _clip_to_one


def _clip_to_one(weights: Any) -> Any:
    return ops.clip(weights, -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class RoundedTraining(Treatment):
    """Methods SR, Big SR and R of arXiv 1706.02379, section 3: no float weights are kept.

    Attributes:
        delta: distance of neighbours on the grid.
        offset: a number of the grid.
        limit: the largest absolute value; None for none.
        rounding: `"stochastic"` or `"nearest"`.
        batches: so many batches make one update. There are as many epochs more, so that
            there are as many updates as without.
    """

    delta: float
    offset: float
    limit: float | None
    rounding: str
    batches: int = 1

    def __post_init__(self) -> None:
        Grid(self.delta, self.offset, self.limit)  # So that what is wrong is found now.
        if self.batches < 1:
            raise ValueError(f"Expected `batches` of at least 1. Received: {self.batches}")

    @property
    def bits(self) -> tuple[int | None, int, int]:
        levels = Grid(self.delta, self.offset, self.limit).levels
        weights = None if levels == math.inf else max(1, math.ceil(math.log2(levels)))
        return weights, FLOAT_BITS, FLOAT_BITS

    def settings(self, config: Config) -> Config:
        frozen = config.unfreeze_after
        return dataclasses.replace(
            config,
            unfreeze_after=None if frozen is None else frozen * self.batches,
            gradient_accumulation=config.gradient_accumulation * self.batches,
            epochs=config.epochs * self.batches,
            decay_epochs=tuple(epochs * self.batches for epochs in config.decay_epochs),
        )

    def wrap(self, optimizer: keras.Optimizer, model: keras.Model) -> keras.Optimizer:
        kernels = [kernel for layer in _convolutions(model) for kernel in kernels_of(layer)]
        return StochasticRounding(
            optimizer,
            self.delta,
            self.offset,
            self.limit,
            rounding=self.rounding,
            select=KernelsAt(tuple(kernel.path for kernel in kernels)),
        )

    def apply(self, model: keras.Model) -> None:
        """Leaves the layers as they are: it is the optimizer that keeps weights on the grid."""

    def finish(self, model: keras.Model) -> keras.Model:
        return restore(model)


@dataclasses.dataclass(frozen=True)
class RandomElements(diagconv_tf.treatment.Treatment):
    """Random elements of output gradients where `MinimalEffort` keeps the largest.

    (arXiv 1706.06197, figure 4.)

    Attributes:
        like: how many, where.
    """

    like: MinimalEffort

    def decide(self, model: keras.Model, candidates: Sequence[Candidate]) -> Treated:
        operand = RandomK(self.like.k, self.like.ratio)
        treated = self.like.decide(model, candidates)
        layers = (
            layer
            if layer.operands is None
            else dataclasses.replace(
                layer, operands=dataclasses.replace(layer.operands, gradients=operand)
            )
            for layer in treated.layers
        )
        return dataclasses.replace(treated, treatment=self, layers=tuple(layers))

    def __str__(self) -> str:
        return f"{self.like}, random"


@dataclasses.dataclass(frozen=True)
class MinimalEffortTraining(Treatment):
    """Gradients of few elements; what the trained model computes is what stock layers do.

    Attributes:
        minimal_effort: how many, where.
        random: whether they are random ones, instead of the largest.
    """

    minimal_effort: MinimalEffort
    random: bool = False
    bits = FLOAT

    @property
    def kept(self) -> float | None:
        k, ratio = self.minimal_effort.k, self.minimal_effort.ratio
        return k if k is not None else ratio if ratio != 1 else None

    @property
    def can_simplify(self) -> bool:
        return not self.random

    def apply(self, model: keras.Model) -> None:
        effort = self.minimal_effort
        rewrite(model, RandomElements(effort) if self.random else effort, in_place=True)

    def finish(self, model: keras.Model) -> keras.Model:
        return restore(model)


@keras.saving.register_keras_serializable(package="diagconv_recipes")
@dataclasses.dataclass(frozen=True)
class KernelsAt:
    """Selects variables by their paths.

    Attributes:
        paths: of variables.
    """

    paths: tuple[str, ...]

    def __call__(self, variable: keras.Variable) -> bool:
        return variable.path in self.paths

    def get_config(self) -> dict[str, Any]:
        return {"paths": list(self.paths)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KernelsAt:
        return cls(tuple(config["paths"]))


def _convolutions(model: keras.Model) -> list[keras.layers.Layer]:
    """All convolutions but a last layer.

    Raises:
        ValueError: if there is none.
    """
    last = _last_layers(model)
    kinds = (
        keras.layers.Conv2D,
        keras.layers.DepthwiseConv2D,
        keras.layers.SeparableConv2D,
    )
    found = [
        place.layer
        for place in walk_layers(model)
        if isinstance(place.layer, kinds) and id(place.layer) not in last
    ]
    if not found:
        raise ValueError(
            "Expected a model with convolutions before its last layer, whose weights are rounded. "
            f"Received: '{model.name}', which has none"
        )
    return found


def _last_layers(model: keras.Model) -> set[int]:
    """`id`s of the layers with which the graph ends; none where a model has no graph."""
    return {layer for layer, facts in (layer_facts(model) or {}).items() if facts.is_last}


# What the text of a treatment means


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """What follows the name of a treatment.

    Attributes:
        text: all of it, for messages.
        positional: numbers and words, in order.
        options: those with a name, in order; a name may come twice.
    """

    text: str
    positional: tuple[str, ...]
    options: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, text: str) -> tuple[str, _Arguments]:
        """Name and arguments."""
        name, *parts = text.replace(",", ":").split(":")
        options = [tuple(part.split("=", 1)) for part in parts if "=" in part]
        positional = tuple(part for part in parts if "=" not in part)
        return name, cls(text, positional, tuple(options))  # type: ignore[arg-type]

    def check_names(self, *known: str) -> None:
        names = (name for name, _ in self.options)
        check_names(names, known, f"option of the treatment '{self.text}'")

    def refuse_positional(self) -> None:
        if self.positional:
            raise ValueError(
                f"Expected options with a name, as in 'sr:delta=0.125'. Received: {self.text}"
            )

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(value for key, value in self.options if key == name)

    def selection(self) -> dict[str, Any]:
        """`skip`, `include` and `exclude`, where they are given; `skip=none` skips no layer."""
        names = ("skip", "include", "exclude")
        given = {name: self.all(name) for name in names if self.all(name)}
        return given | ({"skip": ()} if given.get("skip") == ("none",) else {})

    def number(self, name: str, default: Any, kind: Callable[[str], Any] = float) -> Any:
        values = self.all(name)
        if not values:
            return default
        try:
            (value,) = values
            return kind(value)
        except ValueError:
            raise ValueError(
                f"Expected one {'integer' if kind is int else 'number'} as `{name}`. "
                f"Received: {self.text}"
            ) from None


def _dorefa(arguments: _Arguments) -> DoReFa:
    arguments.check_names("limit", "signed", "skip", "include", "exclude", "seed")
    try:
        weights, activations, gradients = map(int, arguments.positional)
    except ValueError:
        raise ValueError(
            "Expected bits of weights, activations and gradients, as in 'dorefa:1,2,6' or "
            f"'dorefa:7,8,32:limit=6'. Received: {arguments.text}"
        ) from None
    options: dict[str, Any] = arguments.selection()
    if signed := arguments.all("signed"):
        if len(signed) > 1 or signed[0] not in ("true", "false"):
            raise ValueError(f"Expected signed=true or signed=false. Received: {arguments.text}")
        options["signed"] = signed == ("true",)
    return DoReFa(
        LowBit(
            weights,
            activations,
            gradients,
            limit=arguments.number("limit", None),
            seed=arguments.number("seed", None, int),
            **options,
        )
    )


def _bc(arguments: _Arguments) -> BinaryConnectTraining:
    arguments.refuse_positional()
    arguments.check_names()
    return BinaryConnectTraining()


def _rounded(arguments: _Arguments, rounding: str, batches: int | None = None) -> RoundedTraining:
    arguments.refuse_positional()
    arguments.check_names("delta", "offset", "limit", *(["batches"] if batches else []))
    # Without a step, weights of ±1; with one, its multiples.
    is_binary = not arguments.all("delta")
    return RoundedTraining(
        delta=arguments.number("delta", 2.0),
        offset=arguments.number("offset", 1.0 if is_binary else 0.0),
        limit=arguments.number("limit", 1.0 if is_binary else None),
        rounding=rounding,
        batches=arguments.number("batches", batches or 1, int),
    )


def _random(arguments: _Arguments) -> MinimalEffortTraining:
    if arguments.positional:
        raise ValueError(
            f"Expected 'random:k=30' or 'random:ratio=0.05'. Received: {arguments.text}"
        )
    return dataclasses.replace(_meprop(arguments), random=True)


def _meprop(arguments: _Arguments) -> MinimalEffortTraining:
    arguments.check_names("k", "ratio", "skip", "include", "exclude")
    if arguments.positional not in ((), ("unified",)):
        raise ValueError(
            "Expected 'meprop:k=30', 'meprop:ratio=0.05' or 'meprop:unified,k=30'. "
            f"Received: {arguments.text}"
        )
    return MinimalEffortTraining(
        MinimalEffort(
            k=arguments.number("k", None, int),
            ratio=arguments.number("ratio", None),
            unified=bool(arguments.positional),
            **arguments.selection(),
        )
    )


#: Name → what makes the treatment of its arguments.
TREATMENTS: Mapping[str, Callable[[_Arguments], Treatment]] = {
    "dorefa": _dorefa,
    "bc": _bc,
    "sr": functools.partial(_rounded, rounding="stochastic"),
    "bigsr": functools.partial(_rounded, rounding="stochastic", batches=_BIG_BATCH),
    "r": functools.partial(_rounded, rounding="nearest"),
    "meprop": _meprop,
    "random": _random,
}


def split(text: str) -> tuple[str, str]:
    """A variant's lowering and treatment: `"shifted+dorefa:1,2,6"` has both.

    Returns:
        The lowering, `"stock"` where there is none, and the treatment, empty where there is
        none.
    """
    lowering, plus, treatment = text.rpartition("+")
    name, _ = _Arguments.of(treatment)
    if name in TREATMENTS:
        return lowering if plus else "stock", treatment
    return text, ""


def parse(text: str) -> Treatment:
    """The treatment that `--treatment=text` means.

    Raises:
        ValueError: if it is none; the message says what is expected.
    """
    name, arguments = _Arguments.of(text)
    check_names([name], TREATMENTS, "treatment")
    try:
        return TREATMENTS[name](arguments)
    except ValueError as error:
        if arguments.text in str(error):
            raise
        raise ValueError(f"{error} (in the treatment '{text}')") from error
