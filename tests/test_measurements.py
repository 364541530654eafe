"""Laws of paired comparisons, over seeded simulations of contests."""

import math

import numpy as np
import pytest

from diagconv_tf.measurements import (
    ERROR_RATE,
    Measured,
    least_rounds,
    paired_ratio,
    ratios_to_stock,
)
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning.choosing import choose_variant

# Nothing of a backend is used.
pytestmark = pytest.mark.backends("tensorflow")

TRIES = 1000

#: Three standard deviations of a share of `TRIES` that is about `ERROR_RATE`.
LUCK = 3 * (ERROR_RATE / TRIES) ** 0.5


def contest(rng, ratios, rounds=15, common=0.10, own=0.01):
    """Times of stock and of variants with true `ratios`: lognormal noise of rounds and calls."""
    noise_of_round = rng.normal(0, common, rounds)
    steps = {}
    for name, ratio in {STOCK: 1.0, **ratios}.items():
        samples = ratio * np.exp(noise_of_round + rng.normal(0, own, rounds))
        steps[name] = Measured(
            median=float(np.sort(samples)[rounds // 2]),
            count=rounds,
            first_seconds=1.0,
            samples=tuple(map(float, samples)),
        )
    return steps


def share_of_wins(ratios, **noise):
    rng = np.random.default_rng(0)
    wins = [choose_variant(contest(rng, ratios, **noise)).name != STOCK for _ in range(TRIES)]
    return np.mean(wins)


EQUAL = dict.fromkeys("abcd", 1.0)


@pytest.mark.parametrize(
    "noise",
    [
        {},
        {"rounds": 9},
        {"common": 0.5, "own": 0.05},
        {"common": 0.0, "own": 0.3},
    ],
    ids=str,
)
def test_at_most_one_contest_in_a_hundred_is_won_by_what_is_not_faster(noise):
    assert share_of_wins(EQUAL, **noise) <= ERROR_RATE + LUCK
    assert share_of_wins({"a": 1.0}, **noise) <= ERROR_RATE + LUCK


@pytest.mark.parametrize("rounds", [9, 15, 31])
def test_a_gain_of_ten_percent_is_found_under_noise_that_rounds_share(rounds):
    ratios = {"faster": 0.9, "a": 1.0, "b": 1.1, "c": 1.5}
    assert share_of_wins(ratios, rounds=rounds) >= 0.95


def test_one_interrupted_round_does_not_hide_a_large_gain():
    steps = contest(np.random.default_rng(0), {"faster": 0.3})
    samples = list(steps["faster"].samples)
    samples[4] *= 3
    steps["faster"] = Measured(0.3, 0.3, 0.9, 15, 1.0, samples=tuple(samples))
    assert choose_variant(steps).name == "faster"


@pytest.mark.parametrize(("rounds", "error_rate"), [(9, 0.002), (15, 0.0025), (8, 0.05)])
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
    from diagconv_tf.measurements import _left_out

    # P(T <= t) is at most the rate, and more for t + 1: n = 5, 8, 10 and 15.
    for rounds, rate, largest in ((5, 0.05, 0), (8, 0.05, 5), (10, 0.01, 5), (15, 0.05, 30)):
        assert _left_out(rounds, rate) == largest
    assert _left_out(4, 0.05) is None


def test_too_few_rounds_have_no_end():
    ratio = paired_ratio((1.0, 1.0), (2.0, 2.0), 0.01)
    assert (ratio.estimate, ratio.low, ratio.high) == (0.5, 0.0, math.inf)
    assert least_rounds(1) == 7
    assert least_rounds(5) == 9
    for variants in range(1, 8):
        rounds = least_rounds(variants)
        enough = paired_ratio((1.0,) * rounds, (2.0,) * rounds, ERROR_RATE / variants)
        short = paired_ratio((1.0,) * (rounds - 1), (2.0,) * (rounds - 1), ERROR_RATE / variants)
        assert enough.high < 1 < short.high


def test_only_what_was_timed_in_the_same_rounds_is_compared():
    steps = contest(np.random.default_rng(0), {"a": 0.5})
    dropped = Measured(0.1, 0.1, 0.1, 1, 1.0)
    assert set(ratios_to_stock({**steps, "dropped": dropped})) == {"a"}
    assert ratios_to_stock({"a": steps["a"]}) == {}
    with pytest.raises(ValueError, match="same rounds. Received: 2 and 3"):
        paired_ratio((1.0, 1.0), (1.0, 1.0, 1.0), 0.01)


def test_a_measurement_there_and_back():
    for measured in (Measured(1.0, 0.5, 1.5, 2, 0.25, samples=(0.9, 1.1)), Measured(error="no")):
        assert Measured.from_dict(measured.to_dict()) == measured
    for broken in ({"median": "x"}, {"samples": ["x"]}, {"count": "x"}):
        with pytest.raises(TypeError):
            Measured.from_dict(broken)
