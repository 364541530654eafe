"""What `tune` has measured, as values that a plan and a cache keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from diagconv_tf.lowerings import LoweringLike
from diagconv_tf.spec import ConvSpec
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import Timings

#: How the error of a candidate begins that computed something else.
WRONG_NUMBERS = "wrong numbers"


@dataclasses.dataclass(frozen=True)
class Measured:
    """How long something takes, or why that is not known. Times are in seconds.

    Attributes:
        median: of the kept samples; None where there are none.
        p10: 10th percentile.
        p90: 90th percentile.
        count: number of samples. Few, where it took several times as long as
            the best and was not timed further.
        first_seconds: the first call, which traces and compiles.
        error: why there is no time; a failure is a result as well.
    """

    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    first_seconds: float | None = None
    error: str | None = None

    @classmethod
    def from_timings(cls, timings: Timings, first_seconds: float | None = None) -> Measured:
        """Summarises samples, to 4 digits: more would be noise.

        Args:
            timings: samples or an error.
            first_seconds: in place of that of `timings`.
        """
        first = timings.first_seconds if first_seconds is None else first_seconds
        if timings.error is not None:
            return cls.failed(timings.error, first)
        return cls(
            median=_round(timings.median),
            p10=_round(timings.p10),
            p90=_round(timings.p90),
            count=timings.count,
            first_seconds=_round(first),
        )

    @classmethod
    def failed(cls, error: Exception | str, first_seconds: float | None = None) -> Measured:
        """A failure; of the message's lines one is kept."""
        if isinstance(error, Exception):
            error = summarize_error(error)
        return cls(first_seconds=_round(first_seconds), error=error[:300])

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Measured:
        """Of what `to_dict` returned.

        Raises:
            TypeError: if it is something else.
        """
        measured = cls(**fields)
        for name in ("median", "p10", "p90", "first_seconds", "count"):
            value = getattr(measured, name)
            if value is not None and not isinstance(value, int | float):
                raise TypeError(f"expected `{name}` to be a number, received {value!r}")
        return measured

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, without what is not known."""
        fields = {name: v for name, v in dataclasses.asdict(self).items() if v is not None}
        return fields if self.count else {k: v for k, v in fields.items() if k != "count"}

    @property
    def ok(self) -> bool:
        """Whether there is a time."""
        return self.error is None and self.median is not None

    @property
    def lasts(self) -> bool:
        """Whether another try would give the same: a time, or numbers that are wrong.

        Other errors may pass, such as want of memory that another process had.
        """
        return self.ok or (self.error or "").startswith(WRONG_NUMBERS)

    @property
    def half_spread(self) -> float:
        """Half of `p90 - p10`, in seconds: about 1.3 standard deviations."""
        return (self.p90 - self.p10) / 2 if self.ok else 0.0


@dataclasses.dataclass(frozen=True)
class ProblemMeasurements:
    """One problem of the model, the layers that pose it, and what was measured.

    Attributes:
        spec: the problem.
        stock_op: what the stock layer runs: `"depthwise_conv"` or `"conv"`.
        layers: paths of the layers.
        passes: pass → candidate (a lowering, or `"stock"`) → its times. Empty
            where there was no time to measure.
        choice: what the times of the problem alone speak for; the whole model
            may have decided otherwise.
        reason: why.
    """

    spec: ConvSpec
    stock_op: str
    layers: tuple[str, ...]
    passes: Mapping[str, Mapping[str, Measured]]
    choice: LoweringLike
    reason: str

    def runs(self, name: str) -> bool:
        """Whether the candidate `name` was measured in every pass, and did not fail."""
        return all(
            name in candidates and candidates[name].ok for candidates in self.passes.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "choice": self.choice if isinstance(self.choice, str) else dict(self.choice),
            "reason": self.reason,
            "layers": list(self.layers),
            "stock_op": self.stock_op,
            "spec": dataclasses.asdict(self.spec),
            "passes": {
                pass_name: {name: measured.to_dict() for name, measured in candidates.items()}
                for pass_name, candidates in self.passes.items()
            },
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ProblemMeasurements:
        """Of what `to_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        return cls(
            spec=ConvSpec.from_dict(fields["spec"]),
            stock_op=fields["stock_op"],
            layers=tuple(fields["layers"]),
            passes={
                pass_name: {name: Measured.from_dict(m) for name, m in candidates.items()}
                for pass_name, candidates in fields["passes"].items()
            },
            choice=fields["choice"],
            reason=fields["reason"],
        )


def total(parts: Iterable[Measured]) -> tuple[float, float]:
    """`(sum of medians, spread of that sum)` in seconds.

    The spread adds the half spreads as independent: the root of the sum of
    their squares.
    """
    parts = list(parts)
    return (
        sum(part.median or 0.0 for part in parts),
        sum(part.half_spread**2 for part in parts) ** 0.5,
    )


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.4g}")
