"""Laws of paired comparisons, over seeded simulations of contests."""

import math

import numpy as np
import pytest

from diagconv_tf.measurements import (
    EARLY_ROUNDS,
    ERROR_RATE,
    Measured,
    least_rounds,
    paired_ratio,
    ratios_to_stock,
)
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning.choosing import choose, next_round

# Nothing of a backend is used.
pytestmark = pytest.mark.backends("tensorflow")

TRIES = 1000

#: Three standard deviations of a share of `TRIES` that is about `ERROR_RATE`.
LUCK = 3 * (ERROR_RATE / TRIES) ** 0.5


def steps_of(samples):
    return {
        name: Measured(times[len(times) // 2], count=len(times), samples=tuple(times))
        for name, times in samples.items()
    }


def contest(rng, ratios, rounds=15, common=0.10, own=0.01):
    """Times of stock and of variants with true `ratios`: lognormal noise of rounds and calls."""
    noise_of_round = rng.normal(0, common, rounds)
    return steps_of(
        {
            name: (ratio * np.exp(noise_of_round + rng.normal(0, own, rounds))).tolist()
            for name, ratio in {STOCK: 1.0, **ratios}.items()
        }
    )


def until_decided(rng, ratios, own, last):
    """A contest that ends as those of `tune` do, after `last` rounds if not earlier.

    Args:
        rng: random numbers.
        ratios: variant → its true ratio to stock.
        own: function of `rng` and a shape: logarithms of the noise of steps.
        last: number of rounds; the time is up by then.
    """
    noise = own(rng, (1 + len(ratios), last)) + rng.normal(0, 0.1, last)
    times = (np.exp(noise) * [[1.0], *([ratio] for ratio in ratios.values())]).tolist()
    samples = dict(zip((STOCK, *ratios), times, strict=True))
    # Between these rounds a contest does not end.
    for rounds in (*EARLY_ROUNDS, last):
        steps = steps_of({name: times[:rounds] for name, times in samples.items()})
        left = next_round(steps, 0.0)
        samples = {name: samples[name] if name in left else steps[name].samples for name in steps}
        if not left:
            break
    assert not left
    return steps


EQUAL = dict.fromkeys("abcd", 1.0)


#: Logarithms of the noise that a step has of its own: function of random numbers and a shape.
NOISE = {
    "little": lambda rng, shape: rng.normal(0, 0.01, shape),
    "much": lambda rng, shape: rng.normal(0, 0.3, shape),
    "heavy tails": lambda rng, shape: 0.05 * rng.standard_t(2, shape),
    "uniform": lambda rng, shape: rng.uniform(0, 0.3, shape),
    "interruptions": lambda rng, shape: (
        rng.normal(0, 0.01, shape) + (rng.random(shape) < 0.2) * rng.exponential(0.7, shape)
    ),
    "two speeds of a CPU": lambda rng, shape: (
        rng.normal(0, 0.01, shape) + (rng.random(shape) < 0.5) * math.log(1.6)
    ),
}


def share_of_wins(ratios, own, last=None):
    rng = np.random.default_rng(0)
    last = last or least_rounds(len(ratios))
    found = [until_decided(rng, ratios, NOISE[own], last) for _ in range(TRIES)]
    return np.mean([choose(steps).name != STOCK for steps in found])


@pytest.mark.parametrize("own", NOISE)
def test_at_most_one_contest_in_a_hundred_is_won_by_what_is_not_faster(own):
    assert share_of_wins({"a": 1.0}, own) <= ERROR_RATE + LUCK
    assert share_of_wins(EQUAL, own) <= ERROR_RATE + LUCK


@pytest.mark.parametrize("own", ["little", "much"])
def test_nor_in_contests_of_many_rounds(own):
    assert share_of_wins({"a": 1.0}, own, last=31) <= ERROR_RATE + LUCK


@pytest.mark.parametrize("own", ["little", "two speeds of a CPU"])
def test_early_ends_spend_a_small_part_of_it(own):
    rng = np.random.default_rng(0)
    found = [until_decided(rng, {"a": 1.0}, NOISE[own], 31) for _ in range(TRIES)]
    early = sum(s[STOCK].count in EARLY_ROUNDS and choose(s).name != STOCK for s in found)
    rate = 0.2 * ERROR_RATE
    assert early / TRIES <= rate + 3 * (rate / TRIES) ** 0.5


@pytest.mark.parametrize("last", [None, 31])
def test_a_gain_of_ten_percent_is_found_under_noise_that_rounds_share(last):
    ratios = {"faster": 0.9, "a": 1.0, "b": 1.1, "c": 1.5}
    assert share_of_wins(ratios, "little", last) >= 0.95


def test_a_large_gain_ends_a_contest_early():
    rng = np.random.default_rng(0)
    own = NOISE["little"]
    for ratios, most in (({"a": 0.2}, 3), ({"a": 0.7, "b": 0.3}, 3), ({"a": 0.8}, 5)):
        found = [until_decided(rng, ratios, own, 31)[STOCK].count for _ in range(100)]
        assert np.mean(found) < most + 0.3


def test_one_interrupted_round_does_not_hide_a_large_gain():
    steps = contest(np.random.default_rng(0), {"faster": 0.3})
    samples = list(steps["faster"].samples)
    samples[4] *= 3
    steps["faster"] = Measured(0.3, 0.3, 0.9, 15, 1.0, samples=tuple(samples))
    assert choose(steps).name == "faster"


@pytest.mark.parametrize(
    ("rounds", "error_rate"), [(9, 0.002), (15, 0.0025), (8, 0.05), (3, 0.05), (5, 0.05)]
)
def test_the_interval_covers_the_true_ratio(rounds, error_rate):
    rng = np.random.default_rng(1)
    low, high = 0, 0
    for _ in range(TRIES):
        steps = contest(rng, {"a": 0.8}, rounds, own=0.1)
        ratio = paired_ratio(steps["a"].samples, steps[STOCK].samples, error_rate)
        assert ratio.low <= ratio.estimate <= ratio.high
        low, high = low + (ratio.low > 0.8), high + (ratio.high < 0.8)
    # Three standard deviations of a count with that probability.
    most = TRIES * error_rate + 3 * math.sqrt(TRIES * error_rate)
    assert max(low, high) <= most


def test_the_test_is_that_of_the_tables():
    """Critical values of the signed-rank statistic (Hollander, Wolfe and Chicken, table A.4)."""
    from diagconv_tf.measurements import _left_out, _student_quantile

    # P(T <= t) is at most the rate, and more for t + 1: n = 5, 8, 10 and 15.
    for rounds, rate, largest in ((5, 0.05, 0), (8, 0.05, 5), (10, 0.01, 5), (15, 0.05, 30)):
        assert _left_out(rounds, rate) == largest
    assert _left_out(4, 0.05) is None
    # Upper quantiles of Student's t, for 2 and 4 degrees of freedom.
    for degrees, rate, quantile in ((2, 0.01, 6.965), (2, 0.001, 22.33), (4, 0.001, 7.173)):
        assert _student_quantile(degrees, rate) == pytest.approx(quantile, rel=1e-3)


def test_too_few_rounds_have_no_end():
    ratio = paired_ratio((1.0, 1.0), (2.0, 2.0), 0.01)
    assert (ratio.estimate, ratio.low, ratio.high) == (0.5, 0.0, math.inf)
    assert least_rounds(1) == 7
    assert least_rounds(5) == 10
    for variants in range(1, 8):
        rounds = least_rounds(variants)
        enough = paired_ratio((1.0,) * rounds, (2.0,) * rounds, ERROR_RATE / variants)
        short = paired_ratio((1.0,) * (rounds - 1), (2.0,) * (rounds - 1), ERROR_RATE / variants)
        assert enough.high < 1 < short.high


def test_only_what_was_timed_in_the_same_rounds_is_compared():
    steps = contest(np.random.default_rng(0), {"a": 0.5, "dropped": 3.0})
    cut = Measured(3.0, count=2, samples=steps["dropped"].samples[:2])
    failed = Measured(first_seconds=1.0, error="no luck")
    ratios = ratios_to_stock({**steps, "dropped": cut, "failed": failed})
    assert set(ratios) == {"a", "dropped"}
    assert (ratios["dropped"].rounds, ratios["dropped"].high) == (2, math.inf)
    assert ratios["dropped"].estimate == pytest.approx(3.0, rel=0.05)
    assert ratios["a"] == ratios_to_stock(steps)["a"]
    assert ratios_to_stock({"a": steps["a"]}) == {}
    with pytest.raises(ValueError, match="same rounds. Received: 0 and 2"):
        paired_ratio((), (1.0, 1.0), 0.01)


def test_a_measurement_there_and_back():
    for measured in (Measured(1.0, 0.5, 1.5, 2, 0.25, samples=(0.9, 1.1)), Measured(error="no")):
        assert Measured.from_dict(measured.to_dict()) == measured
    for broken in ({"median": "x"}, {"samples": ["x"]}, {"count": "x"}):
        with pytest.raises(TypeError):
            Measured.from_dict(broken)
