"""The least time that compiled code takes on a card.

A kernel takes the longest of three times:

- memory: the bytes that it must move, over `BANDWIDTH_SHARE` of the card's peak;
- issue: its instructions, over what all schedulers issue at the boost clock;
- arithmetic: of a convolution or matrix product, over the peak of the tensor cores.

Of a library's call (cuDNN, GEMM) the code is not known, and so no issue time: it may
take far longer. Launches, waits, the caches and the order of accesses are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gpu_prediction.cards import THREADS_PER_WARP, Card
from gpu_prediction.hlo import Kernel
from gpu_prediction.machine_code import Launch, Routine

#: What a large copy reaches of the peak. An assumption, until a copy is measured.
BANDWIDTH_SHARE = 0.9

#: A kernel is heavy if it moves more than this share of the least bytes of a pass.
HEAVY_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class BoundKernel:
    """A kernel with its code, and its least times in seconds for one launch.

    Attributes:
        kernel: what is launched.
        launch: its grid; None for a library's call.
        routine: its code; None for a library's call.
        memory: for the bytes that it moves.
        issue: for its instructions; None where they are not known.
        arithmetic: for the multiplications and additions of a library's call.
    """

    kernel: Kernel
    launch: Launch | None
    routine: Routine | None
    memory: float
    issue: float | None
    arithmetic: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue or 0.0, self.arithmetic)


def bound_kernel(
    kernel: Kernel,
    launch: Launch | None,
    routine: Routine | None,
    card: Card,
    flops_per_second: float,
) -> BoundKernel:
    """The least times of one launch of `kernel` on `card`.

    Args:
        kernel: what is launched.
        launch: its grid, where it is known.
        routine: its code, where it is known.
        card: where.
        flops_per_second: peak of convolutions and matrix products there.
    """
    issue = None
    if launch is not None and routine is not None:
        threads = launch.warps * THREADS_PER_WARP
        instructions = routine.instructions_for(kernel.bytes_read / threads)
        if instructions is not None:
            issue = launch.warps * instructions / card.instructions_per_second
    return BoundKernel(
        kernel=kernel,
        launch=launch,
        routine=routine,
        memory=kernel.bytes / (BANDWIDTH_SHARE * card.bytes_per_second),
        issue=issue,
        arithmetic=kernel.flops / flops_per_second,
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        kernels: all launches, in their order.
        memory: bytes of arguments, results and temporaries together, without the
            workspaces of libraries.
    """

    kernels: Sequence[BoundKernel]
    memory: int

    def heavy(self, least_bytes: int) -> list[BoundKernel]:
        """The kernels that move more than `HEAVY_SHARE` of a pass's least bytes."""
        return [k for k in self.kernels if k.kernel.bytes > HEAVY_SHARE * least_bytes]


def why_too_large(program: Program, card: Card) -> str | None:
    """Why a program does not fit into the card's memory; None where it does."""
    if program.memory <= card.memory:
        return None
    return (
        f"Expected a program that fits into the {card.memory / 1e9:.1f} GB of {card.name}. "
        f"Received: one of {program.memory / 1e9:.1f} GB"
    )
