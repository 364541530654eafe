"""The one workload type, `ConvSpec`: a grouped 2-D convolution.

Lowerings, cache keys, reports, tests and benchmarks all speak of a layer as a
`ConvSpec`: a 2-D convolution of `groups` groups, each from
`input_channels_per_group` to `output_channels_per_group` channels. A depthwise
convolution has one input channel and `depth_multiplier` outputs a group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras

Pass = Literal["forward", "input_gradient", "kernel_gradient"]
PASSES: tuple[Pass, ...] = ("forward", "input_gradient", "kernel_gradient")

#: Stands in for a lowering where a layer is Keras's own.
STOCK = "stock"

_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def same_padding(size: Any, kernel_size: int, stride: int, dilation: int) -> tuple:
    """Zeros before and after one axis under `padding="same"`.

    Args:
        size: input size; an int or, for an unknown size, a scalar tensor.
        kernel_size: taps along the axis.
        stride: stride along the axis.
        dilation: distance between taps.

    Returns:
        `(before, after)`, of the type of `size`. The odd zero goes after, as
        in TensorFlow (tensorflow.org, `tf.nn`, 'Notes on padding').
    """
    extent = (kernel_size - 1) * dilation + 1
    if stride == 1:
        total = extent - 1
    else:
        outputs = -(-size // stride)
        needed = (outputs - 1) * stride + extent - size
        is_number = isinstance(needed, int)
        total = max(needed, 0) if is_number else keras.ops.maximum(needed, 0)
    return total // 2, total - total // 2


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """One grouped 2-D convolution: the workload of a layer.

    Shapes, in the `"channels_last"` format:

    - inputs `(batch, height, width, groups * input_channels_per_group)`
    - kernel `(kh, kw, input_channels_per_group,
      groups * output_channels_per_group)`, output channels group by group;
      Keras's depthwise kernel `(kh, kw, C, m)` is this one reshaped
    - outputs `(batch, out_height, out_width,
      groups * output_channels_per_group)`

    Attributes:
        batch: images, or None where it is not known.
        height: input height in pixels, or None where it is not known.
        width: input width in pixels, or None where it is not known.
        groups: number of groups; every group reads its own channels only.
        input_channels_per_group: 1 for depthwise convolutions.
        output_channels_per_group: the depth multiplier for depthwise ones.
        kernel_size: `(kh, kw)`, in taps.
        strides: `(vertical, horizontal)`.
        dilation_rate: `(vertical, horizontal)`.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`.
        compute_dtype: a floating dtype name.

    Raises:
        ValueError: if a value is out of range, or the input is too small for
            the kernel.
    """

    batch: int | None
    height: int | None
    width: int | None
    groups: int
    input_channels_per_group: int = 1
    output_channels_per_group: int = 1
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation_rate: tuple[int, int] = (1, 1)
    padding: str = "valid"
    data_format: str = "channels_last"
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("kernel_size", "strides", "dilation_rate"):
            value = getattr(self, name)
            if len(value) != 2 or any(int(v) != v or v < 1 for v in value):
                raise ValueError(
                    f"Expected `{name}` to be two integers >= 1. Received: {name}={value}"
                )
            object.__setattr__(self, name, tuple(int(v) for v in value))
        for name in ("groups", "input_channels_per_group", "output_channels_per_group"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"Expected `{name}` to be >= 1. Received: {name}={value}")
        for name, choices in (
            ("padding", ("valid", "same")),
            ("data_format", ("channels_last", "channels_first")),
            ("compute_dtype", tuple(_DTYPE_BYTES)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"Expected `{name}` to be one of {choices}. Received: {name}={value!r}"
                )
        if self.padding == "valid":
            extents = tuple(
                (k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)
            )
            for axis, size, extent in zip(
                ("height", "width"), (self.height, self.width), extents, strict=True
            ):
                if size is not None and size < extent:
                    raise ValueError(
                        f"The input is too small for the kernel: expected an input {axis} of at "
                        f"least {extent} (kernel_size={self.kernel_size}, dilation_rate="
                        f"{self.dilation_rate}, padding='valid'). Received: {axis}={size}"
                    )

    @property
    def input_channels(self) -> int:
        return self.groups * self.input_channels_per_group

    @property
    def output_channels(self) -> int:
        return self.groups * self.output_channels_per_group

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """`(kh, kw, input_channels_per_group, output_channels)`."""
        return (*self.kernel_size, self.input_channels_per_group, self.output_channels)

    @property
    def is_depthwise(self) -> bool:
        """True where every group has one input channel and there are several."""
        return self.groups > 1 and self.input_channels_per_group == 1

    @property
    def channel_axis(self) -> int:
        return 3 if self.data_format == "channels_last" else 1

    @property
    def spatial_axes(self) -> tuple[int, int]:
        return (1, 2) if self.data_format == "channels_last" else (2, 3)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return self._arrange(self.height, self.width, self.input_channels)

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        return self._arrange(*self.output_size, self.output_channels)

    @property
    def output_size(self) -> tuple[int | None, int | None]:
        """`(height, width)` of the outputs; None where it is not known."""
        height, width = (
            None if size is None else self.output_length(axis, size)
            for axis, size in enumerate((self.height, self.width))
        )
        return height, width

    def output_length(self, axis: int, size: Any) -> Any:
        """Output size along spatial `axis` (0 or 1) for the input size `size`.

        `size` is an int or a scalar tensor; so is the result.
        """
        stride = self.strides[axis]
        if self.padding == "same":
            return -(-size // stride)
        extent = (self.kernel_size[axis] - 1) * self.dilation_rate[axis] + 1
        return (size - extent) // stride + 1

    def padding_for(self, sizes: Sequence[Any]) -> tuple[tuple, tuple]:
        """Zeros `((top, bottom), (left, right))` for an input of `sizes`.

        `sizes` are ints or scalar tensors; so are the results.
        """
        if self.padding == "valid":
            return (0, 0), (0, 0)
        vertical, horizontal = (
            same_padding(*arguments)
            for arguments in zip(
                sizes, self.kernel_size, self.strides, self.dilation_rate, strict=True
            )
        )
        return vertical, horizontal

    @property
    def size_text(self) -> str:
        """Height, width and input channels, for people: `"28×28×64"`."""
        sizes = (self.height, self.width, self.input_channels)
        return "×".join("?" if size is None else str(size) for size in sizes)

    @property
    def window_text(self) -> str:
        """The kernel and how it moves, for people: `"3×3, stride 2×2"`."""
        parts = ["×".join(map(str, self.kernel_size))]
        if self.strides != (1, 1):
            parts.append("stride " + "×".join(map(str, self.strides)))
        if self.dilation_rate != (1, 1):
            parts.append("dilation " + "×".join(map(str, self.dilation_rate)))
        if not self.is_depthwise:
            parts.append(f"{self.groups} groups")
        return ", ".join(parts)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ConvSpec:
        """The workload whose attributes are `fields`, in JSON's types.

        Raises:
            TypeError, ValueError: if they are not a workload's.
        """
        arguments: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()
        }
        return cls(**arguments)

    def replace(self, **changes: Any) -> ConvSpec:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def pointwise(self, filters: int) -> ConvSpec:
        """The 1×1 convolution from this one's outputs to `filters` channels."""
        height, width = self.output_size
        return ConvSpec(
            batch=self.batch,
            height=height,
            width=width,
            groups=1,
            input_channels_per_group=self.output_channels,
            output_channels_per_group=filters,
            kernel_size=(1, 1),
            data_format=self.data_format,
            compute_dtype=self.compute_dtype,
        )

    def flops(self) -> int | None:
        """Floating-point operations of one pass; None where a size is unknown.

        The three passes do equally many: a multiplication and an addition per
        kernel tap, input channel of the group, and output element. Taps that
        fall on padding are counted, as is usual.
        """
        if None in self.output_shape:
            return None
        taps = math.prod(self.kernel_size) * self.input_channels_per_group
        return 2 * taps * math.prod(self.output_shape)  # type: ignore[arg-type]

    def least_bytes(self) -> int | None:
        """Fewest bytes one pass must move; None where a size is unknown.

        Every pass reads two of inputs, kernel and outputs (or their
        gradients) once and writes the third once, so all three move equally
        many.
        """
        if None in self.input_shape:
            return None
        elements = (
            math.prod(self.input_shape)  # type: ignore[arg-type]
            + math.prod(self.kernel_shape)
            + math.prod(self.output_shape)  # type: ignore[arg-type]
        )
        return elements * _DTYPE_BYTES[self.compute_dtype]

    def _arrange(self, height: Any, width: Any, channels: int) -> tuple[int | None, ...]:
        if self.data_format == "channels_last":
            return (self.batch, height, width, channels)
        return (self.batch, channels, height, width)
