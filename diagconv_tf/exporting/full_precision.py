"""Full float32 on GPUs that would round it, as runtimes on the CPU do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_tf32(framework: str) -> Iterator[None]:
    """Inside, a framework computes float32 without TensorFloat-32; then as before.

    Args:
        framework: `"tensorflow"`, `"jax"` or `"torch"`; others have no such switch.
    """
    if framework == "jax":
        import jax

        with jax.default_matmul_precision("float32"):
            yield
    elif framework == "torch":
        with _torch_without_tf32():
            yield
    elif framework == "tensorflow":
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)
    else:
        yield


@contextlib.contextmanager
def _torch_without_tf32() -> Iterator[None]:
    import torch

    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    # Not `cudnn.flags(allow_tf32=False)`, which would switch cuDNN off.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
