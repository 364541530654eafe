"""Rows of the results of predict_gpu.py. Times are in seconds, and predicted."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from gpu_prediction.bounds import BoundKernel, Program


@dataclasses.dataclass(frozen=True)
class PassRow:
    """One lowering of one pass of one convolution.

    `scripts/results/README.md` says what each column means.
    """

    card: str
    shape: str
    used_by: dict[str, int]
    batch: int
    pass_name: str
    precision: str
    layout: str
    lowering: str
    flops: int
    least_bytes: int
    kernels: int = 0
    heavy_kernels: int = 0
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    moved_bytes: int = 0
    bytes_over_least: float | None = None
    copies: int = 0
    memory_seconds: float | None = None
    issue_seconds: float | None = None
    arithmetic_seconds: float | None = None
    least_seconds: float | None = None
    registers: int | None = None
    spilled_bytes: int | None = None
    loads: dict[int, int] = dataclasses.field(default_factory=dict)
    program_bytes: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Share:
    """What the kernels of one origin add to a step."""

    kernels: int
    moved_bytes: int
    least_seconds: float


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One variant of a whole training step.

    `scripts/results/README.md` says what each column means.
    """

    card: str
    model: str
    size: int
    batch: int
    precision: str
    variant: str
    layers: int = 0
    rewritten: int = 0
    choices: dict[str, int] = dataclasses.field(default_factory=dict)
    kernels: int = 0
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    moved_bytes: int = 0
    memory_seconds: float | None = None
    least_seconds: float | None = None
    over_stock: float | None = None
    shares: dict[str, Share] = dataclasses.field(default_factory=dict)
    spilling_kernels: int | None = None
    program_bytes: int = 0
    error: str | None = None


def fill_pass(row: PassRow, program: Program) -> PassRow:
    """`row` with what was compiled for it."""
    kernels = program.kernels
    heavy = program.heavy(row.least_bytes)
    own = [kernel for kernel in heavy if kernel.routine is not None]
    moved = total_bytes(kernels)
    issues = [k.issue * k.kernel.times for k in kernels if k.issue is not None]
    # All that XLA wrote must be known, or the sum is of something else.
    issue_known = len(issues) == sum(k.kernel.is_written_by_xla for k in kernels)
    # The dearest of XLA's own kernels; the others are reductions of what it leaves.
    routine = max(own, key=lambda k: k.kernel.bytes).routine if own else None
    return dataclasses.replace(
        row,
        kernels=sum(k.kernel.times for k in kernels),
        heavy_kernels=sum(k.kernel.times for k in heavy),
        calls=library_calls(kernels),
        moved_bytes=moved,
        bytes_over_least=moved / row.least_bytes,
        copies=sum(k.kernel.times for k in heavy if k.kernel.moves_only),
        memory_seconds=sum(k.memory * k.kernel.times for k in kernels),
        issue_seconds=sum(issues) if issue_known else None,
        arithmetic_seconds=sum(k.arithmetic * k.kernel.times for k in kernels),
        least_seconds=total_seconds(kernels),
        registers=routine.registers if routine else None,
        spilled_bytes=routine.spilled_bytes if routine else None,
        loads=dict(sorted(routine.loads.items())) if routine else {},
        program_bytes=program.memory,
    )


def fill_step(row: StepRow, program: Program) -> StepRow:
    """`row` with what was compiled for it."""
    kernels = program.kernels
    origins: dict[str, list[BoundKernel]] = {"xla": [], "cudnn": [], "gemm": []}
    for kernel in kernels:
        origins[kernel.kernel.library or "xla"].append(kernel)
    spills = [k.routine.spilled_bytes for k in kernels if k.routine is not None]
    return dataclasses.replace(
        row,
        kernels=sum(k.kernel.times for k in kernels),
        calls=library_calls(kernels),
        moved_bytes=total_bytes(kernels),
        memory_seconds=sum(k.memory * k.kernel.times for k in kernels),
        least_seconds=total_seconds(kernels),
        shares={
            origin: Share(sum(k.kernel.times for k in some), total_bytes(some), total_seconds(some))
            for origin, some in origins.items()
        },
        spilling_kernels=None if None in spills else sum(map(bool, spills)),
        program_bytes=program.memory,
    )


def total_bytes(kernels: Sequence[BoundKernel]) -> int:
    return sum(k.kernel.bytes * k.kernel.times for k in kernels)


def total_seconds(kernels: Sequence[BoundKernel]) -> float:
    return sum(k.seconds * k.kernel.times for k in kernels)


def library_calls(kernels: Sequence[BoundKernel]) -> dict[str, int]:
    """Targets of cuDNN and GEMM calls → how many."""
    counts: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        if kernel.kernel.library is not None:
            counts[kernel.kernel.kind] += kernel.kernel.times
    return dict(counts)
