"""`"fused"`: kernels of our own for NVIDIA GPUs, on JAX and PyTorch.

Each pass reads and writes no byte twice, in one kernel (and a small one that ends the
kernel gradient). `backends/depthwise_tiling.py` says how, and what is expected of it.
Nothing of it has been measured on a GPU yet: `choose` never takes it, `tune` may.

Sums of half precision are made in float32. Where the output gradient or the inputs are
not finite, the kernel gradient may not be finite for other taps of the same channel.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
from types import ModuleType
from typing import Any

import keras

from diagconv_tf.backends import depthwise_tiling as tiling
from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.spec import ConvSpec

#: What compiles the kernels, by Keras backend, and its oldest version that was tried.
_COMPILERS = {"jax": ("jax", (0, 10)), "torch": ("triton", (3, 6))}

#: The first GPUs with bfloat16 arithmetic (CUDA C++ Programming Guide, table
#: 'Feature Support per Compute Capability').
_OLDEST_CAPABILITY = (8, 0)

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Fused(Lowering):
    """One kernel a pass.

    Attributes:
        interpret: True computes the kernels operation by operation, on any device,
            for tests; on PyTorch, Triton must have been told so by TRITON_INTERPRET=1.
            No string stands for it.
    """

    interpret: bool = False

    @property
    def name(self) -> str:
        return "fused, interpreted" if self.interpret else "fused"

    def why_not(self, spec: ConvSpec) -> list[str]:
        reasons = [*_WHY_NOT_BACKEND]
        if not reasons and not self.interpret:
            reasons += _why_not_device()
        if spec.compute_dtype not in _DTYPES:
            reasons.append(
                f"fused needs one of the dtypes {', '.join(_DTYPES)}; received {spec.compute_dtype}"
            )
        if spec.data_format != "channels_last":
            reasons.append("fused needs data_format='channels_last'; received 'channels_first'")
        if (spec.input_channels_per_group, spec.output_channels_per_group) != (1, 1):
            reasons.append(
                "fused needs one input and one output channel a group; received "
                f"{spec.input_channels_per_group} and {spec.output_channels_per_group}"
            )
        taps = math.prod(spec.kernel_size)
        if taps > tiling.MOST_TAPS:
            reasons.append(
                f"fused needs a kernel of at most {tiling.MOST_TAPS} taps; received {taps}"
            )
        return reasons

    def has_own_gradients(self, spec: ConvSpec, inputs: Any) -> bool:
        return True

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        return _kernels().forward(spec, inputs, kernel, self.interpret)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        return _kernels().input_gradient(spec, output_gradient, kernel, input_shape, self.interpret)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        return _kernels().kernel_gradient(spec, inputs, output_gradient, self.interpret)

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return False


def _why_not_backend(backend: str) -> list[str]:
    if backend not in _COMPILERS:
        return [f"fused needs Keras's JAX or PyTorch backend; received {backend!r}"]
    package, oldest = _COMPILERS[backend]
    wanted = f"{package} >= {'.'.join(map(str, oldest))}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return [f"fused needs {wanted}, which is not installed"]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
        return [f"fused needs {wanted}; received {version}"]
    return []


# Once, because compilers trace a layer's call and cannot trace this.
_WHY_NOT_BACKEND = _why_not_backend(keras.backend.backend())


def _why_not_device() -> list[str]:
    capability = _kernels().compute_capability()
    wanted = "fused needs an NVIDIA GPU of compute capability 8.0 or newer"
    if capability is None:
        return [f"{wanted}; received another device"]
    if capability < _OLDEST_CAPABILITY:
        return [f"{wanted}; received {capability[0]}.{capability[1]}"]
    return []


def _kernels() -> ModuleType:
    """The kernels of Keras's backend; imported late, since most users need none."""
    if keras.backend.backend() == "jax":
        from diagconv_tf.backends import pallas_depthwise

        return pallas_depthwise
    from diagconv_tf.backends import triton_depthwise

    return triton_depthwise
