"""tune: measure what a model's convolutions cost, and choose for each of them."""

from diagconv_tf.tuning.tuner import tune

__all__ = ["tune"]
