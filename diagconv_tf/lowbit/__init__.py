"""Low-bit training: layers whose kernels, inputs and gradients have few bits.

DoReFa-Net (arXiv 1606.06160) and Training Quantized Nets (arXiv 1706.02379). Unlike a
lowering, a quantizer changes what a layer computes. It is simulated in floating point, so
that training does not get faster.
"""

from diagconv_tf.lowbit.bit_layers import BitConv2D, BitDense
from diagconv_tf.lowbit.layers import (
    LowBitConv2D,
    LowBitDense,
    LowBitDepthwiseConv2D,
    LowBitSeparableConv2D,
)
from diagconv_tf.lowbit.operands import (
    BinaryConnect,
    DoReFaActivations,
    DoReFaGradients,
    DoReFaWeights,
    KernelCodes,
    Operands,
)
from diagconv_tf.lowbit.rounding import StochasticRounding
from diagconv_tf.lowbit.treatment import LowBit
from diagconv_tf.treatment import Treated, TreatedLayer, Treatment

__all__ = [
    "BinaryConnect",
    "BitConv2D",
    "BitDense",
    "DoReFaActivations",
    "DoReFaGradients",
    "DoReFaWeights",
    "KernelCodes",
    "LowBit",
    "LowBitConv2D",
    "LowBitDense",
    "LowBitDepthwiseConv2D",
    "LowBitSeparableConv2D",
    "Operands",
    "StochasticRounding",
    "Treated",
    "TreatedLayer",
    "Treatment",
]
