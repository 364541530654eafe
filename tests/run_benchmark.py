"""Run as a script, `SCRIPT ARGUMENTS…`: runs `scripts/SCRIPT` as `python scripts/SCRIPT` does.

On other backends than TensorFlow's it is as if that were not installed, which Keras imports
where it is. `--models=Tiny` is a network of two depthwise convolutions.
"""

import os
import sys
from importlib.machinery import PathFinder


class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "tensorflow"
        return None if hidden else super().find_spec(name, path, target)


if os.environ["KERAS_BACKEND"] != "tensorflow":
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow

import runpy  # noqa: E402

import keras  # noqa: E402


def tiny(weights, input_shape, classes):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(8, 3, strides=2),
            layers.DepthwiseConv2D(3, padding="same", name="dw_1"),
            layers.DepthwiseConv2D(3, strides=2, name="dw_2"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(1e-3),
            layers.Dense(classes, activation="softmax"),
        ]
    )


keras.applications.Tiny = tiny
sys.path.insert(0, "scripts")
sys.argv = [f"scripts/{sys.argv[1]}", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
