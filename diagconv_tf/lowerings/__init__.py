"""The exact ways to compute a `ConvSpec`; each says why it cannot."""

from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.lowerings.choice import (
    ACCEPTED,
    DEFAULT_LOWERING,
    LoweringChoice,
    LoweringLike,
    PerPassChoice,
    UniformChoice,
    convolution_passes,
    convolve,
    parse,
    to_format,
    why_not,
)
from diagconv_tf.lowerings.diagonal import Diagonal, DiagonalGrouped
from diagconv_tf.lowerings.fused import Fused
from diagconv_tf.lowerings.native import Native
from diagconv_tf.lowerings.sharded import convolve_sharded, why_not_sharded
from diagconv_tf.lowerings.shifted import Shifted

__all__ = [
    "ACCEPTED",
    "DEFAULT_LOWERING",
    "Diagonal",
    "DiagonalGrouped",
    "Fused",
    "Lowering",
    "LoweringChoice",
    "LoweringLike",
    "Native",
    "PerPassChoice",
    "Shifted",
    "UniformChoice",
    "convolution_passes",
    "convolve",
    "convolve_sharded",
    "parse",
    "to_format",
    "why_not",
    "why_not_sharded",
]
