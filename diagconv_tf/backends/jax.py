"""JAX: `lax.conv_general_dilated`, its transposes, and `jax.custom_vjp`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diagconv_tf.spec import ConvSpec


def default_device() -> tuple[str, str]:
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        return device, device
    return device.platform, "" if device.platform == "cpu" else device.device_kind


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


def interleave_zeros(values: Any, axes: tuple[int, int], strides: tuple) -> Any:
    padding = [(0, 0, 0)] * values.ndim
    for axis, stride in zip(axes, strides, strict=True):
        padding[axis] = (0, 0, stride - 1)
    return lax.pad(values, jnp.zeros((), values.dtype), padding)


def sum_over_images(function: Callable, inputs: Any, outputs: Any) -> list[Any]:
    if default_device()[0] != "cpu":
        return function(inputs, outputs)
    # XLA:CPU does not vectorise a reduction over batch and space; adding whole
    # images into an accumulator it does (measured: 2 to 14 times faster).
    first = jax.eval_shape(function, inputs[:1], outputs[:1])
    zeros = [jnp.zeros(product.shape, product.dtype) for product in first]

    def add_image(totals, images):
        products = function(*(image[None] for image in images))
        return [t + p for t, p in zip(totals, products, strict=True)], None

    return lax.scan(add_image, zeros, (inputs, outputs))[0]
