"""JAX: `lax.conv_general_dilated`, its transposes, and `jax.custom_vjp`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from diagconv_tf import keras_internals
from diagconv_tf.spec import ConvSpec

if TYPE_CHECKING:
    from diagconv_tf.backends import Passes


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


def with_images(
    function: Callable[..., Any], empty_shape: Callable[[], tuple], inputs: Any, *others: Any
) -> Any:
    # A batch of 0 is like any other here.
    return function(inputs, *others)


def differentiable(passes: Passes, inputs: Any, kernel: Any) -> Any:
    return _forward_pass(inputs, kernel, passes)


# The passes are values and arguments, so that JAX meets the same function on every
# call and nothing has to keep one.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _forward_pass(inputs: Any, kernel: Any, passes: Passes) -> Any:
    return passes.forward(inputs, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _input_gradient_pass(
    output_gradient: Any, kernel: Any, passes: Passes, input_shape: tuple
) -> Any:
    return passes.input_gradient(output_gradient, kernel, input_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient_pass(inputs: Any, output_gradient: Any, passes: Passes) -> Any:
    return passes.kernel_gradient(inputs, output_gradient)


def _forward_vjp(passes: Passes, residuals: tuple, g: Any) -> tuple:
    inputs, kernel = residuals
    return (
        _input_gradient_pass(g, kernel, passes, inputs.shape),
        _kernel_gradient_pass(inputs, g, passes),
    )


def _input_gradient_vjp(passes: Passes, _: tuple, residuals: tuple, g: Any) -> tuple:
    output_gradient, kernel = residuals
    return _forward_pass(g, kernel, passes), _kernel_gradient_pass(g, output_gradient, passes)


def _kernel_gradient_vjp(passes: Passes, residuals: tuple, g: Any) -> tuple:
    inputs, output_gradient = residuals
    return (
        _input_gradient_pass(output_gradient, g, passes, inputs.shape),
        _forward_pass(inputs, g, passes),
    )


def _with_residuals(function: Callable[..., Any]) -> Callable[..., tuple]:
    return lambda first, second, *rest: (function(first, second, *rest), (first, second))


_forward_pass.defvjp(_with_residuals(_forward_pass), _forward_vjp)
_input_gradient_pass.defvjp(_with_residuals(_input_gradient_pass), _input_gradient_vjp)
_kernel_gradient_pass.defvjp(_with_residuals(_kernel_gradient_pass), _kernel_gradient_vjp)


def stock_operands(inputs: Any, kernel: Any, stock_op: str) -> tuple[Any, Any]:
    # `keras.ops.conv` casts the inputs; `keras.ops.depthwise_conv` does not.
    return (inputs.astype(kernel.dtype) if stock_op == "conv" else inputs), kernel


def split(tensor: Any, sizes: list[int], axis: int) -> list[Any]:
    return list(lax.split(tensor, sizes, axis))


def pad(tensor: Any, widths: list) -> Any:
    return jnp.pad(tensor, widths)


def interior_pad(values: Any, axes: tuple, strides: Sequence, offsets: tuple) -> Any:
    padding = [(0, 0, 0)] * values.ndim
    for axis, stride, offset in zip(axes, strides, offsets, strict=True):
        padding[axis] = (offset, stride - 1 - offset, stride - 1)
    return lax.pad(values, jnp.zeros((), values.dtype), padding)


def compiled_for(tensor: Any) -> str | None:
    kind = default_device()[0]
    # On a CPU loops are all that matters, and they are compiled in any case.
    return kind if kind == "cpu" or keras_internals.is_traced_by_jax(tensor) else None


def gather(tensor: Any, indices: np.ndarray, axis: int) -> Any:
    index = (slice(None),) * axis + (indices,)
    return tensor.at[index].get(mode="promise_in_bounds")


def sums_in_one_loop(tensors: list[Any], axes: tuple[int, ...]) -> list[Any]:
    zero = jnp.zeros((), tensors[0].dtype)

    def add(totals: tuple, terms: tuple) -> tuple:
        return tuple(total + term for total, term in zip(totals, terms, strict=True))

    return list(lax.reduce(tuple(tensors), (zero,) * len(tensors), add, axes))


def keep_apart(tensors: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tensors))


def make_complex(real: Any, imaginary: Any) -> Any:
    return lax.complex(real, imaginary)


def is_partitioned(tensor: Any) -> bool:
    """Whether `tensor` belongs to a program that will be sharded over devices as a whole."""
    # Inside a caller's `shard_map` a tensor is one device's shard already.
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
    """Runs `function(inputs, kernel)` on each device's shards of both.

    Args:
        function: returns a tensor sharded as its inputs are.
        inputs: tensor.
        kernel: tensor.
        input_axes: for each axis of `inputs`, the mesh axis along which it is
            sharded, or None.
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
    """`tensor`; it and its gradient are replicated along `axis`."""
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
