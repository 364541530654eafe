"""ONNX files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.base import Format, Requirement, Runner, keras_version, with_version


class Onnx(Format):
    """Run by onnxruntime where it is installed, else by ONNX's own evaluator."""

    name = "onnx"
    suffix = ".onnx"
    depthwise_op = "Conv with group == channels"

    def requirements(self) -> list[Requirement]:
        backend = keras.backend.backend()
        extra = '"diagconv_tf[onnx]"'
        needed = [Requirement("onnx", extra)]
        if backend == "jax" and keras_version() >= (3, 14):
            needed.append(Requirement("jax2onnx", "jax2onnx"))
        elif backend in ("tensorflow", "jax"):
            needed += [Requirement("tensorflow", "tensorflow"), Requirement("tf2onnx", extra)]
        return needed

    def write(self, model: keras.Model, path: str, options: dict[str, Any]) -> None:
        with _mended_conversion():
            model.export(path, format=self.name, verbose=False, **options)

    def count_depthwise(self, path: str) -> int | None:
        import onnx

        model = onnx.shape_inference.infer_shapes(onnx.load(path))
        graph = model.graph
        kernels = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        for value in graph.value_info:
            kernels[value.name] = [d.dim_value for d in value.type.tensor_type.shape.dim]
        # A kernel is (outputs, inputs per group, height, width).
        return sum(
            node.op_type == "Conv" and kernels.get(node.input[1], [0, 0])[1] == 1
            for node in graph.node
        )

    def load(self, path: str) -> tuple[Runner, str]:
        import onnx

        # The same names as inputs, which the runtimes keep in the given order.
        wanted = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
        if Requirement("onnxruntime", "").is_installed:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # Errors; it warns of what it optimises.
            execute = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            ).run
            runtime = with_version("onnxruntime")
        else:
            from onnx.reference import ReferenceEvaluator

            execute = ReferenceEvaluator(path).run
            runtime = f"{with_version('onnx')}'s reference evaluator"

        def run(inputs: Any, names: Sequence[str] | None) -> list[np.ndarray]:
            if names is None or set(names) != set(wanted):
                names = wanted
            return execute(None, dict(zip(names, keras.tree.flatten(inputs), strict=True)))

        return run, runtime


@contextlib.contextmanager
def _mended_conversion() -> Iterator[None]:
    """On TensorFlow, mends what Keras and tf2onnx get wrong without an error.

    - Keras puts every grouped convolution into a function for XLA. tf2onnx does
      not look inside, and writes a call that no runtime knows.
    - Tensors that a layer holds (the mean of `Normalization`, as in
      EfficientNet) become inputs of the file.
    - `Erfc` (the exact `gelu`, as in ConvNeXt) is copied as it is.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf
    import tf2onnx
    from tf2onnx import convert

    def from_function(function, input_signature, *, output_path, **arguments):
        handlers = {"Erfc": (_convert_erfc, [])}
        model, _ = original(function, input_signature, custom_op_handlers=handlers, **arguments)
        captures = function.get_concrete_function(*input_signature).graph.captures
        _bind(model.graph, {inside.name: outside for outside, inside in captures})
        tf2onnx.utils.save_protobuf(output_path, model)

    original = convert.from_function
    before = tf.config.functions_run_eagerly()
    convert.from_function = from_function
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
        convert.from_function = original


def _bind(graph: Any, values: dict[str, Any]) -> None:
    """Gives the inputs of a graph that are among `values` their value for good."""
    from onnx import numpy_helper

    bound = [value for value in graph.input if value.name in values]
    for value in bound:
        array = values[value.name].numpy()
        graph.initializer.append(numpy_helper.from_array(array, value.name))
        graph.input.remove(value)


def _convert_erfc(context: Any, node: Any, name: str, arguments: list) -> None:
    """`erfc(x)` as `1 - erf(x)`, in tf2onnx's terms."""
    from tf2onnx import utils

    output = node.output[0]
    dtype, shape = context.get_dtype(output), context.get_shape(output)
    one = np.ones((), utils.map_onnx_to_numpy_type(dtype))
    one = context.make_const(utils.make_name("one"), one).output[0]
    erf = context.make_node("Erf", list(node.input), shapes=[shape], dtypes=[dtype]).output[0]
    context.remove_node(node.name)
    context.make_node("Sub", [one, erf], outputs=[output], shapes=[shape], dtypes=[dtype])
