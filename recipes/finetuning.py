"""A user's own model as the start of a training: its classifier, its pixels, what is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import layers

from diagconv_tf import keras_internals, restore
from diagconv_tf.model_files import load_model

#: What may stand between a classifier and the outputs, besides activations.
_SHAPING = (
    layers.Dropout,
    layers.Flatten,
    layers.GlobalAveragePooling2D,
    layers.GlobalMaxPooling2D,
    layers.Reshape,
)

#: Activations whose inputs are logits.
_OF_LOGITS = ("softmax", "sigmoid")

#: Names of the layers that are added. (Keras numbers them where they are taken.)
NEW_AVERAGE, NEW_CLASSIFIER = "new_average", "new_predictions"

#: Preprocessed pixels, of any model known to us, span from 1 (Keras's `Rescaling(1 / 255)`) to
#: 4.7 (ImageNet's standard deviations). A model that makes so little of 255 wants bytes.
_WIDEST_SPAN = 16.0


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to be trained further.

    Attributes:
        model: functional, uncompiled, in stock layers: (batch, height, width,
            channels) → logits, (batch, classes), of at least float32.
        head: what became of its classifier, in a few words; empty for a new model.
    """

    model: keras.Model
    head: str = ""


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """The images that a model takes, as far as it tells.

    Attributes:
        size: height and width in pixels; None where they are open, or differ.
        input_range: a key of `data.pipeline.INPUT_RANGES`: the pixels that its
            own preprocessing wants; None where it has none.
    """

    size: int | None
    input_range: str | None


def load_start(path: str, image_shape: tuple[int, ...], classes: int) -> Start:
    """The model in a file, in stock layers, with as many logits as there are classes.

    A final softmax or sigmoid is taken off, whatever it is: part of a `Dense`
    layer, a layer, or an operation. A classifier of `classes` classes stays,
    with its weights. One of another number is replaced by a new `Dense` layer
    on what it took; classifiers are `Dense` layers and convolutions of 1×1,
    also inside a nested model, also with `Reshape`, `Flatten` or a global
    pooling after them. A model without a classifier gets one.

    Args:
        path: a `.keras` or legacy `.h5` file, rewritten or not.
        image_shape: of one image of the data.
        classes: in the data.

    Raises:
        ValueError: if the file cannot be read, or the model does not take the
            images, or has several outputs, or one that is neither a vector nor
            feature maps.
    """
    model = _load(path)
    declared = tuple(model.inputs[0].shape[1:])
    if not _takes(declared, image_shape):
        raise ValueError(
            f"Expected a functional or sequential model of images of shape {image_shape} "
            f"(`image_size` sets it). Received: {path}, which takes {[declared]}"
        )
    shape = tuple(model.outputs[0].shape)
    if len(model.outputs) != 1 or len(shape) not in (2, 4):
        raise ValueError(
            "Expected a model that ends in class scores, in features or in feature maps. Received: "
            f"{path}, which ends in {type(model.layers[-1]).__name__} '{model.layers[-1].name}' "
            f"of shapes {[tuple(output.shape) for output in model.outputs]}"
        )
    logits, head = _logits(model, classes)
    if logits.dtype in ("float16", "bfloat16"):  # Too few digits for a loss.
        logits = layers.Activation("linear", dtype="float32", name="logits")(logits)
    # The compile state of the file is not used: the caller compiles the model.
    start = keras.Model(model.inputs[0], logits, name=model.name)
    if any(
        layer.dtype_policy.name == "mixed_float16"
        for layer in keras_internals.flatten_layers(start)
    ):
        # Files do not tell that of a model, only of layers. By it Keras scales the loss.
        start.dtype_policy = "mixed_float16"
    return Start(start, head)


def image_input(path: str) -> ImageInput:
    """What the model in a file says of its images.

    Raises:
        ValueError: as `load_start`, of the file.
    """
    model = _load(path)
    shape = tuple(model.inputs[0].shape[1:])
    if len(shape) != 3:
        raise ValueError(f"Expected a model of images. Received: {path}, which takes {[shape]}")
    first = keras.config.image_data_format() == "channels_first"
    height, width = shape[1:] if first else shape[:2]
    return ImageInput(height if height == width else None, preprocessed_range(model))


def preprocessed_range(model: keras.Model) -> str | None:
    """The range of pixels that a model's own preprocessing wants; None where it has none.

    Everything before the first layer with kernels is run on black and on white
    images: `Rescaling`, `Normalization` and plain operations tell their scale
    so, wherever they are.

    Args:
        model: functional or sequential, of images.
    """
    shape = [size or 64 for size in model.inputs[0].shape[1:]]
    black_and_white = np.stack([np.zeros(shape), np.full(shape, 255.0)])
    try:
        pixels: Any = keras.ops.convert_to_tensor(black_and_white, dtype="float32")
        for part in _before_kernels(model):
            pixels = part(pixels, training=False)
        black, white = keras.ops.convert_to_numpy(keras.ops.cast(pixels, "float32"))
    except Exception:  # Whatever stands there: it tells nothing of the pixels.
        return None
    span = float(abs(white.mean() - black.mean()))
    if not 0 < span < np.inf or np.isclose(span, 255):
        return None
    if span <= _WIDEST_SPAN:
        return "bytes"
    return "unit" if span > 255 else "symmetric"


def freeze_backbone(model: keras.Model) -> None:
    """Only the classifier is trained; batch norms elsewhere keep and use their statistics.

    That is Keras's own meaning of `trainable=False`: a frozen batch norm runs
    in inference mode.

    Args:
        model: of `load_start`, rewritten or not, and not compiled yet.

    Raises:
        ValueError: if it has no classifier of its own.
    """
    classifier = _find_end(model).innermost.classifier
    if classifier is None:
        raise ValueError(
            f"Expected a model with a classifier, to freeze all else. Received: '{model.name}', "
            f"which ends in {type(model.layers[-1]).__name__} '{model.layers[-1].name}'"
        )
    _train_all(model)
    for layer in keras_internals.flatten_layers(model, include_self=False):
        # A model with the classifier inside must stay trainable itself.
        if all(inner is not classifier for inner in keras_internals.flatten_layers(layer)):
            layer.trainable = False


def unfreeze(model: keras.Model) -> None:
    """Everything is trained, but batch norms, which stay as they are.

    Their statistics are of the images that the model was made with, and a few
    epochs of small batches make worse ones; so Keras's guide to transfer
    learning leaves them in inference mode ("Transfer learning & fine-tuning",
    keras.io/guides/transfer_learning).

    Args:
        model: any; it has to be compiled anew.
    """
    _train_all(model)
    for layer in keras_internals.flatten_layers(model):
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = False


def _train_all(model: keras.Model) -> None:
    # Layer by layer: on TensorFlow a model built on layers of another does not pass it on.
    for layer in keras_internals.flatten_layers(model):
        layer.trainable = True


@dataclasses.dataclass(frozen=True)
class _End:
    """How a graph ends.

    Attributes:
        classifier: the layer that makes one number for each class; None where
            none was found.
        features: what it takes; without one, the same as `logits`.
        logits: the output without a final softmax or sigmoid, unless that is
            part of a layer.
        inner: where the last operation is a model: its end.
        call: and that call of it.
    """

    classifier: layers.Layer | None
    features: keras.KerasTensor
    logits: keras.KerasTensor
    inner: _End | None = None
    call: Any = None

    @property
    def innermost(self) -> _End:
        return self.inner.innermost if self.inner is not None else self


def _load(path: str) -> keras.Model:
    model = restore(load_model(path))
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1:
        shapes = [tuple(tensor.shape[1:]) for tensor in inputs or ()]
        raise ValueError(
            "Expected a functional or sequential model of one batch of images. "
            f"Received: {path}, which takes {shapes}"
        )
    return model


def _find_end(model: keras.Model) -> _End:
    tensor = logits = model.outputs[0]
    classes, is_bare = tensor.shape[-1], len(tensor.shape) == 2
    while len(logits.shape) == 2:
        operation, number, _ = keras_internals.history(tensor)
        node = keras_internals.inbound_nodes(operation)[number]
        if isinstance(operation, keras.Model) and keras_internals.graph(operation) and is_bare:
            inner = _find_end(operation)
            return _End(None, logits, logits, inner, node)
        if _is_classifier(operation, classes):
            return _End(operation, node.input_tensors[0], logits)
        if len(node.input_tensors) != 1:
            break
        if _is_activation(operation):
            if is_bare:
                logits = node.input_tensors[0]
        elif isinstance(operation, _SHAPING) or type(operation).__name__ in ("Reshape", "Squeeze"):
            is_bare = False
        else:
            break
        tensor = node.input_tensors[0]
    return _End(None, logits, logits)


def _is_classifier(operation: Any, classes: int | None) -> bool:
    if isinstance(operation, layers.Dense):
        count = operation.units
    elif isinstance(operation, layers.Conv2D) and set(operation.kernel_size) == {1}:
        count = operation.filters
    else:
        return False
    activation = getattr(operation.activation, "__name__", "")
    return count == classes and activation in ("linear", *_OF_LOGITS)


def _is_activation(operation: Any) -> bool:
    """Whether an operation has class scores as its outputs, and logits as its inputs."""
    kind = type(operation).__name__.lower()  # A layer, or an operation of `keras.ops`.
    activation = getattr(getattr(operation, "activation", None), "__name__", "")
    known = isinstance(operation, layers.Activation) and activation in ("linear", *_OF_LOGITS)
    return known or kind in _OF_LOGITS


def _may_be_logits(operation: Any) -> bool:
    activation = getattr(getattr(operation, "activation", None), "__name__", "linear")
    return activation == "linear" and "relu" not in type(operation).__name__.lower()


def _logits(model: keras.Model, classes: int) -> tuple[keras.KerasTensor, str]:
    """The symbolic logits in the graph of `model`, and what was done."""
    end = _find_end(model)
    if end.inner is not None:
        inner = keras_internals.graph(end.call.operation)
        logits, head = _logits(inner, classes)
        inputs = inner.inputs if len(inner.inputs) > 1 else inner.inputs[0]
        cut = keras.Model(inputs, logits, name=end.call.operation.name)
        return cut(*end.call.arguments.args, **end.call.arguments.kwargs), head
    right = len(end.logits.shape) == 2 and end.logits.shape[-1] == classes
    if right and end.classifier is not None:
        end.classifier.activation = keras.activations.linear
        return end.logits, f"{_text(end.classifier)} of {classes} classes, as it was"
    if right and _may_be_logits(keras_internals.history(end.logits)[0]):
        return end.logits, f"the {classes} outputs, as they were"
    features, old = end.features, "none"
    if end.classifier is not None:
        count = getattr(end.classifier, "units", None) or end.classifier.filters
        old = f"{_text(end.classifier)} of {count} classes"
    taken = {layer.name for layer in model.layers}
    if len(features.shape) == 4:
        features = layers.GlobalAveragePooling2D(name=_free(NEW_AVERAGE, taken))(features)
    # Half precision has too few digits for logits.
    dtype = "float32" if features.dtype in ("float16", "bfloat16") else features.dtype
    classifier = layers.Dense(classes, name=_free(NEW_CLASSIFIER, taken), dtype=dtype)
    return classifier(features), f"new, Dense of {classes} classes; before: {old}"


def _before_kernels(model: keras.Model) -> list[keras.Model]:
    """Parts of `model`, one after another, up to the first layer with kernels.

    Raises:
        ValueError: if there is none, or it takes several inputs.
    """
    graph = keras_internals.graph(model)
    by_depth = keras_internals.nodes_by_depth(graph)
    # Inputs are the deepest.
    for node in (node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]):
        if _has_kernels(node.operation):
            part = keras.Model(graph.inputs, *node.input_tensors)
            rest = node.operation
            return [part, *(_before_kernels(rest) if isinstance(rest, keras.Model) else ())]
    raise ValueError(f"Expected a model with kernels. Received: '{model.name}'")


def _has_kernels(operation: Any) -> bool:
    return isinstance(operation, keras.Layer) and any(
        layer.weights and not isinstance(layer, layers.Normalization)
        for layer in keras_internals.flatten_layers(operation)
        if not isinstance(layer, keras.Model)
    )


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_1"
    return name


def _text(layer: layers.Layer) -> str:
    return f"{type(layer).__name__} '{layer.name}'"


def _takes(declared: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(declared) == len(shape) and all(
        size in (None, wanted) for size, wanted in zip(declared, shape, strict=True)
    )
