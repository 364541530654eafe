"""LiteRT (TensorFlow Lite) files."""

from __future__ import annotations

import re
from collections.abc import Sequence
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

        def run(inputs: Any, names: Sequence[str] | None) -> list[np.ndarray]:
            values = keras.tree.flatten(inputs)
            wanted = list(runner.get_input_details())
            # The runtime sorts its inputs by name, and numbers nameless ones.
            if names is None or set(names) != set(wanted):
                names = sorted(wanted, key=_natural)
            outputs = runner(**dict(zip(names, values, strict=True)))
            return [outputs[name] for name in sorted(outputs, key=_natural)]

        return run, with_version("ai-edge-litert")

    @property
    def has_dynamic_batch(self) -> bool:
        return keras.backend.backend() != "torch"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `output_10` after `output_9`."""
    return [(int(part or -1), text) for text, part in re.findall(r"(\D*)(\d*)", name)]
