"""ONNX files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.base import Format, Requirement, Runner, keras_version, with_version
from diagconv_tf.exporting.integer import Program
from diagconv_tf.exporting.sample_inputs import SampleInputs
from diagconv_tf.exporting.tensors import match


class Onnx(Format):
    """Run by onnxruntime where it is installed, else by ONNX's own evaluator."""

    name = "onnx"
    suffix = ".onnx"
    depthwise_op = "Conv with group == channels"
    # It is a `Conv` of one group, like any other.
    counts_one_channel = False
    holds_integers = True

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

    def write_integers(self, program: Program, path: str, options: dict[str, Any]) -> None:
        from diagconv_tf.exporting.integer.onnx_graph import write_onnx

        write_onnx(program, path, options, self.write)

    def count_depthwise(self, path: str) -> int | None:
        import onnx
        from onnx import inliner, shape_inference

        model = onnx.load(path)
        if model.functions:
            model = inliner.inline_local_functions(model)
        # With data propagation, kernels that the graph computes have a shape too.
        return _count_depthwise(shape_inference.infer_shapes(model, data_prop=True).graph, {})

    def count_integers(self, path: str) -> int:
        import onnx

        if not _has_onnxruntime():
            return _count_integers(onnx.load(path).graph)
        # Its optimizer makes integer operations of groups.
        with tempfile.TemporaryDirectory() as folder:
            optimized = os.path.join(folder, "optimized.onnx")
            _session(path, optimized)
            return _count_integers(onnx.load(optimized).graph)

    def load(self, path: str) -> tuple[Runner, str]:
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        names = [value.name for value in graph.output]
        execute, runtime = _executor(path)

        def run(inputs: SampleInputs) -> list[tuple[str, np.ndarray]]:
            return list(zip(names, execute(None, _feed(graph, inputs)), strict=True))

        return run, runtime

    def caller(self, path: str, inputs: SampleInputs) -> Callable[[], Any]:
        import onnx

        feed = _feed(onnx.load(path, load_external_data=False).graph, inputs)
        execute, _ = _executor(path)
        return lambda: execute(None, feed)


def _executor(path: str) -> tuple[Callable[..., list], str]:
    """A function of output names and inputs that runs a file, and what runs it."""
    if _has_onnxruntime():
        return _session(path).run, with_version("onnxruntime")
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(path).run, f"{with_version('onnx')}'s reference evaluator"


def _feed(graph: Any, inputs: SampleInputs) -> dict[str, np.ndarray]:
    names = [value.name for value in graph.input]
    matched = match(names, inputs.leaves)
    return {name: leaf.value for name, leaf in zip(names, matched, strict=True)}


def _has_onnxruntime() -> bool:
    return Requirement("onnxruntime", "").is_installed


def _session(path: str, optimized: str | None = None) -> Any:
    """A session of onnxruntime for a file, on the CPU.

    Args:
        path: the file.
        optimized: where to write the graph that it runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors; it warns of what it optimises.
    if optimized is not None:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


#: Operations of integers, in files and in what onnxruntime makes of them.
_INTEGER_OPERATIONS = {
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}


def _count_integers(graph: Any) -> int:
    """How many operations multiply integers, or are such a group: see `onnx_graph.py`."""
    makers = {name: node.op_type for node in graph.node for name in node.output}
    grouped = ("Conv", "MatMul")
    # Without onnxruntime, groups are as they were written.
    return sum(
        node.op_type in _INTEGER_OPERATIONS
        or (
            node.op_type in grouped
            and not _has_onnxruntime()
            and {makers.get(name) for name in node.input[:2]} == {"DequantizeLinear"}
        )
        for node in graph.node
    )


def _count_depthwise(graph: Any, outer_shapes: Mapping[str, list[int]]) -> int:
    """How many `Conv` have more than one group, and as many as input channels.

    Args:
        graph: counted with the bodies of its loops and branches, each once.
        outer_shapes: of the tensors around it; 0 is a size that is not known.
    """
    shapes = {**outer_shapes, **{tensor.name: list(tensor.dims) for tensor in graph.initializer}}
    for value in (*graph.input, *graph.value_info):
        shapes[value.name] = [size.dim_value for size in value.type.tensor_type.shape.dim]
    count = 0
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type in ("Conv", "ConvInteger") and "group" in attributes:
            groups = attributes["group"].i
            # Inputs are (examples, channels, …), kernels (outputs, channels per group, …).
            channels, per_group = (shapes.get(name, [])[1:2] for name in node.input[:2])
            count += groups > 1 and (per_group == [1] or channels == [groups])
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                count += _count_depthwise(body, shapes)
    return count


@contextlib.contextmanager
def _mended_conversion() -> Iterator[None]:
    """On TensorFlow, mends what Keras and tf2onnx get wrong without an error.

    - Keras puts every grouped convolution into a function for XLA
      (`keras/src/backend/tensorflow/nn.py`, `_conv_xla`). tf2onnx does not look
      inside, and writes a call that no runtime knows. So functions run eagerly: they
      are inlined.
    - Tensors that a layer holds (the mean of `Normalization`, as in EfficientNet)
      become inputs of the file.
    - `Erfc` (the exact `gelu`, as in ConvNeXt) is copied as it is.

    The switch for eager functions belongs to the process. Other threads compute the
    same in the meantime, but slowly. `export` admits one thread at a time.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf
    import tf2onnx
    from tf2onnx import convert

    thread = threading.get_ident()

    def from_function(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        return mended(*args, **kwargs)

    def mended(function: Any, input_signature: Any, *, output_path: str, **arguments: Any) -> None:
        handlers: dict[str, Any] = {"Erfc": (_convert_erfc, [])}
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
    """Makes constants of the inputs of a graph that are among `values`."""
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
