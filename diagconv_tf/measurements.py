"""Times that `tune` has measured, as plans and the cache keep them, and their comparison."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagconv_tf.lowerings import LoweringLike
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import Timings

#: How the error of a candidate begins that computes something else.
WRONG_NUMBERS = "wrong numbers"

#: The probability, at most, that a contest names any variant faster than stock that is not.
ERROR_RATE = 0.01

#: After so many rounds a contest may end early: number → factor by which the interval is
#: widened. (Three samples agree by chance where each is one of two speeds of a CPU; those
#: differ by less than a factor of 2.)
EARLY_ROUNDS = {3: 2.0, 5: 1.0}

#: The share of `ERROR_RATE` that each of them spends, and that of the last round.
_EARLY_SHARE = 0.1
_LATE_SHARE = 1 - _EARLY_SHARE * len(EARLY_ROUNDS)


@dataclasses.dataclass(frozen=True)
class Measured:
    """How long something takes, or why that is not known. Times are in seconds.

    Attributes:
        median: of the samples; None where there are none.
        p10: 10th percentile.
        p90: 90th percentile.
        count: number of samples behind the three.
        first_seconds: the first call, which traces and compiles.
        error: why there is no time; a failure is a result as well.
        samples: one of each round of a contest, in order; two variants of the
            same contest are compared round by round. Fewer than stock's where
            it was dropped; empty in plans of format 1.
    """

    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    first_seconds: float | None = None
    error: str | None = None
    samples: tuple[float, ...] = ()

    @classmethod
    def from_timings(cls, timings: Timings, first_seconds: float | None = None) -> Measured:
        """Summarises the samples of rounds, to 4 digits: more would be noise.

        Args:
            timings: samples or an error.
            first_seconds: replaces that of `timings`.
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
            samples=tuple(float(f"{s:.4g}") for s in timings.samples),
        )

    @classmethod
    def failed(cls, error: Exception | str, first_seconds: float | None = None) -> Measured:
        """A failure; keeps the first line of the message."""
        if isinstance(error, Exception):
            error = summarize_error(error)
        return cls(first_seconds=_round(first_seconds), error=error[:300])

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Measured:
        """Reads what `to_dict` returned.

        Raises:
            TypeError: if it is something else.
        """
        measured = cls(**{**fields, "samples": tuple(fields.get("samples", ()))})
        numbers = [measured.median, measured.p10, measured.p90, measured.first_seconds]
        for value in (*numbers, measured.count, *measured.samples):
            if value is not None and not isinstance(value, int | float):
                raise TypeError(f"expected times to be numbers, received {value!r}")
        return measured

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, without what is not known."""
        fields = {name: v for name, v in dataclasses.asdict(self).items() if v not in (None, ())}
        return fields if self.count else {k: v for k, v in fields.items() if k != "count"}

    @property
    def ok(self) -> bool:
        """Whether there is a time."""
        return self.error is None and self.median is not None

    @property
    def seconds(self) -> float:
        """The median; infinite where there is no time."""
        return math.inf if self.error is not None or self.median is None else self.median

    @property
    def ms(self) -> str:
        """The median in milliseconds, as text; `"?"` where there is no time."""
        return f"{1e3 * self.seconds:.4g}" if self.ok else "?"

    @property
    def lasts(self) -> bool:
        """Whether another try would give the same: a time, or wrong numbers.

        Other errors may pass, such as a lack of memory that another process caused.
        """
        return self.ok or (self.error or "").startswith(WRONG_NUMBERS)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How much longer one variant of a contest takes than another.

    Attributes:
        estimate: the typical ratio of their times in a round; 0.5 is twice as fast.
        low: lower end of the confidence interval of the ratio.
        high: its upper end. Infinite where the rounds are too few for an interval.
        rounds: number of rounds in which both were timed.
    """

    estimate: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.estimate:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired_ratio(samples: Sequence[float], reference: Sequence[float], error_rate: float) -> Ratio:
    """Compares two variants round by round, so that noise of a whole round cancels.

    The ratios' logarithms are compared by Wilcoxon's signed-rank test, in the
    form of its confidence interval: estimate and ends are order statistics of
    the means of all pairs of logarithms (Hodges and Lehmann, Annals of
    Mathematical Statistics 34 (1963) 598; Hollander, Wolfe and Chicken,
    Nonparametric Statistical Methods, 3rd edition, section 3.4). If both take
    equally long, swapping them changes a logarithm's sign only, so the test is
    exact for any distribution of times and any noise that a round shares.

    It needs `least_rounds`. After fewer, `EARLY_ROUNDS`, the interval is
    Student's, which assumes normally distributed logarithms.

    Args:
        samples: seconds of a variant, one a round.
        reference: seconds of the other in the same rounds. Where one has fewer
            rounds, those are compared.
        error_rate: the probability, at most, that `high` lies below the true
            ratio at any of the rounds at which a contest may end; the same
            holds for `low` above it.

    Raises:
        ValueError: if one has no samples.
    """
    rounds = min(len(samples), len(reference))
    if not rounds:
        raise ValueError(
            "Expected two variants of the same rounds. Received: "
            f"{len(samples)} and {len(reference)} samples"
        )
    logs = np.log(np.asarray(samples[:rounds]) / np.asarray(reference[:rounds]))
    first, second = _pairs(rounds)
    means = np.sort((logs[first] + logs[second]) / 2)
    middle = (means[len(means) // 2] + means[(len(means) - 1) // 2]) / 2
    left_out = _left_out(rounds, error_rate * _LATE_SHARE)
    if rounds in EARLY_ROUNDS:
        error = float(np.std(logs, ddof=1)) / math.sqrt(rounds)
        reach = _student_quantile(rounds - 1, error_rate * _EARLY_SHARE) * error
        reach += math.log(EARLY_ROUNDS[rounds])
        ends = (np.mean(logs) - reach, np.mean(logs) + reach)
    elif left_out is not None:
        ends = (means[left_out], means[-1 - left_out])
    else:
        ends = (-math.inf, math.inf)
    low, high = (math.exp(end) if end < 700 else math.inf for end in ends)
    return Ratio(math.exp(middle), low, high, rounds)


_pairs = functools.cache(np.triu_indices)


@functools.cache
def _left_out(rounds: int, error_rate: float) -> int | None:
    """Number of means beyond each end of the interval; None where the rounds are too few.

    It is the largest t with P(T <= t) <= error_rate, where T is the sum of a
    random subset of the ranks 1 to `rounds`: the signed-rank statistic.
    """
    subsets = np.array([1.0])
    for rank in range(1, rounds + 1):
        subsets = np.pad(subsets, (0, rank)) + np.pad(subsets, (rank, 0))
    possible = np.flatnonzero(np.cumsum(subsets) <= error_rate * 2.0**rounds)
    return int(possible[-1]) if len(possible) else None


def _student_quantile(degrees: int, error_rate: float) -> float:
    """What Student's t exceeds with a probability of `error_rate`, for 2 or 4 degrees of freedom.

    (Shaw, Sampling Student's T distribution, Journal of Computational Finance
    9 (2006) 37, section 2.)
    """
    alpha = 4 * error_rate * (1 - error_rate)
    if degrees == 2:
        return (1 - 2 * error_rate) * math.sqrt(2 / alpha)
    return 2 * math.sqrt(math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha) - 1)


def least_rounds(variants: int) -> int:
    """Rounds after which the signed-rank test can name one of so many variants faster."""
    rounds = 1
    while _left_out(rounds, _LATE_SHARE * ERROR_RATE / max(variants, 1)) is None:
        rounds += 1
    return rounds


def ratios_to_stock(steps: Mapping[str, Measured]) -> dict[str, Ratio]:
    """Every variant of a contest, compared with stock.

    Each end of an interval errs with a probability of at most `ERROR_RATE`
    divided by the number of variants (Bonferroni): so with all of them as fast
    as stock, one of them appears faster with a probability of `ERROR_RATE`.

    Args:
        steps: variant → its times; `"stock"` among them.
    """
    stock = steps.get(STOCK, Measured()).samples
    timed = {name: step.samples for name, step in steps.items() if name != STOCK and step.samples}
    if not stock:
        return {}
    return {
        name: paired_ratio(samples, stock, ERROR_RATE / len(timed))
        for name, samples in timed.items()
    }


@dataclasses.dataclass(frozen=True)
class Workload:
    """One workload of a model, the layers that have it, and what was measured of it alone.

    Attributes:
        spec: the convolution.
        stock_op: what the stock layer runs: `"depthwise_conv"` or `"conv"`.
            `Conv2D(groups=channels)` and `DepthwiseConv2D` may have equal
            specs, but Keras runs different ops for them.
        layers: paths of the layers.
        times: candidate (a lowering, or `"stock"`) → times of all three passes
            together. Empty unless `tune(per_layer=True)` measured it.
        choice: what these times speak for; None where there are none. The
            contest of whole training steps may have decided otherwise.
        reason: why.
    """

    spec: ConvSpec
    stock_op: str
    layers: tuple[str, ...]
    times: Mapping[str, Measured] = dataclasses.field(default_factory=dict)
    choice: LoweringLike | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "choice": dict(self.choice) if isinstance(self.choice, Mapping) else self.choice,
            "reason": self.reason,
            "layers": list(self.layers),
            "stock_op": self.stock_op,
            "spec": dataclasses.asdict(self.spec),
            "times": {name: measured.to_dict() for name, measured in self.times.items()},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Workload:
        """Reads what `to_dict` returned, or a workload of a plan of format 1.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        if "passes" in fields:
            times = _sums_of_passes(fields["passes"])
        else:
            times = {name: Measured.from_dict(m) for name, m in fields["times"].items()}
        return cls(
            spec=ConvSpec.from_dict(fields["spec"]),
            stock_op=fields["stock_op"],
            layers=tuple(fields["layers"]),
            times=times,
            choice=fields["choice"],
            reason=fields["reason"],
        )


def _sums_of_passes(passes: Mapping[str, Mapping[str, Any]]) -> dict[str, Measured]:
    """Times of all passes, of which format 1 has one each: pass → candidate → times."""
    times: dict[str, Measured] = {}
    # A few candidates were measured in some passes only.
    for name in next(iter(passes.values()), {}):
        if not all(name in candidates for candidates in passes.values()):
            continue
        found = [Measured.from_dict(candidates[name]) for candidates in passes.values()]
        error = next((m.error for m in found if m.error is not None), None)
        median = None if error else _round(sum(m.seconds for m in found))
        times[name] = Measured(median=median, error=error)
    return times


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.4g}")
