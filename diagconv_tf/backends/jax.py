"""JAX: `lax.conv_general_dilated`, its transposes, and `jax.custom_vjp`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from diagconv_tf import keras_internals
from diagconv_tf.spec import ConvSpec


def default_device() -> tuple[str, str]:
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.platform, "" if device.platform == "cpu" else device.device_kind


def numeric_mode() -> tuple[tuple[str, str], ...]:
    if default_device()[0] == "cpu":
        return ()
    return (("matmul_precision", str(jax.config.jax_default_matmul_precision or "default")),)


def preferred_data_format(data_format: str) -> str:
    return data_format


def forward(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    layout = "NHWC" if spec.data_format == "channels_last" else "NCHW"
    return lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides=spec.strides,
        padding=spec.padding.upper(),
        rhs_dilation=spec.dilation_rate,
        dimension_numbers=(layout, "HWIO", layout),
        feature_group_count=spec.groups,
    )


def input_gradient(spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
    inputs = jax.ShapeDtypeStruct(input_shape, kernel.dtype)
    transpose = jax.linear_transpose(lambda x: forward(spec, x, kernel), inputs)
    return transpose(output_gradient)[0]


def kernel_gradient(spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
    kernel = jax.ShapeDtypeStruct(spec.kernel_shape, inputs.dtype)
    transpose = jax.linear_transpose(lambda k: forward(spec, inputs, k), kernel)
    return transpose(output_gradient)[0]


def differentiable(passes: Any) -> Callable[[Any, Any], Any]:
    @jax.custom_vjp
    def forward_pass(inputs, kernel):
        return passes.forward(inputs, kernel)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def input_gradient_pass(output_gradient, kernel, input_shape):
        return passes.input_gradient(output_gradient, kernel, input_shape)

    @jax.custom_vjp
    def kernel_gradient_pass(inputs, output_gradient):
        return passes.kernel_gradient(inputs, output_gradient)

    def forward_vjp(residuals, g):
        inputs, kernel = residuals
        return input_gradient_pass(g, kernel, inputs.shape), kernel_gradient_pass(inputs, g)

    def input_gradient_vjp(_, residuals, g):
        output_gradient, kernel = residuals
        return forward_pass(g, kernel), kernel_gradient_pass(g, output_gradient)

    def kernel_gradient_vjp(residuals, g):
        inputs, output_gradient = residuals
        return input_gradient_pass(output_gradient, g, inputs.shape), forward_pass(inputs, g)

    forward_pass.defvjp(lambda *args: (forward_pass(*args), args), forward_vjp)
    input_gradient_pass.defvjp(
        lambda g, kernel, shape: (input_gradient_pass(g, kernel, shape), (g, kernel)),
        input_gradient_vjp,
    )
    kernel_gradient_pass.defvjp(
        lambda *args: (kernel_gradient_pass(*args), args), kernel_gradient_vjp
    )
    return forward_pass


def interior_pad(values: Any, axes: tuple, strides: tuple, offsets: tuple) -> Any:
    padding = [(0, 0, 0)] * values.ndim
    for axis, stride, offset in zip(axes, strides, offsets, strict=True):
        padding[axis] = (offset, stride - 1 - offset, stride - 1)
    return lax.pad(values, jnp.zeros((), values.dtype), padding)


def is_compiled_for_cpu() -> bool:
    # Loops are compiled even where no function around them is.
    return default_device()[0] == "cpu"


def is_partitioned(tensor: Any) -> bool:
    """Whether `tensor` is of a program that will be divided among devices as a whole."""
    # Inside somebody's own `shard_map` a tensor is one device's part already.
    if not keras_internals.is_traced_by_jax(tensor):
        return False
    return not jax.sharding.get_abstract_mesh().manual_axes


def per_shard(
    function: Callable[[Any, Any], Any],
    inputs: Any,
    kernel: Any,
    input_axes: Sequence[str | None],
    kernel_axes: Sequence[str | None],
) -> Any:
    """`function(inputs, kernel)`, by each device for its parts of both.

    Args:
        function: returns a tensor divided as its inputs are.
        inputs: tensor.
        kernel: tensor.
        input_axes: for each axis of `inputs`, the mesh axis along which it is
            divided, or None.
        kernel_axes: the same for `kernel`.
    """
    names = {name for name in (*input_axes, *kernel_axes) if name is not None}
    return jax.shard_map(
        function,
        mesh=keras.distribution.distribution().device_mesh.backend_mesh,
        in_specs=(PartitionSpec(*input_axes), PartitionSpec(*kernel_axes)),
        out_specs=PartitionSpec(*input_axes),
        axis_names=names,
        # It would ask of every tensor made inside on which devices it differs.
        check_vma=False,
    )(inputs, kernel)


def replicated(tensor: Any, axis: int) -> Any:
    """`tensor` and its gradient, of which every device has all along `axis`."""
    axes: list[Any] = [PartitionSpec.UNCONSTRAINED] * tensor.ndim
    axes[axis] = None
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    return lax.with_sharding_constraint(tensor, NamedSharding(mesh, PartitionSpec(*axes)))


class ProcessStore:
    """The key-value store of the coordination service, as `backends.ProcessStore`."""

    def __init__(self) -> None:
        # JAX has no public way to it; its collective operations time out.
        self._client = keras_internals.jax_coordination_client()

    def put(self, key: str, text: str) -> None:
        self._client.key_value_set(key, text)

    def get(self, key: str, seconds: float) -> str | None:
        try:
            return self._client.blocking_key_value_get(key, int(1e3 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise


def process_store() -> ProcessStore:
    return ProcessStore()
