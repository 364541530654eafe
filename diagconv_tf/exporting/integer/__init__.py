"""Files in which the layers of a deployed low-bit model multiply 8-bit integers.

`plan.py` decides which layers do, and says why others do not. `onnx_graph.py` and
`litert_model.py` write what it has decided.
"""

from diagconv_tf.exporting.integer.plan import IntegerPlan, PlannedLayer, Program, plan_integers

__all__ = ["IntegerPlan", "PlannedLayer", "Program", "plan_integers"]
