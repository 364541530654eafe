"""LiteRT (TensorFlow Lite) files."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.base import (
    Format,
    Requirement,
    Runner,
    can_only_elsewhere,
    keras_version,
    with_version,
)
from diagconv_tf.exporting.integer import Program
from diagconv_tf.exporting.sample_inputs import SampleInputs
from diagconv_tf.exporting.tensors import match
from diagconv_tf.preserving import preserved_state


class LiteRT(Format):
    """From PyTorch, Keras writes files for one image at a time."""

    name = "litert"
    suffix = ".tflite"
    depthwise_op = "DEPTHWISE_CONV_2D"
    holds_integers = True

    def requirements(self) -> list[Requirement]:
        if keras_version() < (3, 13):
            raise ValueError(
                f"Expected Keras 3.13 or newer for format='litert'. Received: {keras.__version__}"
            )
        if keras.backend.backend() == "jax":
            raise can_only_elsewhere(self.name, "Keras has no such export")
        runtime = Requirement("ai_edge_litert", '"diagconv_tf[litert]"')
        if keras.backend.backend() == "torch":
            return [Requirement("litert_torch", "litert-torch"), runtime]
        return [Requirement("tensorflow", "tensorflow"), runtime]

    def write(self, model: keras.Model, path: str, options: dict[str, Any]) -> None:
        model.export(path, format=self.name, verbose=False, **options)

    def write_integers(self, program: Program, path: str, options: dict[str, Any]) -> None:
        if keras.backend.backend() != "tensorflow":
            raise can_only_elsewhere(
                self.name,
                "TensorFlow's converter, which writes integers, does not run (integers=False "
                "writes floats)",
            )
        import tensorflow as tf

        from diagconv_tf.exporting.integer.litert_model import litert_model

        with preserved_state(program.model):
            model = litert_model(program)
            self.write(model, path, {"optimizations": [tf.lite.Optimize.DEFAULT], **options})

    def count_depthwise(self, path: str) -> int | None:
        return sum(kind == "DEPTHWISE_CONV_2D" for kind, _ in _operators(path))

    def count_integers(self, path: str) -> int:
        kinds = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")
        return sum(kind in kinds and types == ("INT8", "INT8") for kind, types in _operators(path))

    def load(self, path: str) -> tuple[Runner, str]:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(path)
        runner = interpreter.get_signature_runner("serving_default")

        def run(inputs: SampleInputs) -> list[tuple[str, np.ndarray]]:
            # Signatures sort names as text; where they mean nothing, their numbers count.
            names = sorted(runner.get_input_details(), key=_numbers)
            matched = match(names, inputs.leaves)
            outputs = runner(**{n: leaf.value for n, leaf in zip(names, matched, strict=True)})
            return sorted(outputs.items(), key=lambda item: _numbers(item[0]))

        return run, with_version("ai-edge-litert")

    def caller(self, path: str, inputs: SampleInputs) -> Callable[[], Any]:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(path)
        # A signature sizes and prepares all tensors in each call.
        details = interpreter.get_signature_runner("serving_default").get_input_details()
        names = sorted(details, key=_numbers)
        pairs = list(zip(names, match(names, inputs.leaves), strict=True))
        for name, leaf in pairs:
            interpreter.resize_tensor_input(details[name]["index"], leaf.value.shape)
        interpreter.allocate_tensors()
        for name, leaf in pairs:
            interpreter.set_tensor(details[name]["index"], leaf.value)
        return interpreter.invoke

    @property
    def has_dynamic_batch(self) -> bool:
        return keras.backend.backend() != "torch"


def _operators(path: str) -> list[tuple[str, tuple[str, ...]]]:
    """The kind of each operator of a file, and the types of its first two inputs."""
    from ai_edge_litert import schema_py_generated as schema

    with open(path, "rb") as opened:
        model = schema.ModelT.InitFromPackedBuf(opened.read(), 0)
    kinds = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    types = {number: name for name, number in vars(schema.TensorType).items()}
    return [
        (
            kinds[model.operatorCodes[operator.opcodeIndex].builtinCode],
            tuple(types[graph.tensors[i].type] for i in operator.inputs[:2]),
        )
        for graph in model.subgraphs
        for operator in (graph.operators if graph.operators is not None else ())
    ]


def _numbers(name: str) -> list[int]:
    """The numbers in a name: `[0, 10]` of `args_0_10`, which is after `args_0_9`."""
    return [int(number) for number in re.findall(r"\d+", name)]
