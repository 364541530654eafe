"""TensorFlow SavedModels: a folder with the endpoint `serve`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.base import Format, Requirement, Runner, can_only_elsewhere
from diagconv_tf.exporting.sample_inputs import SampleInputs
from diagconv_tf.exporting.tensors import leaves
from diagconv_tf.tf32 import tf32_allowed


class SavedModel(Format):
    """On JAX the graph is one `XlaCallModule`: there are no ops to count."""

    name = "tf_saved_model"
    suffix = ""
    depthwise_op = "DepthwiseConv2dNative"

    def requirements(self) -> list[Requirement]:
        if keras.backend.backend() == "torch":
            raise can_only_elsewhere(self.name, "Keras refuses most models")
        return [Requirement("tensorflow", "tensorflow")]

    def write(self, model: keras.Model, path: str, options: dict[str, Any]) -> None:
        if keras.backend.backend() == "jax":
            # The file is for inference, and JAX cannot differentiate strided
            # convolutions of images whose size is unknown.
            options = {"jax2tf_kwargs": {"with_gradient": False}, **options}
        model.export(path, format=self.name, verbose=False, **options)

    def count_depthwise(self, path: str) -> int | None:
        if keras.backend.backend() != "tensorflow":
            return None
        from tensorflow.core.protobuf import saved_model_pb2

        file = saved_model_pb2.SavedModel()
        with open(os.path.join(path, "saved_model.pb"), "rb") as opened:
            file.ParseFromString(opened.read())
        graph = file.meta_graphs[0].graph_def
        functions = {f.signature.name: f.node_def for f in graph.library.function}
        # Other nodes at the top save and restore the variables.
        outputs = file.meta_graphs[0].signature_def["serve"].outputs.values()
        served = {output.name.split(":")[0] for output in outputs}
        nodes = [node for node in graph.node if node.name in served]
        return _count(self.depthwise_op, nodes, functions)

    def load(self, path: str) -> tuple[Runner, str]:
        import tensorflow as tf

        loaded = tf.saved_model.load(path)

        def run(inputs: SampleInputs) -> list[tuple[str, np.ndarray]]:
            tensors = keras.tree.map_structure(tf.convert_to_tensor, inputs.structure)
            # TensorFlow runs the file, whatever Keras's backend is.
            with tf32_allowed(False, "tensorflow"):
                outputs = leaves(loaded.serve(tensors))
                # TensorFlow has no signature, and so no file, of unnamed outputs.
                return [(leaf.name or "", np.asarray(leaf.value)) for leaf in outputs]

        return run, f"tensorflow {tf.__version__}"

    def caller(self, path: str, inputs: SampleInputs) -> Callable[[], Any]:
        run, _ = self.load(path)
        return lambda: run(inputs)


def _count(op: str, nodes: Any, functions: Mapping[str, Any]) -> int:
    """How often `nodes`, and the functions that they call, run `op`."""
    count = 0
    for node in nodes:
        count += node.op == op
        for attribute in node.attr.values():
            for called in (attribute.func, *attribute.list.func):
                count += _count(op, functions.get(called.name, ()), functions)
    return count
