"""The switch for TensorFloat-32."""

import keras
import pytest

from diagconv_tf.tf32 import tf32_allowed


def is_allowed():
    """What the backend's own switches say, of convolutions and of matrix products."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return (tf.config.experimental.tensor_float_32_execution_enabled(),)
    if backend == "jax":
        import jax

        return (jax.config.jax_default_matmul_precision != "float32",)
    import torch

    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_the_switch_holds_inside_nests_and_is_restored(allowed):
    before = is_allowed()
    with pytest.raises(KeyboardInterrupt), tf32_allowed(allowed):
        assert set(is_allowed()) == {allowed}
        with tf32_allowed(not allowed):
            assert set(is_allowed()) == {not allowed}
        assert set(is_allowed()) == {allowed}
        raise KeyboardInterrupt
    assert is_allowed() == before
