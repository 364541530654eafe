"""Benchmarks that look times up instead of measuring them, for tests of decisions."""

import types

from diagconv_tf.lowerings import parse
from diagconv_tf.measurements import Measured
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning import tuner
from tests.fake_clock import FakeClock

#: Rounds of a contest, of which each shares its noise.
ROUNDS = 15
_COMMON = [1.0, 1.2, 0.9, 1.1, 1.05] * 3


def took(median, first=0.0, noise=0.0, rounds=ROUNDS):
    """Times in seconds; of every second round a share of `noise` more, of the others less."""
    samples = tuple(
        median * common * (1 + noise * (-1) ** number)
        for number, common in enumerate(_COMMON[:rounds])
    )
    return Measured(median, median, median, rounds, first, samples=samples)


FAILED = Measured(error="ValueError: no luck")


class FakeLab:
    """Replaces both benchmarks of `tuning`, and the check of numbers.

    Attributes:
        layer: function of (workload, candidate) that gives its times.
        step: function of (variant's name, path → lowering) that gives its times.
        wrong: lowerings that compute wrong numbers.
        measured: `(spec, stock op, candidate)` in the order of measuring.
        trained: `(name, variant)` in the order in which they were added.
        seconds: time that the measuring of one workload takes.
        first_step_seconds: time that a first step takes.
        default: times of Keras's default, compiled in another way.
        compared: `(name, variant, jit_compile)` of what was timed beside it.
    """

    def __init__(self, monkeypatch):
        self.clock = FakeClock()
        self.layer = lambda workload, name: took(1.0)
        self.step = lambda name, variant: took(1.0, first=1.0)
        self.wrong = set()
        self.checked = []
        self.measured = []
        self.trained = []
        self.seconds = 0.0
        self.first_step_seconds = 0.0
        self.default = took(1.0)
        self.compared = []
        lab = self

        def measure_alone(workload, names, conditions, clock):
            lab.clock.advance(lab.seconds)
            lab.measured += [(workload.spec, workload.stock_op, name) for name in names]
            return {name: lab.layer(workload, name) for name in names}

        class Contest:
            def __init__(self, model, batch_size, data, jit_compile, rules, clock):
                self.first = {}
                self.batch = types.SimpleNamespace(synthetic=("x", "y"))

            def add(self, name, variant):
                lab.clock.advance(lab.first_step_seconds)
                lab.trained.append((name, dict(variant)))
                self.first[name] = lab.step(name, variant)
                return self.first[name]

            def compare(self, name, variant, other, jit_compile):
                lab.compared.append((name, dict(variant), jit_compile))
                return {name: lab.step(name, variant), other: lab.default}

            def time(self, seconds):
                return dict(self.first)

        def why_wrong(spec, lowering, conditions):
            lab.checked.append((spec, lowering))
            return "no sum" if str(parse(lowering)) in lab.wrong else ""

        monkeypatch.setattr(tuner, "measure_alone", measure_alone)
        monkeypatch.setattr(tuner, "Contest", Contest)
        monkeypatch.setattr(tuner.checking, "why_wrong", why_wrong)

    @property
    def variants(self):
        return dict(self.trained)

    def by_name(self, seconds, default=9.0):
        """Sets `layer` by the candidate's name."""

        def layer(workload, name):
            value = seconds.get(name, default)
            return value if isinstance(value, Measured) else took(value)

        self.layer = layer

    def steps_by_name(self, seconds, default=9.0):
        """Sets `step` by the variant's name."""

        def step(name, variant):
            value = seconds.get(name, default)
            return value if isinstance(value, Measured) else took(value, first=1.0)

        self.step = step


__all__ = ["FAILED", "STOCK", "FakeLab", "took"]
