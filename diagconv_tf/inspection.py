"""inspect_model: which layers can be rewritten, their FLOPs, and the reasons why not; which
layers are low-bit, and what they save.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from rich.console import Group
from rich.table import Table

from diagconv_tf import class_swap, flops, tracing
from diagconv_tf.layers import layer_spec
from diagconv_tf.lowbit.layers import kernels_of, operands_of
from diagconv_tf.lowbit.operands import FLOAT_BITS, Operands, UnitOperand
from diagconv_tf.model_tree import PlacedLayer, check_built, walk_layers
from diagconv_tf.preserving import preserved_state
from diagconv_tf.rules import DEFAULT_RULES, LOWERING, Rule, find_family
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.text import as_text
from diagconv_tf.treatment import describe

_DEPTHWISE = (
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_GROUPED = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_HANDLED = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
)


@dataclasses.dataclass(frozen=True)
class ConvolutionRow:
    """One convolution with groups.

    Attributes:
        path: the layer's path: the names of the layers that hold it and its own,
            joined by `/`, without the model's.
        other_paths: further paths of a shared layer.
        class_name: name of the layer's class.
        specs: the workload of each call of the layer, in order; of separable
            layers, that of the depthwise half. Empty if it is not known.
        flops: floating-point operations of one pass, over all calls; the three
            passes need equally many. None if a size is not known.
        least_bytes: fewest bytes that one pass moves, over all calls; None if
            a size is not known.
        flops_share: share of the forward FLOPs of the model's convolutions and
            dense layers, 0 to 1; None if a size is not known.
        parameters: number of the layer's weights.
        lowering: `"stock"`, or the layer's `lowering`.
        reasons: why the layer cannot be rewritten; empty means it can.
        survives_saving: whether a `.keras` file holds the layer itself.
            Otherwise its container (a composite layer, or a model with its own
            config) creates a stock layer when the file is loaded: save the
            restored model, and rewrite it after loading.
        layer: the layer.
    """

    path: str
    other_paths: tuple[str, ...]
    class_name: str
    specs: tuple[ConvSpec, ...]
    flops: int | None
    least_bytes: int | None
    flops_share: float | None
    parameters: int
    lowering: str | dict[str, str]
    reasons: tuple[str, ...]
    survives_saving: bool
    layer: keras.layers.Layer = dataclasses.field(repr=False, compare=False)

    @property
    def eligible(self) -> bool:
        """Whether the layer can be rewritten."""
        return not self.reasons

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of the layer."""
        return (self.path, *self.other_paths)

    @property
    def main_spec(self) -> ConvSpec | None:
        """The workload of the call with the most FLOPs."""
        return max(self.specs, key=lambda spec: spec.flops() or 0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """All attributes but `layer`, as types of JSON."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "layer"
        }
        fields["specs"] = [dataclasses.asdict(spec) for spec in self.specs]
        return {**fields, "eligible": self.eligible}


@dataclasses.dataclass(frozen=True)
class LowBitRow:
    """One dense layer or convolution whose operands go through something.

    Attributes:
        path: as in `ConvolutionRow`.
        other_paths: further paths of a shared layer.
        class_name: name of the layer's class.
        operands: what kernel, inputs and output gradient go through.
        kernel_bits: bits of a weight.
        input_bits: bits of an activation.
        weights: number of the kernels' elements; biases stay float.
        macs: multiplications with addition of one forward pass, over all calls;
            None if a size is not known.
        integer_macs: those of them whose factors are both integers times a scale:
            none if kernel or inputs are float; of a separable layer, the
            depthwise half's.
    """

    path: str
    other_paths: tuple[str, ...]
    class_name: str
    operands: Operands
    kernel_bits: int
    input_bits: int
    weights: int
    macs: int | None
    integer_macs: int | None

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as types of JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = {f.name: getattr(self.operands, f.name) for f in dataclasses.fields(Operands)}
        described = {name: None if part is None else str(part) for name, part in parts.items()}
        return {**fields, "operands": described}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The convolutions with groups of a model, and its low-bit layers.

    Attributes:
        model_name: the model's name.
        batch_size: images in a batch; None means that figures are for one
            image.
        rows: one per convolution with groups, in the model's order.
        total_flops: FLOPs of one forward pass of the model's convolutions and
            dense layers; None if a size is not known.
        unknown: why sizes are not known; empty if they are.
        low_bit: one row per low-bit layer, in the model's order.
        float_bytes: size of all weights as they are stored in training.
        low_bit_bytes: size of all weights when the kernels of low-bit layers are
            stored with their bits, packed, and one float32 scale each.
    """

    model_name: str
    batch_size: int | None
    rows: tuple[ConvolutionRow, ...]
    total_flops: int | None
    unknown: str
    low_bit: tuple[LowBitRow, ...] = ()
    float_bytes: int = 0
    low_bit_bytes: int = 0

    @property
    def integer_macs(self) -> int | None:
        """Multiplications of integers in one forward pass; None if a size is not known."""
        found = [row.integer_macs for row in self.low_bit]
        return None if None in found else sum(number for number in found if number is not None)

    def to_json(self) -> str:
        """Returns all rows and totals as a JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rows"] = [row.to_dict() for row in self.rows]
        fields["low_bit"] = [row.to_dict() for row in self.low_bit]
        return json.dumps({**fields, "integer_macs": self.integer_macs}, indent=2)

    def __rich__(self) -> Table | Group:
        table = _table(self)
        return Group(table, _low_bit_table(self)) if self.low_bit else table

    def __str__(self) -> str:
        return as_text(self)


def inspect_model(
    model: keras.Model,
    batch_size: int | None = None,
    *,
    data: Any = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Inspection:
    """Lists the convolutions with groups in a model; changes nothing.

    Finds depthwise, separable and grouped convolutions, stock or ours, at every
    depth: in nested models, wrappers and composite layers. Lists one- and
    three-dimensional ones as not handled. Low-bit layers, dense ones too, are
    listed apart.

    It calls the model on symbolic inputs, and restores afterwards what the
    model's `call` changed: attributes of model and layers, losses, and Keras's
    global state. Weights and seeds do not change in a symbolic call.

    Args:
        model: a built model.
        batch_size: images in a batch, for FLOPs and bytes; None means that of
            `data`, else one image.
        data: a sample batch as `fit` takes it, for models that leave sizes of
            their inputs open; only its shapes and dtypes are read.
        rules: which classes can be rewritten.

    Raises:
        ValueError: if `model` is not a built Keras model, or `batch_size` is
            neither None nor an integer >= 1.
    """
    check_built(model)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"Expected `batch_size` >= 1 or None. Received: {batch_size!r}")
    # Another thread may have given layers other classes for a moment.
    with class_swap.lock, preserved_state(model):
        placed = walk_layers(model)
        return _inspect(model, placed, _trace(model, placed, batch_size, data), rules)


def inspect_as_built(model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES) -> Inspection:
    """Does as `inspect_model`, without calling the model.

    Sizes are those that each layer was built with, and may be open. FLOPs and
    bytes are not known.
    """
    check_built(model)
    not_called = _Trace({}, None, None, "the model was not called")
    with class_swap.lock:
        return _inspect(model, walk_layers(model), not_called, rules)


def not_in_files(placed: Sequence[PlacedLayer]) -> list[str]:
    """Paths of the layers whose class a `.keras` file cannot hold, as `survives_saving`."""
    holds = _ConfigReader()
    return [place.path for place in placed if not _survives_saving(place, holds)]


def _survives_saving(place: PlacedLayer, holds: _ConfigReader) -> bool:
    held = zip(place.containers, (*place.containers[1:], place.layer), strict=True)
    return all(holds(container, child) for container, child in held)


def _inspect(
    model: keras.Model, placed: Sequence[PlacedLayer], traced: _Trace, rules: Sequence[Rule]
) -> Inspection:
    holds = _ConfigReader()
    rows = []
    for place in placed:
        layer = place.layer
        if not _is_listed(layer, rules):
            continue
        shapes = traced.shapes.get(id(layer), [])
        specs, unsupported = _specs(layer, shapes)
        flops = _forward_flops(layer, shapes, specs)
        least_bytes = _total([spec.least_bytes() for spec in specs])
        if traced.batch_size is None:
            specs = tuple(spec.replace(batch=None) for spec in specs)
        share = flops / traced.total_flops if flops and traced.total_flops else None
        rows.append(
            ConvolutionRow(
                path=place.path,
                other_paths=place.other_paths,
                class_name=type(layer).__name__,
                specs=specs,
                flops=flops,
                least_bytes=least_bytes,
                flops_share=share,
                parameters=layer.count_params() if layer.built else 0,
                lowering=getattr(layer, "lowering", STOCK),
                reasons=tuple(_reasons(layer, rules, unsupported)),
                survives_saving=_survives_saving(place, holds),
                layer=layer,
            )
        )
    low_bit = tuple(
        _low_bit_row(place, traced) for place in placed if operands_of(place.layer) != Operands()
    )
    bits = {
        id(kernel): operands_of(place.layer).kernel_bits
        for place in placed
        for kernel in kernels_of(place.layer)
    }
    return Inspection(
        model.name,
        traced.batch_size,
        tuple(rows),
        traced.total_flops,
        traced.unknown,
        low_bit,
        sum(map(_bytes, model.weights)),
        sum(_packed_bytes(weight, bits.get(id(weight), FLOAT_BITS)) for weight in model.weights),
    )


def _bytes(weight: keras.Variable) -> int:
    # Not every dtype is one of NumPy's: bfloat16 has half of 32 bits.
    size = 2 if weight.dtype == "bfloat16" else np.dtype(weight.dtype).itemsize
    return size * math.prod(weight.shape)


def _packed_bytes(weight: keras.Variable, bits: int) -> int:
    if bits == FLOAT_BITS:
        return _bytes(weight)
    return math.ceil(bits * math.prod(weight.shape) / 8) + 4


def _low_bit_row(place: PlacedLayer, traced: _Trace) -> LowBitRow:
    layer, operands = place.layer, operands_of(place.layer)
    shapes = traced.shapes.get(id(layer), [])
    both = operands.kernel_bits != FLOAT_BITS and operands.input_bits != FLOAT_BITS
    macs = _total([flops.layer_flops(layer, shape) // 2 for shape in shapes])
    integer = macs if both else 0
    if both and isinstance(layer, keras.layers.SeparableConv2D):
        found = [layer_spec(layer, shape).flops() for shape in shapes]
        integer = None if None in found else _total([n // 2 for n in found if n is not None])
    return LowBitRow(
        path=place.path,
        other_paths=place.other_paths,
        class_name=type(layer).__name__,
        operands=operands,
        kernel_bits=operands.kernel_bits,
        input_bits=operands.input_bits,
        weights=sum(math.prod(kernel.shape) for kernel in kernels_of(layer)),
        macs=macs,
        integer_macs=integer,
    )


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What a symbolic call of the model found, or why there was none.

    Attributes:
        shapes: `id` of a layer → the input shapes of its calls.
        batch_size: images in a batch; None means that of one image stands for it.
        total_flops: as in `Inspection`.
        unknown: as in `Inspection`.
    """

    shapes: dict[int, list[tuple]]
    batch_size: int | None
    total_flops: int | None
    unknown: str


def _trace(
    model: keras.Model, placed: Sequence[PlacedLayer], batch_size: int | None, data: Any
) -> _Trace:
    layers = [place.layer for place in placed if isinstance(place.layer, flops.COUNTED)]
    try:
        inputs = tracing.symbolic_inputs(model, batch_size, data)
        recorded = tracing.record_input_shapes(model, layers, inputs)
    except tracing.UntraceableError as error:
        return _Trace({}, batch_size, None, str(error))
    if data is not None:
        batch_size = keras.tree.flatten(inputs)[0].shape[0]
    total = sum(
        flops.layer_flops(layer, shape)
        for layer, calls in zip(layers, recorded, strict=True)
        for shape in calls
    )
    shapes = {id(layer): calls for layer, calls in zip(layers, recorded, strict=True)}
    return _Trace(shapes, batch_size, total, "")


def _is_listed(layer: keras.layers.Layer, rules: Sequence[Rule]) -> bool:
    if isinstance(layer, _DEPTHWISE) or getattr(layer, "lowering", STOCK) != STOCK:
        return True
    if isinstance(layer, _GROUPED) and layer.groups > 1:
        return True
    family = find_family(type(layer), rules)
    if family is None or not family.holds(LOWERING):
        return False
    return family.held_by(type(layer)) == {LOWERING} or not family.why_not(layer, LOWERING)


def _reasons(layer: keras.layers.Layer, rules: Sequence[Rule], unsupported: str) -> Iterator[str]:
    family = find_family(type(layer), rules)
    if family is not None and family.holds(LOWERING):
        yield from family.why_not(layer, LOWERING)
    elif isinstance(layer, _HANDLED):
        base = next(c for c in type(layer).__mro__[1:] if c.__module__.startswith("keras."))
        yield (
            f"{type(layer).__name__} is a subclass of {base.__name__} that no rule names "
            "(`rules=` takes one)"
        )
    else:
        yield f"not handled: {layer.rank}-dimensional convolutions"
    if not layer.built:
        yield "not built: the model never calls it"
    if "call" in vars(layer):
        yield "its `call` was replaced on the object"
    if unsupported:
        yield f"unsupported: {unsupported}"


def _specs(layer: keras.layers.Layer, shapes: Sequence[tuple]) -> tuple[tuple[ConvSpec, ...], str]:
    """The layer's workload per call, and why one cannot be stated."""
    if not isinstance(layer, _HANDLED) or not layer.built:
        return (), ""
    if not shapes:
        built_with = (layer.get_build_config() or {}).get("input_shape")
        shapes = [(None, *built_with[1:])] if built_with else []
    try:
        return tuple(layer_spec(layer, shape) for shape in shapes), ""
    except ValueError as error:
        return (), str(error)


def _forward_flops(
    layer: keras.layers.Layer, shapes: Sequence[tuple], specs: Sequence[ConvSpec]
) -> int | None:
    if specs:
        return _total([spec.flops() for spec in specs])
    return _total([flops.layer_flops(layer, shape) for shape in shapes])


def _total(numbers: Sequence[int | None]) -> int | None:
    """Their sum; None if there are none, or one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


class _ConfigReader:
    """Tells whether the config of a container holds a layer inside it."""

    def __init__(self) -> None:
        self._names: dict[int, set[str]] = {}

    def __call__(self, container: keras.layers.Layer, layer: keras.layers.Layer) -> bool:
        if id(container) not in self._names:
            try:
                config = container.get_config()
            except Exception:  # A user's `get_config`; Keras cannot save such a model.
                config = {}
            self._names[id(container)] = set(_serialised_names(config))
        return layer.name in self._names[id(container)]


def _serialised_names(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        inner = config.get("config")
        if "class_name" in config and isinstance(inner, dict) and "name" in inner:
            yield inner["name"]
            return
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            yield from _serialised_names(value)


def _table(inspection: Inspection) -> Table:
    images = inspection.batch_size or 1
    table = Table(
        title=f"{inspection.model_name}: {len(inspection.rows)} convolutions with groups, "
        f"{sum(row.eligible for row in inspection.rows)} can be rewritten",
        title_justify="left",
        caption_justify="left",
        caption="\n".join(_remarks(inspection, images)),
    )
    table.add_column("layer", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("input")
    table.add_column("kernel")
    for name in ("MFLOP", "MB", "share", "weights"):
        table.add_column(name, justify="right")
    table.add_column("lowering", overflow="fold")
    table.add_column("can be rewritten", overflow="fold")
    for row in inspection.rows:
        spec = row.main_spec
        table.add_row(
            row.path + (f" (+{len(row.other_paths)} paths)" if row.other_paths else ""),
            row.class_name,
            (spec.size_text if spec else "?")
            + (f" ({len(row.specs)} calls)" if len(row.specs) > 1 else ""),
            spec.window_text if spec else "?",
            "?" if row.flops is None else f"{row.flops / 1e6:.2f}",
            "?" if row.least_bytes is None else f"{row.least_bytes / 1e6:.2f}",
            "?" if row.flops_share is None else f"{row.flops_share:.1%}",
            f"{row.parameters:,}",
            row.lowering if isinstance(row.lowering, str) else "/".join(row.lowering.values()),
            "yes" if row.eligible else "no: " + "; ".join(row.reasons),
        )
    return table


def _remarks(inspection: Inspection, images: int) -> Iterator[str]:
    yield (
        f"MFLOP, MB: floating-point operations and least memory traffic of one pass, for {images} "
        f"image{'s' * (images > 1)}; share: of the FLOPs of all convolutions and dense layers."
    )
    if inspection.unknown:
        yield f"Sizes are not known: {inspection.unknown}."
    rebuilt = [row.path for row in inspection.rows if not row.survives_saving]
    if rebuilt:
        shown = ", ".join(rebuilt[:3]) + (", …" if len(rebuilt) > 3 else "")
        yield (
            f"Recreated as stock layers when a saved model is loaded: {len(rebuilt)} ({shown}). "
            "Save the restored model, and rewrite it after loading."
        )


def _kinds(rows: Sequence[LowBitRow]) -> str:
    """How many layers of which kinds there are."""
    effort = [isinstance(row.operands.gradients, UnitOperand) for row in rows]
    low_bit = sum(
        dataclasses.replace(row.operands, gradients=None if few else row.operands.gradients)
        != Operands()
        for row, few in zip(rows, effort, strict=True)
    )
    kinds = {"low-bit": low_bit, "minimal-effort": sum(effort)}
    return ", ".join(f"{count} {kind} layers" for kind, count in kinds.items() if count)


def _low_bit_table(inspection: Inspection) -> Table:
    packed, stored = inspection.low_bit_bytes, inspection.float_bytes
    integer, total = inspection.integer_macs, inspection.total_flops
    macs = "not known"
    if integer is not None and total:
        macs = f"{integer / 1e6:.2f} of {total / 2e6:.2f} M ({2 * integer / total:.1%})"
    table = Table(
        title=f"{inspection.model_name}: {_kinds(inspection.low_bit)}",
        title_justify="left",
        caption_justify="left",
        caption=f"Multiplications of integers: {macs}. Weights: {packed / 1e3:.1f} kB packed, "
        f"{stored / 1e3:.1f} kB in training ({packed / max(1, stored):.1%}).",
    )
    table.add_column("layer", overflow="fold")
    table.add_column("class", overflow="fold")
    for name in ("kernel", "inputs", "gradients"):
        table.add_column(name)
    for name in ("weights", "M MAC", "integer"):
        table.add_column(name, justify="right")
    for row in inspection.low_bit:
        parts = (row.operands.kernel, row.operands.inputs, row.operands.gradients)
        table.add_row(
            row.path + (f" (+{len(row.other_paths)} paths)" if row.other_paths else ""),
            row.class_name,
            *map(describe, parts),
            f"{row.weights:,}",
            "?" if row.macs is None else f"{row.macs / 1e6:.2f}",
            "?" if row.integer_macs is None else f"{row.integer_macs / 1e6:.2f}",
        )
    return table
