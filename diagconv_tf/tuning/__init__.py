"""`tune`: measures a model's training step with several lowerings, and chooses."""

from diagconv_tf.tuning.tuner import tune

__all__ = ["tune"]
