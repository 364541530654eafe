"""Times whole training steps of a model's variants, in turn, on one copy of it.

A variant is a lowering for each layer. Layers change class in place, so all
variants share one copy of the model, its weights and its optimizer: after the
change Keras makes a training function, whose first call traces and compiles.
Functions compiled earlier stay what they were; but because an uncompiled one
reads the layers at each call, a variant's classes are set before every step,
which takes microseconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from absl import logging

from diagconv_tf.class_swap import LayerState, become, recompile
from diagconv_tf.copying import copy_model
from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import LoweringLike
from diagconv_tf.measurements import Measured
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_rule
from diagconv_tf.spec import STOCK
from diagconv_tf.timing import time_interleaved
from diagconv_tf.training_steps import TrainingSteps
from diagconv_tf.tuning.pruning import first_samples
from diagconv_tf.tuning.sample_batch import sample_batch

#: Layer path → lowering; what is not named is stock.
Variant = Mapping[str, LoweringLike]

#: Timed steps of each variant that is left after the first.
ROUNDS = 11

#: The timed rounds end after so many seconds (but not before the first).
ROUNDS_SECONDS = 30.0

#: Steps in a sample where the device is none of the host's own: as in `fit`, the
#: host is ahead of it. (No GPU has been measured yet.)
STEPS_ON_DEVICE = 5

#: A variant whose first timed steps took so many times as long as the best
#: other's is dropped; stock is not.
DROP_ABOVE = 2.0

#: Rate of the descent that an uncompiled model is tuned with.
_LEARNING_RATE = 1e-3


class TrainingBench:
    """A copy of a model, to be trained in several variants on one device.

    Args:
        model: a built model; it is not changed.
        batch_size: images in a batch.
        data: a sample batch, or None; see `sample_batch`.
        jit_compile: as for `compile`; `"auto"` keeps what the model has.
        rules: which layers can be rewritten.
        clock: returns the time in seconds.

    Raises:
        ValueError: if no faithful copy can be made, or no inputs made up.
    """

    def __init__(
        self,
        model: keras.Model,
        batch_size: int,
        data: Any = None,
        jit_compile: bool | str = "auto",
        rules: Sequence[Rule] = DEFAULT_RULES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.model = copy_model(model, distributed=False)
        if not self.model.compiled:
            logging.warning(
                "%s is not compiled: it is tuned with a mean of squares and plain gradient "
                "descent.",
                model.name,
            )
            self.model.compile(keras.optimizers.SGD(_LEARNING_RATE), "mse", jit_compile=jit_compile)
        elif jit_compile != "auto":
            self.model.jit_compile = jit_compile
        # Of several steps in one execution, time is the multiple.
        self.model.steps_per_execution = 1
        self.batch = sample_batch(self.model, batch_size, data)
        self._steps = TrainingSteps(
            self.model, self.batch.x, self.batch.y, self.batch.sample_weight
        )
        on_host = Conditions.current().device_kind == "cpu"
        self._calls = 1 if on_host else STEPS_ON_DEVICE
        self._layers = {
            place.path: (place.layer, find_rule(place.layer, rules))
            for place in walk_layers(self.model)
            if find_rule(place.layer, rules) is not None
        }
        self._variants: dict[str, _Compiled] = {}
        self.first: dict[str, Measured] = {}

    def add(self, name: str, variant: Variant) -> Measured:
        """Makes a variant, and runs its first step.

        Returns:
            The seconds of the first step, or its error.
        """
        states = [
            become(layer, rule, variant.get(path, STOCK))
            for path, (layer, rule) in self._layers.items()
        ]
        recompile(self.model, "train")
        self._variants[name] = _Compiled(states, self.model.train_function)
        timings = first_samples({name: lambda: self._step(name)}, self.clock, self._calls)[name]
        self.first[name] = Measured.from_timings(timings)
        return self.first[name]

    def time(
        self,
        names: Sequence[str],
        rounds: int = ROUNDS,
        seconds: float = ROUNDS_SECONDS,
    ) -> dict[str, Measured]:
        """Times of the training steps of variants that were added, in turn."""
        measured = {name: self.first[name] for name in names}
        running = [name for name in names if measured[name].ok]
        best = min((measured[name].median for name in running), default=0.0)
        left = [n for n in running if n == STOCK or measured[n].median <= DROP_ABOVE * best]
        if left:
            timings = time_interleaved(
                {name: (lambda name=name: self._step(name)) for name in left},
                rounds=rounds,
                warmup=0,
                calls=self._calls,
                budget_seconds=seconds,
                clock=self.clock,
            )
            for name in left:
                first_seconds = self.first[name].first_seconds
                measured[name] = Measured.from_timings(timings[name], first_seconds)
        return measured

    def _step(self, name: str) -> Any:
        variant = self._variants[name]
        for state in variant.states:
            state.set()
        self.model.train_function = variant.train_function
        return self._steps.run()


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A variant: what its layers are, and its training function."""

    states: list[LayerState]
    train_function: Any
