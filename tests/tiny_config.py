"""A config for `recipes.train --config=`: a network that is too small to be worth anything."""

import keras

from recipes import models
from recipes.config import Config


def network(image_shape, classes, **_):
    inputs = keras.Input(image_shape)
    x = keras.layers.DepthwiseConv2D(3, strides=4, name="dw")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


def get_config():
    models.mobilenet_v1 = network
    return Config(name="tiny", dataset="digits", batch_size=240, epochs=40, compare=("shifted",))
