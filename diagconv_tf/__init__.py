"""Depthwise-convolution networks in Keras, trained as fast as the hardware allows.

The layers are Keras's own and compute the same; each offers a choice of the
exact way, the *lowering*, in which its convolution runs. The import registers
the layers with Keras, so that files with them can be loaded.
"""

from diagconv_tf.auto import Choice, choose
from diagconv_tf.deployment import deploy, kernel_codes
from diagconv_tf.environment import Conditions
from diagconv_tf.exporting import ExportError, ExportReport, export
from diagconv_tf.inspection import Inspection, inspect_model
from diagconv_tf.layers import (
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    DiagonalwiseSeparableConv2D,
)
from diagconv_tf.lowbit import LowBit
from diagconv_tf.lowerings import why_not
from diagconv_tf.minimal_effort import MinimalEffort
from diagconv_tf.minimal_effort.compacting import Compaction, compact, plan_compaction
from diagconv_tf.minimal_effort.mesimp import MeSimp
from diagconv_tf.plan import Plan
from diagconv_tf.rewriting import preview, restore, rewrite
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.spec import ConvSpec
from diagconv_tf.step_timer import StepTimer
from diagconv_tf.tuning import tune
from diagconv_tf.weight_files import load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RULES",
    "Choice",
    "Compaction",
    "Conditions",
    "ConvSpec",
    "DiagonalwiseConv2D",
    "DiagonalwiseDepthwiseConv2D",
    "DiagonalwiseSeparableConv2D",
    "ExportError",
    "ExportReport",
    "Inspection",
    "LowBit",
    "MeSimp",
    "MinimalEffort",
    "Plan",
    "Rule",
    "StepTimer",
    "choose",
    "compact",
    "deploy",
    "export",
    "inspect_model",
    "kernel_codes",
    "load_weights",
    "plan_compaction",
    "preview",
    "restore",
    "rewrite",
    "save_weights",
    "tune",
    "why_not",
]
