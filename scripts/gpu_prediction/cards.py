"""NVIDIA cards by their public figures, and how XLA is told of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

#: A streaming multiprocessor (SM) of every card here has four schedulers, and each issues
#: one instruction of one warp a clock (CUDA C++ Programming Guide, 'Compute Capability
#: 8.x' and '9.0').
SCHEDULERS_PER_SM = 4
THREADS_PER_WARP = 32


@dataclasses.dataclass(frozen=True)
class Card:
    """A card as its maker describes it.

    Attributes:
        name: as CUDA reports it.
        compute_capability: `(major, minor)`.
        sms: streaming multiprocessors.
        fp32_units: float32 units of an SM.
        clock: boost clock in Hz. It is the highest one, so that times by it are bounds.
        bytes_per_second: peak rate of the card's memory.
        memory: of the card, in bytes.
        l2: bytes of the L2 cache.
        shared_memory: bytes of an SM.
        shared_memory_of_block: most bytes that a block can ask for.
        threads_per_sm: most threads resident on an SM.
        tensor_flops: peak FLOPs/s of the tensor cores without sparsity, sums in float32:
            `"tf32"` and `"half"` (float16 and bfloat16).
        source: where the figures are published.
    """

    name: str
    compute_capability: tuple[int, int]
    sms: int
    fp32_units: int
    clock: float
    bytes_per_second: float
    memory: int
    l2: int
    shared_memory: int
    shared_memory_of_block: int
    threads_per_sm: int
    tensor_flops: Mapping[str, float]
    source: str

    @property
    def architecture(self) -> str:
        """What `ptxas` calls it: `"sm_90a"`."""
        return "sm_{}{}".format(*self.compute_capability) + ("a" if self._has_own_features else "")

    @property
    def _has_own_features(self) -> bool:
        # Instructions of one compute capability alone, such as Hopper's `wgmma`, which
        # later ones need not have. There are none before 9.0: `sm_80a` is no target,
        # and XLA fails with "ptxas too old" where it is asked for.
        return self.compute_capability >= (9, 0)

    @property
    def instructions_per_second(self) -> float:
        """Warp instructions that all schedulers issue together, at most."""
        return self.sms * SCHEDULERS_PER_SM * self.clock

    def flops_per_second(self, dtype: str, tf32: bool) -> float:
        """The highest rate of multiplications and additions in convolutions.

        Args:
            dtype: of the operands.
            tf32: whether float32 may be rounded to TF32.
        """
        if dtype in ("float16", "bfloat16"):
            return self.tensor_flops["half"]
        if dtype == "float32" and tf32:
            return self.tensor_flops["tf32"]
        return 2 * self.sms * self.fp32_units * self.clock

    def target(self) -> str:
        """XLA's `GpuTargetConfigProto` in text form.

        Its fields: `xla/stream_executor/device_description.proto` in openxla/xla.
        """
        major, minor = self.compute_capability
        capability = f"major: {major} minor: {minor}"
        if self._has_own_features:
            capability += " feature_extension: ACCELERATED_FEATURES"
        return f"""
gpu_device_info {{
  name: "{self.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {capability} }}
  platform_version: "Compute Capability {major}.{minor}{"a" * self._has_own_features}"
  core_count: {self.sms}
  fpus_per_core: {self.fp32_units}
  clock_rate_ghz: {self.clock / 1e9:g}
  memory_bandwidth: {self.bytes_per_second:.0f}
  device_memory_size: {self.memory}
  l2_cache_size: {self.l2}
  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_of_block}
  threads_per_core_limit: {self.threads_per_sm}
  threads_per_block_limit: 1024
  threads_per_warp: {THREADS_PER_WARP}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{self.name}"
"""


_GIB = 2**30
_MIB = 2**20
_KIB = 2**10

#: Shared memory and threads of an SM: CUDA C++ Programming Guide, table 'Technical
#: Specifications per Compute Capability'. What a block cannot ask for is one KiB of it.
_HOPPER = {
    "compute_capability": (9, 0),
    "sms": 132,
    "fp32_units": 128,
    "clock": 1.98e9,
    "l2": 50 * _MIB,
    "shared_memory": 228 * _KIB,
    "shared_memory_of_block": 227 * _KIB,
    "threads_per_sm": 2048,
    "tensor_flops": {"tf32": 494.7e12, "half": 989.4e12},
}
_ADA = {
    "compute_capability": (8, 9),
    "fp32_units": 128,
    "shared_memory": 100 * _KIB,
    "shared_memory_of_block": 99 * _KIB,
    "threads_per_sm": 1536,
}

#: What `--cards` knows.
CARDS: Mapping[str, Card] = {
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        bytes_per_second=3.352e12,
        memory=80 * _GIB,
        **_HOPPER,
        source="SXM5: NVIDIA H100 Tensor Core GPU Architecture (white paper), tables 1 and 3",
    ),
    "h200": Card(
        name="NVIDIA H200",
        bytes_per_second=4.8e12,
        memory=141 * 10**9,
        **_HOPPER,
        source="SXM: NVIDIA H200 Tensor Core GPU (data sheet); chip as the H100's",
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        sms=108,
        fp32_units=64,
        clock=1.41e9,
        bytes_per_second=2.039e12,
        memory=80 * _GIB,
        l2=40 * _MIB,
        shared_memory=164 * _KIB,
        shared_memory_of_block=163 * _KIB,
        threads_per_sm=2048,
        tensor_flops={"tf32": 156e12, "half": 312e12},
        source="SXM4, 80 GB: NVIDIA A100 Tensor Core GPU (data sheet and white paper)",
    ),
    "l4": Card(
        name="NVIDIA L4",
        sms=58,
        clock=2.04e9,
        bytes_per_second=300e9,
        memory=24 * _GIB,
        l2=48 * _MIB,
        **_ADA,
        tensor_flops={"tf32": 60e12, "half": 121e12},
        source="NVIDIA L4 Tensor Core GPU (data sheet; half of its figures with sparsity)",
    ),
    "rtx4090": Card(
        name="NVIDIA GeForce RTX 4090",
        sms=128,
        clock=2.52e9,
        bytes_per_second=1.008e12,
        memory=24 * _GIB,
        l2=72 * _MIB,
        **_ADA,
        tensor_flops={"tf32": 82.6e12, "half": 165.2e12},
        source="NVIDIA Ada GPU Architecture (white paper), appendix A",
    ),
}


def find_card(name: str) -> Card:
    """The card that `--cards` calls `name`; `H100`, `RTX 4090` and `rtx-4090` will do.

    Raises:
        ValueError: if it is not known; the message lists those that are.
    """
    card = CARDS.get(re.sub(r"[\s_-]", "", name.lower()))
    if card is None:
        raise ValueError(f"Expected --cards to be some of {', '.join(CARDS)}. Received: {name}")
    return card
