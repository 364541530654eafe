"""Benches that look times up instead of measuring them, for tests of decisions."""

import types

from diagconv_tf.measurements import Measured
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning import tuner
from tests.fake_clock import FakeClock


def took(median, spread=0.0, first=0.0, count=9):
    """Times in seconds; `spread` is half of p90 - p10."""
    return Measured(median, median - spread, median + spread, count, first)


FAILED = Measured(error="ValueError: no luck")


class FakeLab:
    """In place of both benches of `tuning`.

    Attributes:
        layer: function of (problem, pass, candidate) that gives its times.
        step: function of (variant's name, path → lowering) that gives its.
        measured: `(path-less problem, pass, candidate)` in the order of measuring.
        trained: `(name, variant)` in the order in which they were added.
        seconds: how long the measuring of one pass, and of a first step, takes.
    """

    def __init__(self, monkeypatch):
        self.clock = FakeClock()
        self.layer = lambda problem, pass_name, name: took(1.0)
        self.step = lambda name, variant: took(1.0, first=1.0)
        self.measured = []
        self.trained = []
        self.seconds = 0.0
        self.first_step_seconds = 0.0
        self.budgets = []
        lab = self

        class ProblemBench:
            def __init__(self, problem, conditions, clock):
                self.problem = problem

            def measure(self, pass_name, names, best=None):
                lab.clock.advance(lab.seconds)
                lab.measured += [(self.problem, pass_name, name) for name in names]
                return {name: lab.layer(self.problem, pass_name, name) for name in names}

        class TrainingBench:
            def __init__(self, model, batch_size, data, jit_compile, rules, clock):
                self.first = {}
                self.batch = types.SimpleNamespace(synthetic=("x", "y"))

            def add(self, name, variant):
                lab.clock.advance(lab.first_step_seconds)
                lab.trained.append((name, dict(variant)))
                self.first[name] = lab.step(name, variant)
                return self.first[name]

            def time(self, names, seconds):
                lab.budgets.append(seconds)
                return {name: self.first[name] for name in names}

        monkeypatch.setattr(tuner, "ProblemBench", ProblemBench)
        monkeypatch.setattr(tuner, "TrainingBench", TrainingBench)

    @property
    def variants(self):
        return dict(self.trained)

    def by_name(self, seconds, default=9.0, passes=None):
        """`layer` by the candidate's name, or by `(pass, name)`."""

        def layer(problem, pass_name, name):
            value = seconds.get((pass_name, name), seconds.get(name, default))
            return value if isinstance(value, Measured) else took(value)

        self.layer = layer

    def steps_by_name(self, seconds, default=1.0):
        def step(name, variant):
            value = seconds.get(name, default)
            return value if isinstance(value, Measured) else took(value, first=1.0)

        self.step = step


__all__ = ["FAILED", "STOCK", "FakeLab", "took"]
