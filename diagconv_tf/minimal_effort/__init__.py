"""Minimal effort back-propagation: backward passes of few elements of each output gradient.

Training Simplification and Model Simplification for Deep Learning, arXiv 1711.06528. The
forward pass is untouched.
"""

from diagconv_tf.minimal_effort.layers import MinimalEffortEinsumDense
from diagconv_tf.minimal_effort.operands import RandomK, TopK
from diagconv_tf.minimal_effort.recurrent import MinimalEffortGRU, MinimalEffortLSTM
from diagconv_tf.minimal_effort.treatment import MinimalEffort

__all__ = [
    "MinimalEffort",
    "MinimalEffortEinsumDense",
    "MinimalEffortGRU",
    "MinimalEffortLSTM",
    "RandomK",
    "TopK",
]
