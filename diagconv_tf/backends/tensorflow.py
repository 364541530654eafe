"""TensorFlow: `tf.nn`'s convolutions, their transposes, `tf.custom_gradient`."""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import tensorflow as tf

from diagconv_tf import keras_internals
from diagconv_tf.spec import ConvSpec, Pass

if TYPE_CHECKING:
    from diagconv_tf.backends import Passes


#: Whether this thread traces graphs of which nobody takes gradients, as for export. What
#: guards the gradients of empty batches is left out: converters do not know its branches.
is_for_inference = contextvars.ContextVar("is_for_inference", default=False)


def default_device() -> tuple[str, str]:
    gpus = tf.config.list_logical_devices("GPU")
    if not gpus:
        return "cpu", ""
    physical = tf.config.list_physical_devices("GPU")[0]
    return "gpu", tf.config.experimental.get_device_details(physical).get("device_name", "")


def numeric_mode() -> tuple[tuple[str, str], ...]:
    if default_device()[0] == "cpu":
        return ()
    return (("tf32", str(tf.config.experimental.tensor_float_32_execution_enabled())),)


def preferred_data_format(data_format: str) -> str:
    # On the CPU most of TensorFlow's convolution kernels know channels-last
    # only (Keras transposes there too).
    return data_format if default_device()[0] == "gpu" else "channels_last"


def forward(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    stride = math.gcd(*spec.strides)
    dilated = max(spec.dilation_rate) > 1
    if dilated and max(spec.strides) > 1:
        # `tf.nn` refuses strides with dilation.
        return _forward_then_subsample(spec, inputs, kernel, stride=1)
    if spec.is_depthwise and spec.strides != (stride, stride):
        # The depthwise op takes one stride for both axes.
        return _forward_then_subsample(spec, inputs, kernel, stride)
    if spec.is_depthwise:
        return _depthwise_conv2d(spec, inputs, kernel)
    if spec.groups > 1 and not _has_grouped_gradients(spec.compute_dtype):
        return _compiled_conv2d(spec, inputs, kernel)
    return _conv2d(spec, inputs, kernel)


def input_gradient(spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
    # The value of the zeros is never read: a graph drops this forward pass.
    inputs = tf.zeros(input_shape, kernel.dtype)
    return _transpose(lambda x: forward(spec, x, kernel), inputs, output_gradient)


def kernel_gradient(spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
    kernel = tf.zeros(spec.kernel_shape, inputs.dtype)
    return _transpose(lambda k: forward(spec, inputs, k), kernel, output_gradient)


def with_images(
    function: Callable[..., Any], empty_shape: Callable[[], tuple], inputs: Any, *others: Any
) -> Any:
    """As `backends.Backend` says.

    On a CPU some kernels of TensorFlow 2.21 do wrong with an empty batch. oneDNN's
    convolutions return the shape of their inputs, `Conv2DBackpropFilter` fails ('Missing
    1-th output'), and the depthwise op's kernel gradient is uninitialized memory. XLA knows
    the batch and has no such kernels.
    """
    images = _number_of_images(inputs)
    if images is None:
        return function(inputs, *others)

    def without_images() -> Any:
        # Depends on every operand, so that their gradients are zero and not None.
        nothing = tf.add_n([tf.reduce_sum(operand[:0]) for operand in (inputs, *others)])
        return tf.zeros(empty_shape(), inputs.dtype) + nothing

    return tf.cond(images > 0, lambda: function(inputs, *others), without_images)


def differentiable(passes: Passes, inputs: Any, kernel: Any) -> Any:
    return _run_pass(passes, "forward", inputs, kernel)


def _run_pass(passes: Passes, name: Pass, first: Any, second: Any, *sizes: Any) -> Any:
    """One of `passes`, with the other two as its derivatives.

    A graph calls it as a function, instead of holding its operations once per layer:
    TensorFlow takes a millisecond to trace an operation, and a network has the same
    convolution many times. XLA inlines all calls.

    Args:
        passes: the passes.
        name: the pass to run.
        first: its first tensor.
        second: its second tensor.
        *sizes: the other arguments of the pass, which have no gradients.
    """
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly():

        def run_and_vjp(first: Any, second: Any) -> tuple:
            result = getattr(passes, name)(first, second, *sizes)
            return result, functools.partial(_vjp, passes, name, first, second)

        return tf.custom_gradient(run_and_vjp)(first, second)
    if not graph.building_function:
        return _run_in_graph(passes, name, first, second, *sizes)
    # An attribute of the graph, so that they live no longer than it.
    functions = getattr(graph, "_diagconv_tf_functions", None)
    if functions is None:
        functions = graph._diagconv_tf_functions = {}
    # One for each context, because `compiled_for` is asked inside.
    key = (passes, name, keras_internals.is_traced_for_xla(graph))
    if key not in functions:
        run = functools.partial(_run_in_graph, passes, name)
        functions[key] = tf.function(run, autograph=False)
    return functions[key](first, second, *sizes)


def _run_in_graph(passes: Passes, name: Pass, first: Any, second: Any, *sizes: Any) -> Any:
    """A pass, followed by an operation that carries the name of its gradient."""
    result = getattr(passes, name)(first, second, *sizes)
    graph = tf.compat.v1.get_default_graph()
    gradient = _RegisteredGradient.take(passes, name)
    with graph.gradient_override_map({"IdentityN": gradient.name}):
        outputs = tf.identity_n([result, first, second])
    gradient.operation = weakref.ref(outputs[0].op)
    weakref.finalize(graph, gradient.give_back)
    return outputs[0]


class _RegisteredGradient:
    """The gradient of a pass under a name by which the operations of graphs refer to it.

    `tf.custom_gradient` registers a new gradient for every call in a graph, and for good,
    with the tensors, and so the graph, that the gradient is made of. This one holds no
    tensors, and its name is used again once the graph is gone. A graph needs a name of its
    own because a SavedModel with gradients stores one for each name.
    """

    _free: ClassVar[dict[tuple, list[_RegisteredGradient]]] = {}
    _counter = itertools.count()

    def __init__(self, passes: Passes, pass_name: Pass) -> None:
        self._passes, self._pass_name = passes, pass_name
        self.name = f"diagconv_tf_{pass_name}_{next(self._counter)}"
        self.operation: Callable[[], Any] = lambda: None
        tf.RegisterGradient(self.name)(self._gradient)

    @classmethod
    def take(cls, passes: Passes, pass_name: Pass) -> _RegisteredGradient:
        """One that no living graph uses."""
        try:
            return cls._free.setdefault((passes, pass_name), []).pop()
        except IndexError:  # A check before could race with another thread.
            return cls(passes, pass_name)

    def give_back(self) -> None:
        self._free[self._passes, self._pass_name].append(self)

    @tf.autograph.experimental.do_not_convert
    def _gradient(self, operation: Any, g: Any, *_: Any) -> tuple:
        # A SavedModel's writer names no operation.
        operation = self.operation() if operation is None else operation
        _, first, second = operation.inputs
        return None, *_vjp(self._passes, self._pass_name, first, second, g)


def _vjp(passes: Passes, name: Pass, first: Any, second: Any, g: Any) -> tuple:
    """The derivatives of a pass by its two tensors, for the gradient `g` of its result."""
    if name == "forward":
        return (
            _run_pass(passes, "input_gradient", g, second, _shape(first)),
            _run_pass(passes, "kernel_gradient", first, g),
        )
    if name == "input_gradient":
        return (
            _run_pass(passes, "forward", g, second),
            _run_pass(passes, "kernel_gradient", g, first),
        )
    return (
        _run_pass(passes, "input_gradient", second, g, _shape(first)),
        _run_pass(passes, "forward", first, g),
    )


def stock_operands(inputs: Any, kernel: Any, stock_op: str) -> tuple[Any, Any]:
    return inputs, kernel


def split(tensor: Any, sizes: list[int], axis: int) -> list[Any]:
    return tf.split(tensor, sizes, axis)


def pad(tensor: Any, widths: list) -> Any:
    return tf.pad(tensor, widths)


def interior_pad(values: Any, axes: tuple, strides: Sequence, offsets: tuple) -> Any:
    for axis, stride, offset in zip(axes, strides, offsets, strict=True):
        shape = list(_shape(values))
        padding = [[0, 0]] * (len(shape) + 1)
        padding[axis + 1] = [offset, stride - 1 - offset]
        shape[axis] *= stride
        values = tf.reshape(tf.pad(tf.expand_dims(values, axis + 1), padding), shape)
    return values


def compiled_for(tensor: Any) -> str | None:
    # The only way to learn it while a function is traced.
    in_xla = keras_internals.is_traced_for_xla(tf.compat.v1.get_default_graph())
    return default_device()[0] if in_xla else None


def gather(tensor: Any, indices: np.ndarray, axis: int) -> Any:
    return tf.gather(tensor, indices, axis=axis)


def sums_in_one_loop(tensors: list[Any], axes: tuple[int, ...]) -> list[Any]:
    dtype = tensors[0].dtype
    scalars = [tf.TensorSpec((), dtype)] * (2 * len(tensors))

    @tf.function(autograph=False)
    def add(*totals_and_terms: Any) -> list[Any]:
        totals, terms = totals_and_terms[: len(tensors)], totals_and_terms[len(tensors) :]
        return [total + term for total, term in zip(totals, terms, strict=True)]

    return keras_internals.xla_variadic_reduce()(
        tensors,
        [tf.zeros((), dtype)] * len(tensors),
        dimensions_to_reduce=axes,
        reducer=add.get_concrete_function(*scalars),
    )


def keep_apart(tensors: list[Any]) -> list[Any]:
    return keras_internals.xla_optimization_barrier()(*tensors)


def make_complex(real: Any, imaginary: Any) -> Any:
    return tf.complex(real, imaginary)


def _number_of_images(inputs: Any) -> Any:
    """A scalar tensor where `inputs` may be an empty batch on a CPU; None elsewhere."""
    if is_for_inference.get() or inputs.shape[0]:
        return None
    if default_device()[0] != "cpu" or compiled_for(inputs) is not None:
        return None
    return tf.shape(inputs)[0]


def _depthwise_conv2d(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    kernel = tf.reshape(kernel, (*spec.kernel_size, spec.groups, spec.output_channels_per_group))
    return tf.nn.depthwise_conv2d(
        inputs,
        kernel,
        strides=_four(spec, spec.strides),
        padding=spec.padding.upper(),
        data_format=_layout(spec),
        dilations=spec.dilation_rate,
    )


def _conv2d(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    # Not `tf.nn.conv2d`: on the CPU it has no gradients where the kernel is
    # dilated; this one moves the gaps into the batch axis.
    return tf.nn.convolution(
        inputs,
        kernel,
        strides=spec.strides,
        padding=spec.padding.upper(),
        data_format=_layout(spec),
        dilations=spec.dilation_rate,
    )


def _forward_then_subsample(spec: ConvSpec, inputs: Any, kernel: Any, stride: int) -> Any:
    """Pads as `spec` says, runs with `stride`, and drops the outputs in between."""
    vertical, horizontal = spec.spatial_axes
    shape = _shape(inputs)
    padding: list[Any] = [[0, 0]] * 4
    padding[vertical], padding[horizontal] = spec.padding_for((shape[vertical], shape[horizontal]))
    if spec.padding == "same":
        inputs = tf.pad(inputs, padding)
    dense = spec.replace(height=None, width=None, padding="valid", strides=(stride, stride))
    outputs = forward(dense, inputs, kernel)
    steps = [slice(None)] * 4
    steps[vertical] = slice(None, None, spec.strides[0] // stride)
    steps[horizontal] = slice(None, None, spec.strides[1] // stride)
    return outputs[tuple(steps)]


@functools.partial(tf.function, jit_compile=True)
def _compiled_conv2d(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    return _conv2d(spec, inputs, kernel)


@functools.cache
def _has_grouped_gradients(dtype: str) -> bool:
    """Whether the gradients of a grouped `Conv2D` run here without XLA.

    On the CPU only oneDNN has them, where it is switched on, and not for every
    dtype. Keras compiles every grouped convolution with XLA instead, which is
    slower (measured on a CPU, float32: 40 times).
    """
    if default_device()[0] == "gpu":
        return True
    # A small trial, outside any graph or tape.
    with tf.init_scope():
        try:
            tf.raw_ops.Conv2DBackpropInput(
                input_sizes=(1, 4, 4, 4),
                filter=tf.ones((3, 3, 2, 4), dtype),
                out_backprop=tf.ones((1, 2, 2, 4), dtype),
                strides=(1, 1, 1, 1),
                padding="VALID",
            )
        except tf.errors.OpError:
            return False
    return True


def _transpose(function: Callable, argument: Any, cotangent: Any) -> Any:
    """The transpose of the linear `function`, applied to `cotangent`."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(argument)
        result = function(argument)
    return tape.gradient(result, argument, cotangent)


def _shape(tensor: Any) -> tuple:
    """Sizes of `tensor`: ints where known, else scalar tensors."""
    dynamic = tf.shape(tensor)
    return tuple(dynamic[i] if n is None else n for i, n in enumerate(tensor.shape))


def _layout(spec: ConvSpec) -> str:
    return "NHWC" if spec.data_format == "channels_last" else "NCHW"


def _four(spec: ConvSpec, two: tuple[int, int]) -> tuple[int, int, int, int]:
    return (1, *two, 1) if spec.data_format == "channels_last" else (1, 1, *two)
