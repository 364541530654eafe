"""TensorFlow as the reader of images, on the processor, under every Keras backend."""

from __future__ import annotations

import contextlib

import keras
import tensorflow as tf

if keras.backend.backend() != "tensorflow":
    # It would take most of the GPU's memory from JAX or PyTorch.
    with contextlib.suppress(RuntimeError):  # It has been used before: then it has it already.
        tf.config.set_visible_devices([], "GPU")


def on_host():
    """A context that keeps what is made in it in the main memory.

    tf.data runs on the processor; a tensor that it captures from a GPU would be
    copied back for every batch.
    """
    return tf.device("CPU:0")


# For the functions of datasets, which are written in TensorFlow's own control
# flow: AutoGraph would parse their sources, in more time than all else takes.
plain = tf.autograph.experimental.do_not_convert
