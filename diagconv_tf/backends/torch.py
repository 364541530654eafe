"""PyTorch: `conv2d`, `torch.nn.grad`, and `torch.autograd.Function`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import torch
from torch.nn import functional, grad

from diagconv_tf.spec import ConvSpec

if TYPE_CHECKING:
    from diagconv_tf.backends import Passes


def default_device() -> tuple[str, str]:
    # Keras's own function for it is private, and has moved between releases.
    device = keras.ops.zeros(()).device
    if device.type == "cuda":
        return "gpu", torch.cuda.get_device_name(device)
    return device.type, ""


def numeric_mode() -> tuple[tuple[str, str], ...]:
    if default_device()[0] != "gpu":
        return ()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        # Where these are set, PyTorch refuses to read the switches of old.
        tf32 = [part.fp32_precision == "tf32" for part in (cudnn.conv, matmul)]
    else:
        tf32 = [part.allow_tf32 for part in (cudnn, matmul)]
    return (
        ("cudnn.benchmark", str(cudnn.benchmark)),
        ("cudnn.tf32", str(tf32[0])),
        ("matmul.tf32", str(tf32[1])),
    )


def preferred_data_format(data_format: str) -> str:
    # PyTorch's convolutions take channels-first shapes only; Keras's
    # channels-last tensors become such by a permuted view, which keeps the
    # memory as it is.
    return "channels_first"


def forward(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    spec, inputs = _without_unread(spec, inputs)
    inputs, padding = _pad(spec, inputs)
    return functional.conv2d(
        inputs, _to_oihw(kernel, inputs), padding=padding, **_window_arguments(spec)
    )


def input_gradient(spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
    (top, bottom), (left, right) = spec.padding_for(tuple(input_shape[2:]))
    batch, channels, height, width = input_shape
    padded = grad.conv2d_input(
        (batch, channels, height + top + bottom, width + left + right),
        _to_oihw(kernel, output_gradient),
        output_gradient,
        **_window_arguments(spec),
    )
    return padded[:, :, top : top + height, left : left + width]


def kernel_gradient(spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
    spec, inputs = _without_unread(spec, inputs)
    inputs, padding = _pad(spec, inputs)
    kh, kw, per_group, outputs = spec.kernel_shape
    gradient = grad.conv2d_weight(
        inputs,
        (outputs, per_group, kh, kw),
        output_gradient,
        padding=padding,
        **_window_arguments(spec),
    )
    return gradient.permute(2, 3, 1, 0)


def with_images(
    function: Callable[..., Any], empty_shape: Callable[[], tuple], inputs: Any, *others: Any
) -> Any:
    # A batch of 0 is like any other here.
    return function(inputs, *others)


def differentiable(passes: Passes, inputs: Any, kernel: Any) -> Any:
    if torch.jit.is_tracing():
        # A traced graph can hold no Python function; it is differentiated operation
        # by operation.
        return passes.forward(inputs, kernel)
    return _Forward.apply(inputs, kernel, passes)


class _Pass(torch.autograd.Function):
    """One of the three passes as a function that every transform of PyTorch takes.

    `torch.func` needs `setup_context` and a rule for `vmap`. Compilers need classes
    that exist before they trace; so the passes are an argument.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(context: Any, inputs: tuple, output: Any) -> None:
        first, second, context.passes, *_ = inputs
        context.save_for_backward(first, second)


class _Forward(_Pass):
    @staticmethod
    def forward(inputs, kernel, passes):
        return passes.forward(inputs, kernel)

    @staticmethod
    def backward(context, g):
        inputs, kernel = context.saved_tensors
        passes, wanted = context.passes, context.needs_input_grad
        return (
            _InputGradient.apply(g, kernel, passes, tuple(inputs.shape)) if wanted[0] else None,
            _KernelGradient.apply(inputs, g, passes) if wanted[1] else None,
            None,
        )


class _InputGradient(_Pass):
    @staticmethod
    def forward(output_gradient, kernel, passes, input_shape):
        return passes.input_gradient(output_gradient, kernel, input_shape)

    @staticmethod
    def backward(context, g):
        output_gradient, kernel = context.saved_tensors
        passes, wanted = context.passes, context.needs_input_grad
        return (
            _Forward.apply(g, kernel, passes) if wanted[0] else None,
            _KernelGradient.apply(g, output_gradient, passes) if wanted[1] else None,
            None,
            None,
        )


class _KernelGradient(_Pass):
    @staticmethod
    def forward(inputs, output_gradient, passes):
        return passes.kernel_gradient(inputs, output_gradient)

    @staticmethod
    def backward(context, g):
        inputs, output_gradient = context.saved_tensors
        passes, wanted = context.passes, context.needs_input_grad
        shape = tuple(inputs.shape)
        return (
            _InputGradient.apply(output_gradient, g, passes, shape) if wanted[0] else None,
            _Forward.apply(inputs, g, passes) if wanted[1] else None,
            None,
        )


def stock_operands(inputs: Any, kernel: Any, stock_op: str) -> tuple[Any, Any]:
    """As `backends.Backend` says; inside `torch.autocast`, in its dtype.

    PyTorch casts there for its own convolutions alone. Here the operands of every
    lowering are cast before, so that all passes have one dtype, also where the
    backward pass runs outside.
    """
    device = inputs.device.type
    if not torch.is_autocast_enabled(device):
        return inputs, kernel
    dtype = torch.get_autocast_dtype(device)
    # As PyTorch: float64 and integers stay as they are.
    inputs, kernel = (
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (inputs, kernel)
    )
    return inputs, kernel


def split(tensor: Any, sizes: list[int], axis: int) -> list[Any]:
    return list(torch.split(tensor, sizes, axis))


def pad(tensor: Any, widths: list) -> Any:
    # PyTorch begins with the last axis.
    return functional.pad(tensor, [n for pair in reversed(widths) for n in pair])


def interior_pad(values: Any, axes: tuple, strides: Sequence, offsets: tuple) -> Any:
    shape = list(values.shape)
    steps = [slice(None)] * values.ndim
    for axis, stride, offset in zip(axes, strides, offsets, strict=True):
        shape[axis] *= stride
        steps[axis] = slice(offset, None, stride)
    zeros = values.new_zeros(shape)
    zeros[tuple(steps)] = values
    return zeros


def compiled_for(tensor: Any) -> str | None:
    return None  # PyTorch does not use XLA here.


def _window_arguments(spec: ConvSpec) -> dict[str, Any]:
    return {"stride": spec.strides, "dilation": spec.dilation_rate, "groups": spec.groups}


def _to_oihw(kernel: Any, like: Any) -> Any:
    kernel = kernel.permute(3, 2, 0, 1)
    # With one output channel both memory formats fit the permuted kernel, and
    # PyTorch 2.13 then refuses the kernel gradient of a single image on a CPU:
    # "slow_conv2d: grad_weight must be contiguous".
    one_output = kernel.shape[0] == 1
    if _is_channels_last(like) and not one_output:
        return kernel.contiguous(memory_format=torch.channels_last)
    return kernel.contiguous()


def _is_channels_last(tensor: Any) -> bool:
    try:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return False  # Inside `vmap` PyTorch cannot tell.


def _without_unread(spec: ConvSpec, inputs: Any) -> tuple[ConvSpec, Any]:
    """A strided 1x1 convolution without the inputs that it does not read, and without strides.

    PyTorch 2.13 on a CPU computes the kernel gradient of strided 1x1 kernels from
    memory that nobody has written, for some sizes and memory formats.
    """
    if spec.kernel_size != (1, 1) or spec.strides == (1, 1):
        return spec, inputs
    vertical, horizontal = spec.strides
    unstrided = spec.replace(height=None, width=None, strides=(1, 1))
    return unstrided, inputs[:, :, ::vertical, ::horizontal]


def _pad(spec: ConvSpec, inputs: Any) -> tuple[Any, tuple[int, int]]:
    (top, bottom), (left, right) = spec.padding_for(tuple(inputs.shape[2:]))
    if top == bottom and left == right:
        return inputs, (top, left)
    return functional.pad(inputs, (left, right, top, bottom)), (0, 0)
