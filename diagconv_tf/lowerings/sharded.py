"""Convolutions under a `keras.distribution`: every device computes its own part.

XLA's partitioner divides a program among devices operation by operation. It
knows what a depthwise convolution is; of a loop over images, of blocks of
channels or of grouped convolutions it does not see that no device needs
another's images or channels, and gathers them all on each. So the convolution
is written for one device's images and, where the layout of the kernel divides
its channels, one device's channels; blocks are then blocks of these.
"""

from __future__ import annotations

import functools
from typing import Any

from diagconv_tf import backends, distribution
from diagconv_tf.distribution import MeshAxis
from diagconv_tf.lowerings.choice import LoweringChoice, LoweringLike, convolve, why_not
from diagconv_tf.spec import ConvSpec


def why_not_sharded(
    spec: ConvSpec,
    lowering: LoweringLike | LoweringChoice,
    shards: int,
) -> list[str]:
    """Every reason why devices cannot compute their own channels; [] means they can.

    Otherwise the channels of the inputs are gathered on every device.

    Args:
        spec: the problem.
        lowering: as a layer's `lowering`.
        shards: number of devices that the channels are divided among.

    Raises:
        ValueError: if `lowering` is not known.
    """
    if spec.groups % shards:
        return [f"{spec.groups} groups are not divided by {shards} devices"]
    part = spec.replace(groups=spec.groups // shards)
    return why_not(part, lowering)


def convolve_sharded(
    spec: ConvSpec,
    choice: LoweringChoice,
    inputs: Any,
    kernel: Any,
    channels: MeshAxis | None = None,
) -> Any:
    """`convolve`, divided among the devices of the current `keras.distribution`.

    Args:
        spec: the problem.
        choice: what `parse` made of a layer's `lowering`.
        inputs: tensor of `spec.input_shape`.
        kernel: tensor of `spec.kernel_shape`.
        channels: the mesh axis along which the kernel's output channels are
            divided, or None.

    Returns:
        A tensor of `spec.output_shape` and the dtype of the inputs.
    """
    backend = backends.current()
    batch = distribution.batch_axis()
    if batch is None or not backend.is_partitioned(inputs):
        return convolve(spec, choice, inputs, kernel)
    # Along the batch's own axis weights may be stored divided; XLA gathers them.
    divided = channels is not None and channels.size > 1 and channels.name != batch.name
    if divided and why_not_sharded(spec, choice, channels.size):
        # Said to XLA: its partitioner aborts over a convolution of 3 groups whose
        # channels are divided by 2 (jaxlib 0.10.2).
        inputs = backend.replicated(inputs, spec.channel_axis)
        kernel = backend.replicated(kernel, 3)
        outputs = _convolve_parts(spec, choice, inputs, kernel, batch, None)
        return backend.replicated(outputs, spec.channel_axis)
    return _convolve_parts(spec, choice, inputs, kernel, batch, channels if divided else None)


def _convolve_parts(
    spec: ConvSpec,
    choice: LoweringChoice,
    inputs: Any,
    kernel: Any,
    batch: MeshAxis,
    channels: MeshAxis | None,
) -> Any:
    """`convolve`, by each device for its images and, with `channels`, for its channels."""
    part = spec
    input_axes: list[str | None] = [None] * 4
    kernel_axes: list[str | None] = [None] * 4
    if batch.size > 1 and spec.batch is not None and spec.batch % batch.size == 0:
        part = part.replace(batch=spec.batch // batch.size)
        input_axes[0] = batch.name
    if channels is not None:
        part = part.replace(groups=spec.groups // channels.size)
        input_axes[spec.channel_axis] = kernel_axes[3] = channels.name
    if part == spec:
        return convolve(spec, choice, inputs, kernel)
    function = functools.partial(convolve, part, choice)
    return backends.current().per_shard(function, inputs, kernel, input_axes, kernel_axes)
