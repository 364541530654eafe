"""In which precision products and sums are made: half precision's in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


def widen(tensor: Any) -> Any:
    """`tensor` in the dtype in which its products are summed."""
    return ops.cast(tensor, widened_dtype(tensor))


def widened_dtype(tensor: Any) -> str:
    """float32 for half precision, else the tensor's own dtype."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype
