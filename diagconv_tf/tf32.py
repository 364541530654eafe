"""TensorFloat-32: whether NVIDIA GPUs may round float32 products to 10 bits of mantissa.

TensorFlow and JAX allow it by default, PyTorch in convolutions only. Runtimes on the
CPU never do it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def tf32_allowed(allowed: bool, framework: str | None = None) -> Iterator[None]:
    """Allows or forbids TF32 in convolutions and matrix products; restores it on exit.

    The switches of TensorFlow and PyTorch belong to the process, that of JAX to the
    thread. A program that was compiled before keeps its own precision.

    Args:
        allowed: False computes float32 in full.
        framework: `"tensorflow"`, `"jax"` or `"torch"`; None means that of Keras's
            backend.
    """
    framework = framework or keras.backend.backend()
    if framework == "tensorflow":
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(allowed)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)
    elif framework == "jax":
        import jax

        with jax.default_matmul_precision(None if allowed else "float32"):
            yield
    else:
        with _torch_tf32_allowed(allowed):
            yield


@contextlib.contextmanager
def _torch_tf32_allowed(allowed: bool) -> Iterator[None]:
    import torch

    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    # Not `cudnn.flags(allow_tf32=False)`, which would switch cuDNN off.
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
