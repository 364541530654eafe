"""LiteRT (TensorFlow Lite) files."""

from __future__ import annotations

import re
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
from diagconv_tf.exporting.sample_inputs import SampleInputs
from diagconv_tf.exporting.tensors import match


class LiteRT(Format):
    """From PyTorch, Keras writes files for one image at a time."""

    name = "litert"
    suffix = ".tflite"
    depthwise_op = "DEPTHWISE_CONV_2D"

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

    def count_depthwise(self, path: str) -> int | None:
        from ai_edge_litert import schema_py_generated as schema

        with open(path, "rb") as opened:
            model = schema.ModelT.InitFromPackedBuf(opened.read(), 0)
        codes = [code.builtinCode for code in model.operatorCodes]
        return sum(
            codes[operator.opcodeIndex] == schema.BuiltinOperator.DEPTHWISE_CONV_2D
            for graph in model.subgraphs
            for operator in graph.operators or ()
        )

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

    @property
    def has_dynamic_batch(self) -> bool:
        return keras.backend.backend() != "torch"


def _numbers(name: str) -> list[int]:
    """The numbers in a name: `[0, 10]` of `args_0_10`, which is after `args_0_9`."""
    return [int(number) for number in re.findall(r"\d+", name)]
