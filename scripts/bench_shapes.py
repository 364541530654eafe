"""The depthwise convolutions of models, each with a name."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Mapping, Sequence

import bench_common
import keras

from diagconv_tf import ConvSpec, inspect_model

#: Names that stand for several.
SHAPE_SETS: Mapping[str, tuple[str, ...]] = {
    "all": (
        "MobileNet@224",
        "MobileNetV2@224",
        "mobilenet_v1_cifar@32",
        "mobilenet_v2_cifar@32",
        "ConvNeXtTiny@224:7x7",
        "EfficientNetB0@224:5x5",
    ),
    # Ten, so that a compiling backend gets through them in some minutes.
    "main": (
        "MobileNet@224:top4",
        "MobileNetV2@224:top3",
        "mobilenet_v1_cifar@32:b512:top2",
        "EfficientNetB0@224:5x5:top1",
        "ConvNeXtTiny@224:7x7:top1",
    ),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A distinct convolution, and which models have it how often.

    Attributes:
        spec: with the batch size; layout and dtype are those of each group.
        uses: `NAME@SIZE` → number of layers; empty for a shape given by hand.
        name: `shape_name`, with `_bN` where the batch is not the usual one.
    """

    spec: ConvSpec
    uses: Mapping[str, int]
    name: str


def shape_name(spec: ConvSpec) -> str:
    """`HxWxC_kK_sS`, and what is not usual: `_mM` outputs a channel, `_dD`, `_valid`."""

    def pair(values: tuple[int, int]) -> str:
        return str(values[0]) if values[0] == values[1] else "x".join(map(str, values))

    name = f"{spec.height}x{spec.width}x{spec.input_channels}_k{pair(spec.kernel_size)}"
    name += f"_s{pair(spec.strides)}"
    if spec.output_channels_per_group != 1:
        name += f"_m{spec.output_channels_per_group}"
    if spec.dilation_rate != (1, 1):
        name += f"_d{pair(spec.dilation_rate)}"
    return name + ("_valid" if spec.padding == "valid" else "")


def parse_shape_name(name: str, batch: int) -> ConvSpec | None:
    """The depthwise convolution that a `Shape` calls `name`; None if it is no such name.

    Args:
        name: `shape_name`, and `_bN` where the batch is another.
        batch: images, where the name does not say.
    """
    match = re.fullmatch(
        r"(\d+)x(\d+)x(\d+)_k(\d+(?:x\d+)?)_s(\d+(?:x\d+)?)(?:_m(\d+))?(?:_d(\d+(?:x\d+)?))?(_valid)?"
        r"(?:_b([1-9]\d*))?",
        name,
    )
    if not match:
        return None

    def pair(text: str) -> tuple[int, int]:
        first, _, second = text.partition("x")
        return int(first), int(second or first)

    height, width, channels, kernel, strides, multiplier, dilation, valid, own = match.groups()
    return ConvSpec(
        batch=int(own or batch),
        height=int(height),
        width=int(width),
        groups=int(channels),
        output_channels_per_group=int(multiplier or 1),
        kernel_size=pair(kernel),
        strides=pair(strides),
        dilation_rate=pair(dilation or "1"),
        padding="valid" if valid else "same",
    )


def find_shapes(names: Sequence[str], batch: int) -> list[Shape]:
    """The distinct depthwise convolutions that `--shapes` asks for, in its order.

    Those of a model come in the order of their share of its depthwise work.

    Raises:
        ValueError: if a name is neither a model nor a shape, or finds none.
    """
    names = list(itertools.chain(*(SHAPE_SETS.get(name, (name,)) for name in names)))
    uses: dict[ConvSpec, dict[str, int]] = {}
    for name in names:
        by_hand = parse_shape_name(name, batch)
        if by_hand is not None:
            uses.setdefault(by_hand, {})
            continue
        match = re.fullmatch(
            r"(\w+)@(\d+)(?::(\d+)x(\d+))?(?::b([1-9]\d*))?(?::top([1-9]\d*))?", name
        )
        if not match:
            raise ValueError(
                f"Expected --shapes to be {', '.join(SHAPE_SETS)}, NAME@SIZE (then :KxK, :bN and "
                f":topN, in this order) or HxWxC_kK_sS. Received: {name}"
            )
        model_name, size, *kernel, own_batch, top = match.groups()
        wanted = None if kernel[0] is None else tuple(map(int, kernel))
        layers = collections.Counter(
            spec
            for spec in depthwise_specs(model_name, int(size), int(own_batch or batch))
            if wanted in (None, spec.kernel_size)
        )
        if not layers:
            raise ValueError(f"Expected depthwise convolutions in --shapes={name}. Received: none")
        # Bytes, because memory binds nearly all of them.
        by_work = sorted(layers, key=lambda spec: -layers[spec] * (spec.least_bytes() or 0))
        for spec in by_work[: None if top is None else int(top)]:
            uses.setdefault(spec, {})[f"{model_name}@{size}"] = layers[spec]
    return [
        Shape(
            spec,
            counts,
            shape_name(spec) + ("" if spec.batch == batch else f"_b{spec.batch}"),
        )
        for spec, counts in uses.items()
    ]


@functools.cache
def depthwise_specs(model_name: str, size: int, batch: int) -> tuple[ConvSpec, ...]:
    """One per call of a depthwise layer, as `inspect_model` finds them in the model."""
    # To give values to the weights takes longer than all else (MobileNetV2 on
    # JAX, 2 cores: 12 seconds, and 1 without).
    with keras.StatelessScope(initialize_variables=False):
        model = make_model(model_name, size)
        specs = [spec for row in inspect_model(model, batch).rows for spec in row.specs]
    keras.backend.clear_session(free_memory=True)
    return tuple(
        spec.replace(data_format="channels_last", compute_dtype="float32")
        for spec in specs
        if spec.is_depthwise
    )


def make_model(name: str, size: int) -> keras.Model:
    shape = (size, size, 3)
    if name in ("mobilenet_v1_cifar", "mobilenet_v2_cifar"):
        # The recipes are not installed with the package.
        sys.path.insert(0, str(bench_common.ROOT))
        from recipes import models

        return getattr(models, name.removesuffix("_cifar"))(shape, 10, stem="cifar")
    application = getattr(keras.applications, name, None)
    if not callable(application):
        raise ValueError(f"Expected the name of a keras.applications model. Received: {name}")
    return application(weights=None, input_shape=shape, include_top=False)
