"""A row of the results of benchmark_lowerings.py."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One lowering of one pass. Times are seconds for one operation.

    `scripts/results/README.md` says what each column means.
    """

    shape: str
    used_by: dict[str, int]
    batch: int
    height: int
    width: int
    channels: int
    kernel: str
    stride: str
    padding: str
    pass_name: str
    precision: str
    layout: str
    compiled: bool
    lowering: str
    flops: int
    least_bytes: int
    limit: float
    bound: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    first_seconds: float | None = None
    limit_share: float | None = None
    over_native: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    relative_error: float | None = None
    agrees: bool | None = None
    operations: int = 0
    sets: int = 0
    past_caches: bool | None = None
    overhead: float | None = None
    timed_as: str = ""
    error: str | None = None
