"""inspect_model: which layers can be rewritten, their FLOPs, and the reasons why not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from rich.table import Table

from diagconv_tf import class_swap, flops, tracing
from diagconv_tf.layers import LoweredLayer, layer_spec
from diagconv_tf.model_tree import PlacedLayer, check_built, walk_layers
from diagconv_tf.preserving import preserved_state
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_rule
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.text import as_text

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
class Inspection:
    """The convolutions with groups of a model.

    Attributes:
        model_name: the model's name.
        batch_size: images in a batch; None means that figures are for one
            image.
        rows: one per convolution with groups, in the model's order.
        total_flops: FLOPs of one forward pass of the model's convolutions and
            dense layers; None if a size is not known.
        unknown: why sizes are not known; empty if they are.
    """

    model_name: str
    batch_size: int | None
    rows: tuple[ConvolutionRow, ...]
    total_flops: int | None
    unknown: str

    def to_json(self) -> str:
        """Returns all rows and totals as a JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rows"] = [row.to_dict() for row in self.rows]
        return json.dumps(fields, indent=2)

    def __rich__(self) -> Table:
        return _table(self)

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
    three-dimensional ones as not handled.

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
        held = zip(place.containers, (*place.containers[1:], layer), strict=True)
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
                survives_saving=all(holds(container, child) for container, child in held),
                layer=layer,
            )
        )
    return Inspection(
        model.name, traced.batch_size, tuple(rows), traced.total_flops, traced.unknown
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
    if isinstance(layer, (LoweredLayer, *_DEPTHWISE)):
        return True
    if isinstance(layer, _GROUPED) and layer.groups > 1:
        return True
    rule = find_rule(layer, rules)
    return rule is not None and (type(layer) is rule.replacement or not rule.why_not(layer))


def _reasons(layer: keras.layers.Layer, rules: Sequence[Rule], unsupported: str) -> Iterator[str]:
    rule = find_rule(layer, rules)
    if rule is not None:
        if type(layer) is rule.source:
            yield from rule.why_not(layer)
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
