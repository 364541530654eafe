"""Convolutions under a `keras.distribution`: every device computes its own part.

XLA's partitioner shards a program operation by operation. It shards a depthwise
convolution well. It does not see that a loop over rows, blocks of channels, or
grouped convolutions need no other device's images or channels, and gathers them
on every device. So the convolution is written for one device's images and, where
the kernel is sharded by channels, for one device's channels.
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
    """Every reason why devices cannot compute their own channels only; [] means they can.

    Otherwise the channels of the inputs are gathered on every device.

    Args:
        spec: the workload.
        lowering: as a layer's `lowering`.
        shards: number of devices over which the channels are sharded.

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
    """`convolve`, sharded over the devices of the current `keras.distribution`.

    Args:
        spec: the workload.
        choice: what `parse` made of a layer's `lowering`.
        inputs: tensor of `spec.input_shape`.
        kernel: tensor of `spec.kernel_shape`.
        channels: the mesh axis along which the kernel's output channels are
            sharded, or None.

    Returns:
        A tensor of `spec.output_shape` and the dtype of the inputs.
    """
    backend = backends.current()
    batch = distribution.batch_axis()
    if batch is None or not backend.is_partitioned(inputs):
        return convolve(spec, choice, inputs, kernel)
    if channels is not None and (channels.size == 1 or channels.name == batch.name):
        # XLA gathers weights that are stored sharded along the batch's own axis.
        channels = None
    if channels is not None and why_not_sharded(spec, choice, channels.size):
        # XLA must be told: its partitioner aborts on a convolution of 3 groups whose
        # channels are sharded over 2 devices (jaxlib 0.10.2).
        inputs = backend.replicated(inputs, spec.channel_axis)
        kernel = backend.replicated(kernel, 3)
        outputs = _convolve_parts(spec, choice, inputs, kernel, batch, None)
        return backend.replicated(outputs, spec.channel_axis)
    return _convolve_parts(spec, choice, inputs, kernel, batch, channels)


def _convolve_parts(
    spec: ConvSpec,
    choice: LoweringChoice,
    inputs: Any,
    kernel: Any,
    batch: MeshAxis,
    channels: MeshAxis | None,
) -> Any:
    """Runs `convolve` on each device's images and, with `channels`, on its channels."""
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
