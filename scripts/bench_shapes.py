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

ALL_SHAPES = (
    "MobileNet@224",
    "MobileNetV2@224",
    "mobilenet_v1_cifar@32",
    "mobilenet_v2_cifar@32",
    "ConvNeXtTiny@224:7x7",
    "EfficientNetB0@224:5x5",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A distinct convolution, and which models have it how often.

    Attributes:
        spec: with the batch size; layout and dtype are those of each group.
        uses: `NAME@SIZE` → number of layers; empty for a shape given by hand.
    """

    spec: ConvSpec
    uses: Mapping[str, int]

    @property
    def name(self) -> str:
        return shape_name(self.spec)


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
    """The depthwise convolution that `shape_name` calls `name`; None if it is no such name."""
    match = re.fullmatch(
        r"(\d+)x(\d+)x(\d+)_k(\d+(?:x\d+)?)_s(\d+(?:x\d+)?)(?:_m(\d+))?(?:_d(\d+(?:x\d+)?))?(_valid)?",
        name,
    )
    if not match:
        return None

    def pair(text: str) -> tuple[int, int]:
        first, _, second = text.partition("x")
        return int(first), int(second or first)

    height, width, channels, kernel, strides, multiplier, dilation, valid = match.groups()
    return ConvSpec(
        batch=batch,
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

    Raises:
        ValueError: if a name is neither a model nor a shape, or finds none.
    """
    names = list(itertools.chain(*(ALL_SHAPES if name == "all" else (name,) for name in names)))
    uses: dict[ConvSpec, collections.Counter] = {}
    for name in names:
        by_hand = parse_shape_name(name, batch)
        if by_hand is not None:
            uses.setdefault(by_hand, collections.Counter())
            continue
        match = re.fullmatch(r"(\w+)@(\d+)(?::(\d+)x(\d+))?", name)
        if not match:
            raise ValueError(
                "Expected --shapes to be all, NAME@SIZE, NAME@SIZE:KxK or HxWxC_kK_sS. "
                f"Received: {name}"
            )
        model_name, size, *kernel = match.groups()
        wanted = None if kernel[0] is None else tuple(map(int, kernel))
        specs = [
            spec
            for spec in depthwise_specs(model_name, int(size), batch)
            if wanted in (None, spec.kernel_size)
        ]
        if not specs:
            raise ValueError(f"Expected depthwise convolutions in --shapes={name}. Received: none")
        for spec in specs:
            uses.setdefault(spec, collections.Counter())[f"{model_name}@{size}"] += 1
    return [Shape(spec, dict(counts)) for spec, counts in uses.items()]


@functools.cache
def depthwise_specs(model_name: str, size: int, batch: int) -> tuple[ConvSpec, ...]:
    """One per call of a depthwise layer, as `inspect_model` finds them in the model."""
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
