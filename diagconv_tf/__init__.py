"""Depthwise-convolution networks in Keras, trained as fast as the hardware allows.

Without changing what they compute: the layers here are Keras's own, with a
choice of the exact way, the *lowering*, in which their convolutions run.
"""

from diagconv_tf.layers import (
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    DiagonalwiseSeparableConv2D,
)
from diagconv_tf.lowerings import why_not
from diagconv_tf.spec import Conditions, ConvSpec
from diagconv_tf.step_timer import StepTimer

__version__ = "0.1.0"

__all__ = [
    "Conditions",
    "ConvSpec",
    "DiagonalwiseConv2D",
    "DiagonalwiseDepthwiseConv2D",
    "DiagonalwiseSeparableConv2D",
    "StepTimer",
    "why_not",
]
