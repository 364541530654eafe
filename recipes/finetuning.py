"""A user's own model as the start of a training."""

from __future__ import annotations

import keras
from keras import layers

from diagconv_tf import keras_internals, restore
from diagconv_tf.model_files import load_model


def load_start(path: str, image_shape: tuple[int, ...], classes: int) -> keras.Model:
    """The model in a file, in stock layers, with as many outputs as there are classes.

    A model that gives probabilities of `classes` classes stays as it is. Of
    one for another number of classes, whose last layer is `Dense`, that layer
    is replaced. One that gives feature maps gets a global average and a
    `Dense` layer.

    Args:
        path: a `.keras` or legacy `.h5` file, rewritten or not.
        image_shape: of one image of the data.
        classes: in the data.

    Returns:
        An uncompiled model: (batch, *image_shape) → (batch, classes) logits.

    Raises:
        ValueError: if the file cannot be read, or the model does not take the
            images, or ends in another way, as in logits.
    """
    model = restore(load_model(path))
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or not _takes(inputs[0].shape[1:], image_shape):
        shapes = [tuple(tensor.shape[1:]) for tensor in inputs or ()]
        raise ValueError(
            f"Expected a functional or sequential model of images of shape {image_shape} "
            f"(`image_size` sets it). Received: {path}, which takes {shapes}"
        )
    outputs = model.outputs[0]
    if len(model.outputs) == 1 and len(outputs.shape) == 2 and outputs.shape[-1] == classes:
        if not _gives_probabilities(model):
            raise ValueError(
                f"Expected a model of {classes} outputs to end in a softmax: the loss is that of "
                f"probabilities (keras.layers.Softmax() makes them). Received: {path}, which ends "
                f"in {type(model.layers[-1]).__name__} '{model.layers[-1].name}' without one"
            )
        # Logits, but for a constant: their softmax is these probabilities.
        head = keras.ops.log(keras.ops.maximum(outputs, keras.config.epsilon()))
    elif len(model.outputs) == 1 and len(outputs.shape) == 4:
        features = layers.GlobalAveragePooling2D(name="new_average")(outputs)
        head = _classifier(classes)(features)
    elif len(model.outputs) == 1 and isinstance(model.layers[-1], layers.Dense):
        head = _classifier(classes)(model.layers[-1].input)
    else:
        raise ValueError(
            f"Expected a model that ends in feature maps, in a Dense layer, or in {classes} "
            f"probabilities. Received: {path}, which ends in "
            f"{type(model.layers[-1]).__name__} '{model.layers[-1].name}' of shape "
            f"{tuple(outputs.shape)}"
        )
    # The compile state of the file is not used: the caller compiles the model.
    start = keras.Model(model.inputs[0], head, name=model.name)
    if any(
        layer.dtype_policy.name == "mixed_float16"
        for layer in keras_internals.flatten_layers(start)
    ):
        # Files do not tell that of a model, only of layers. By it Keras scales the loss.
        start.dtype_policy = "mixed_float16"
    return start


def _gives_probabilities(model: keras.Model) -> bool:
    """Whether the last operation is a softmax."""
    last, _, _ = keras_internals.history(model.outputs[0])
    if isinstance(last, keras.Model):
        return _gives_probabilities(last)
    is_softmax = type(last).__name__ == "Softmax"  # A layer, or `keras.ops.softmax`.
    return is_softmax or getattr(last, "activation", None) is keras.activations.softmax


def _classifier(classes: int) -> layers.Layer:
    # Half precision has too few digits for logits.
    return layers.Dense(classes, name="new_predictions", dtype="float32")


def _takes(declared: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(declared) == len(shape) and all(
        size in (None, wanted) for size, wanted in zip(declared, shape, strict=True)
    )
