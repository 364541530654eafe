"""Writes a plan of integers as an ONNX graph, on every backend.

What multiplies integers, and what moves them, is written here. The rest of the model is
split into parts, as few as the graph allows, which Keras exports.

A convolution whose outputs are rounded stands between `DequantizeLinear` and
`QuantizeLinear`: runtimes make one integer operation of the group (onnxruntime's
`QLinearConv`). One whose outputs are read as floats is a `ConvInteger`, or, as dense layers
are, a `MatMulInteger`: sums are exact, and no bias is rounded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.integer.kernels import Grid, IntegerKernel
from diagconv_tf.exporting.integer.plan import IntegerStep, Program, rectified
from diagconv_tf.exporting.integer.steps import Step, StepsLayer
from diagconv_tf.exporting.report import ExportError
from diagconv_tf.exporting.tensors import Leaf, leaves, match
from diagconv_tf.lowbit.layers import LowBitDense
from diagconv_tf.preserving import preserved_state
from diagconv_tf.spec import same_padding

#: The oldest in which all operations that are written here take bytes.
OPSET = 18

# Layouts of a tensor: as in Keras, or with channels first where Keras has them last.
_KERAS, _FIRST = "keras", "channels first"

#: Writes a model as an ONNX file: the model, the path, options of `keras.Model.export`.
Writer = Callable[[keras.Model, str, dict[str, Any]], None]


def write_onnx(program: Program, path: str, options: dict[str, Any], write: Writer) -> None:
    """Writes a program.

    Args:
        program: what to write.
        path: of the file.
        options: for `keras.Model.export`, where parts of the model are exported by Keras.
        write: exports a part.

    Raises:
        ExportError: if the parts cannot be put together.
    """
    with preserved_state(program.model):
        _OnnxWriter(program, {"opset_version": OPSET, **options}, write).save(path)


class _OnnxWriter:
    def __init__(self, program: Program, options: dict[str, Any], write: Writer) -> None:
        self._program, self._calls = program, program.calls
        self._options, self._write = options, write
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray] = {}
        self._initializers: list[Any] = []
        self._opsets = {"": int(options["opset_version"])}
        self._count = 0
        self._taken = {self._calls.values[number].name for number in self._calls.inputs}
        self._taken.update(leaf.name for leaf in leaves(self._calls.output) if leaf.name)
        # (value, grid or None for floats, layout) → name.
        self._names: dict[tuple[int, Grid | None, str], str] = {}
        # Value that only convolutions read → what is padded, and how, for them to do it.
        self._pads: dict[int, tuple[int, Any]] = {}

    def save(self, path: str) -> None:
        import onnx
        from onnx import helper, numpy_helper

        inputs = self._inputs()
        self._steps()
        outputs = self._outputs()
        constants = [numpy_helper.from_array(v, name) for name, v in self._constants.items()]
        graph = helper.make_graph(
            self._nodes,
            self._program.model.name,
            inputs,
            outputs,
            [*constants, *self._initializers],
        )
        opsets = [helper.make_opsetid(domain, v) for domain, v in self._opsets.items()]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="diagconv_tf",
        )
        onnx.checker.check_model(model)
        onnx.save(model, path)

    # Inputs, outputs, order of the steps ----------------------------------

    def _inputs(self) -> list[Any]:
        infos = []
        for number in self._calls.inputs:
            tensor = self._calls.values[number]
            self._names[number, None, _KERAS] = tensor.name
            infos.append(self._info(tensor.name, tensor))
        return infos

    def _outputs(self) -> list[Any]:
        by_tensor: dict[int, str] = {}
        found = leaves(self._calls.output)
        if keras.backend.backend() != "torch":
            found.sort(key=lambda leaf: leaf.path)
        infos = []
        for leaf in found:
            by_tensor[id(leaf.value)] = leaf.name or "/".join(map(str, leaf.path))
        flat = keras.tree.flatten(self._calls.output)
        numbers = {id(t): n for t, n in zip(flat, self._calls.outputs, strict=True)}
        for leaf in found:
            number, name = numbers[id(leaf.value)], by_tensor[id(leaf.value)]
            self._add("Identity", [self._get(number)], output=name)
            infos.append(self._info(name, self._calls.values[number]))
        return infos

    def _info(self, name: str, tensor: keras.KerasTensor) -> Any:
        from onnx import helper

        sizes = list(tensor.shape)
        shape = [f"{name}_{axis}" if size is None else size for axis, size in enumerate(sizes)]
        if sizes and sizes[0] is None:
            shape[0] = "batch"
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
        return helper.make_tensor_value_info(name, dtype, shape)

    def _steps(self) -> None:
        """Writes all steps: parts as large as possible, each as late as possible."""
        left = list(self._calls.steps)
        known = set(self._calls.inputs)
        near: set[int] = set()  # What steps that are written here have given.
        while left:
            part: list[Step] = []
            waiting: list[Step] = []
            within: set[int] = set()
            for step in left:
                is_direct = self._is_direct(step, near)
                if is_direct and known.issuperset(step.inputs):
                    self._direct(step)
                    known.update(step.outputs)
                    near.update(step.outputs)
                elif not is_direct and (known | within).issuperset(step.inputs):
                    part.append(step)
                    within.update(step.outputs)
                else:
                    waiting.append(step)
            # A part waits until no step that is written here can come first.
            if len(part) + len(waiting) == len(left):
                self._part(part)
                known |= within
                left = waiting
            else:
                left = [step for step in left if not known.issuperset(step.outputs)]

    def _is_direct(self, step: Step, near: set[int]) -> bool:
        if isinstance(step, IntegerStep) or self._program.is_moved(step):
            return True
        # Between two layers of integers, what is written here needs no other layout.
        return bool(near.intersection(step.inputs)) and (
            rectified(step.operation) is not None or self._is_plain_sum(step)
        )

    def _is_plain_sum(self, step: Step) -> bool:
        shapes = {self._calls.shape(number) for number in step.inputs}
        return type(step.operation) is keras.layers.Add and len(shapes) == 1

    # Values ---------------------------------------------------------------

    def _get(self, number: int, grid: Grid | None = None, layout: str = _KERAS) -> str:
        """The name of a value as floats, or as codes of a grid."""
        name = self._names.get((number, grid, layout))
        if name is not None:
            return name
        other = _FIRST if layout == _KERAS else _KERAS
        if (number, grid, other) in self._names:
            order = [0, 3, 1, 2] if layout == _FIRST else [0, 2, 3, 1]
            name = self._add("Transpose", [self._names[number, grid, other]], perm=order)
        elif grid is not None:
            # Where it is in the other layout, integers are moved, which are smaller.
            given = layout if (number, None, layout) in self._names else other
            if (number, None, given) not in self._names:
                given = layout
            codes = self._quantized(self._get(number, None, given), grid, shift=True)
            self._names[number, grid, given] = codes
            return self._get(number, grid, layout)
        else:
            raise AssertionError(f"the value {number} is not known")
        self._names[number, grid, layout] = name
        return name

    def _quantized(self, name: str, grid: Grid, shift: bool) -> str:
        if shift and grid.offset:
            name = self._add("Add", [name, self._constant(np.float32(grid.offset))])
        name = self._add("QuantizeLinear", [name, *self._scale_and_zero(grid)])
        if grid.levels < 255:
            name = self._add("Min", [name, self._constant(np.uint8(grid.levels))])
        return name

    def _scale_and_zero(self, grid: Grid) -> list[str]:
        return [self._constant(np.float32(grid.scale)), self._constant(np.uint8(0))]

    def _constant(self, value: Any) -> str:
        """The name of a constant; equal scalars share one."""
        array = np.asarray(value)
        name = f"{array.dtype}_{array.item()!r}" if array.ndim == 0 else self._unused("c")
        self._constants.setdefault(name, array)
        return name

    def _unused(self, letter: str) -> str:
        """A name that no input or output of the model has."""
        while True:
            self._count += 1
            # Short: a small file consists of names.
            name = f"{letter}{self._count}"
            if name not in self._taken:
                return name

    def _add(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes):
        from onnx import helper

        output = output or self._unused("t")
        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    # Steps that are written here ------------------------------------------

    def _direct(self, step: Step) -> None:
        if isinstance(step, IntegerStep):
            if isinstance(step.layer, LowBitDense) or self._is_product(step):
                self._product(step)
            else:
                self._convolution(step)
        elif self._program.is_moved(step):
            self._moved(step)
        elif type(step.operation) is keras.layers.Add:
            layout = self._common_layout(step)
            names = [self._get(number, None, layout) for number in step.inputs]
            total = names[0]
            for name in names[1:]:
                total = self._add("Add", [total, name])
            self._names[step.outputs[0], None, layout] = total
        else:
            layout = self._common_layout(step)
            low, high = rectified(step.operation) or (0.0, np.inf)
            name = self._get(step.inputs[0], None, layout)
            if low == 0:
                bounds = [self._constant(np.float32(bound)) for bound in (low, high)]
                name = (
                    self._add("Clip", [name, *bounds])
                    if high < np.inf
                    else self._add("Relu", [name])
                )
            self._names[step.outputs[0], None, layout] = name

    def _common_layout(self, step: Step) -> str:
        known = [n for n in step.inputs if (n, None, _FIRST) in self._names]
        return _FIRST if known else _KERAS

    def _is_product(self, step: IntegerStep) -> bool:
        """Whether a convolution is a product of matrices whose outputs are read as floats."""
        layer = step.layer
        return (
            self._program.grids[step.outputs[0]] is None
            and step.kernel.groups == 1
            and max(*layer.kernel_size, *layer.strides) == 1
            and layer.data_format == "channels_last"
            and step.inputs[0] not in self._pads
        )

    def _product(self, step: IntegerStep) -> None:
        kernel = step.kernel
        inputs = self._get(step.inputs[0], step.grid)
        codes = kernel.codes.reshape(-1, kernel.codes.shape[-1])
        sums = self._add("MatMulInteger", [inputs, self._constant(codes)])
        name = self._floats(sums, kernel, kernel.bias.shape)
        self._names[step.outputs[0], None, _KERAS] = name

    def _convolution(self, step: IntegerStep) -> None:
        layer = step.layer
        kernel = step.kernel
        layout = _FIRST if layer.data_format == "channels_last" else _KERAS
        number, padding = step.inputs[0], self._padding(step)
        if number in self._pads:
            number, ((top, bottom), (left, right)) = self._pads[number]
            padding = {"pads": [top, left, bottom, right]}
        inputs = self._get(number, step.grid, layout)
        codes = self._constant(np.ascontiguousarray(kernel.codes.transpose(3, 2, 0, 1)))
        window = {
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.strides),
            "dilations": list(layer.dilation_rate),
            "group": kernel.groups,
            **padding,
        }
        grid = self._program.grids[step.outputs[0]]
        if grid is None:
            sums = self._add("ConvInteger", [inputs, codes], **window)
            name = self._floats(sums, kernel, (1, -1, 1, 1))
        else:
            scale_and_zero = self._scale_and_zero(step.grid)
            operands = [
                self._add("DequantizeLinear", [inputs, *scale_and_zero]),
                self._per_channel(codes, kernel.scales / step.grid.scale),
                self._per_channel(self._constant(kernel.integer_bias(grid.offset)), kernel.scales),
            ]
            outputs = self._add("Conv", operands, **window)
            name = self._quantized(outputs, grid, shift=False)
        self._names[step.outputs[0], grid, layout] = name

    def _floats(self, sums: str, kernel: IntegerKernel, shape: tuple[int, ...]) -> str:
        """Sums of products as the floats that they stand for, with the bias."""
        import onnx

        sums = self._add("Cast", [sums], to=onnx.TensorProto.FLOAT)
        scales, bias = (
            self._constant(array.astype("float32").reshape(shape))
            for array in (kernel.scales, kernel.bias)
        )
        return self._add("Add", [self._add("Mul", [sums, scales]), bias])

    def _per_channel(self, codes: str, scales: np.ndarray) -> str:
        scale = self._constant(scales.astype("float32"))
        return self._add("DequantizeLinear", [codes, scale], axis=0)

    def _padding(self, step: IntegerStep) -> dict[str, Any]:
        layer = step.layer
        if layer.padding == "valid":
            return {}
        shape = self._calls.shape(step.inputs[0])
        sizes = shape[1:3] if layer.data_format == "channels_last" else shape[2:]
        if None in sizes:
            return {"auto_pad": "SAME_UPPER"}
        (top, bottom), (left, right) = (
            same_padding(*arguments)
            for arguments in zip(
                sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
            )
        )
        return {"pads": [top, left, bottom, right]}

    def _moved(self, step: Step) -> None:
        operation: Any = step.operation
        number, output = step.inputs[0], step.outputs[0]
        grid = self._program.grids[output]
        kind = type(operation)
        if self._program.is_passed(step):
            is_first = {(number, grid, _FIRST), (number, None, _FIRST)} & self._names.keys()
            layout = _FIRST if is_first else _KERAS
            self._names[output, grid, layout] = self._get(number, grid, layout)
            return
        if kind is keras.layers.ZeroPadding2D and all(
            isinstance(reader, IntegerStep) and getattr(reader.layer, "padding", "") == "valid"
            for reader in self._calls.steps
            if output in reader.inputs
        ):
            self._pads[output] = number, operation.padding
            return
        if kind is keras.layers.Flatten:
            shape = self._constant(np.array([0, -1], "int64"))
            name = self._add("Reshape", [self._get(number, grid), shape])
            self._names[output, grid, _KERAS] = name
            return
        layout = _FIRST if operation.data_format == "channels_last" else _KERAS
        name = self._get(number, grid, layout)
        if kind is keras.layers.ZeroPadding2D:
            (top, bottom), (left, right) = operation.padding
            pads = self._constant(np.array([0, 0, top, left, 0, 0, bottom, right], "int64"))
            name = self._add("Pad", [name, pads, self._constant(np.uint8(0))])
        else:
            same = operation.padding == "same"
            name = self._add(
                "MaxPool",
                [name],
                kernel_shape=list(operation.pool_size),
                strides=list(operation.strides),
                auto_pad="SAME_UPPER" if same else "VALID",
            )
        self._names[output, grid, layout] = name

    # Parts that Keras exports ---------------------------------------------

    def _part(self, part: Sequence[Step]) -> None:
        """Exports steps by Keras, and adds the nodes of the file."""
        import onnx
        from onnx import compose, inliner

        inside = {number for step in part for number in step.outputs}
        taken = sorted({n for step in part for n in step.inputs} - inside)
        outside = {n for s in self._calls.steps if s not in part for n in s.inputs}
        given = sorted(inside & (outside | set(self._calls.outputs)))
        prefix = f"part{self._count}_"
        inputs = {
            n: keras.Input(
                batch_shape=self._calls.shape(n),
                dtype=self._calls.values[n].dtype,
                name=f"{prefix}value_{n}",
            )
            for n in taken
        }
        outputs = StepsLayer(part, taken, given)(list(inputs.values()))
        model = keras.Model(list(inputs.values()), outputs)
        model(list(inputs.values()))  # Keras exports no model that was never called.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "part.onnx")
            self._write(model, path, self._options)
            file = onnx.load(path)
        if file.functions:
            file = inliner.inline_local_functions(file)
        for opset in file.opset_import:
            if self._opsets.setdefault(opset.domain, opset.version) != opset.version:
                raise ExportError(
                    f"Expected parts of the model in opset {self._opsets[opset.domain]} of "
                    f"'{opset.domain or 'ai.onnx'}'. Received: {opset.version}"
                )
        file = compose.add_prefix(file, prefix)
        graph = file.graph
        wanted = [Leaf((i,), f"{prefix}{inputs[n].name}", n) for i, n in enumerate(taken)]
        names = [value.name for value in graph.input]
        for name, leaf in zip(names, match(names, wanted), strict=True):
            self._add("Identity", [self._get(leaf.value)], output=name)
        self._nodes += graph.node
        self._initializers += graph.initializer
        results = [Leaf((i,), f"{prefix}output_{i}", n) for i, n in enumerate(given)]
        names = [value.name for value in graph.output]
        in_order = keras.backend.backend() == "torch"
        for name, leaf in zip(names, match(names, results, by_insertion=in_order), strict=True):
            self._names[leaf.value, None, _KERAS] = name
