"""Times whole training steps of a model's variants, in turn, on one copy of it.

Layers change class in place, so all variants share one copy of the model, its
weights and its optimizer: after the change Keras creates a training function, whose
first call traces and compiles. Functions compiled earlier stay what they were; but
because an uncompiled one reads the layers at each call, a variant's classes are set
before every step, which takes microseconds.

All variants start from the same values. After a step that fails the model goes back to
them: JAX gives the state away with each step, so it is lost for all variants.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from diagconv_tf import keras_internals
from diagconv_tf.class_swap import LayerState, become, recompile
from diagconv_tf.copying import copy_model
from diagconv_tf.environment import Conditions
from diagconv_tf.measurements import Measured
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_family
from diagconv_tf.spec import STOCK
from diagconv_tf.timing import Timings, synchronize, time_interleaved
from diagconv_tf.tuning.candidates import Variant
from diagconv_tf.tuning.choosing import next_round
from diagconv_tf.tuning.sample_batch import sample_batch

#: Rounds of a contest, at most.
ROUNDS = 31

#: The rounds end after so many seconds, but not before those that a decision needs.
ROUNDS_SECONDS = 8.0

#: Steps in a sample where the device is not the host: as in `fit`, the host is ahead
#: of it. (No GPU has been measured yet.)
STEPS_ON_DEVICE = 5

#: Rounds in which a variant is compared with Keras's default, compiled in another way.
#: That difference is large, or does not matter.
COMPARED_ROUNDS = 5

#: Rate of the descent that an uncompiled model is tuned with.
_LEARNING_RATE = 1e-3


def time_first_call(function: Callable[[], Any], clock: Callable[[], float]) -> Measured:
    """The seconds of a call that traces and compiles, or its error."""
    start = clock()
    try:
        synchronize(function())
    except Exception as error:
        return Measured.failed(error)
    return Measured(first_seconds=clock() - start)


def time_rounds(
    functions: Mapping[str, Callable[[], Any]],
    first: Mapping[str, Measured],
    *,
    seconds: float,
    calls: int,
    clock: Callable[[], float],
    on_error: Callable[[], Any] | None = None,
) -> dict[str, Measured]:
    """Times functions in turn until `choosing.next_round` ends the contest.

    Args:
        functions: name → function without arguments; `"stock"` among them.
        first: name → its first call; what failed there does not run again.
        seconds: the rounds end after so many, if a decision is possible.
        calls: calls one after another that a sample is the mean of.
        clock: returns the time in seconds.
        on_error: as for `time_interleaved`.
    """

    def measured(name: str, timings: Timings) -> Measured:
        return Measured.from_timings(timings, first[name].first_seconds)

    def select(samples: Mapping[str, Sequence[float]]) -> Collection[str]:
        steps = {name: measured(name, Timings(tuple(s))) for name, s in samples.items()}
        return next_round(steps, seconds / calls)

    timings = time_interleaved(
        {name: function for name, function in functions.items() if first[name].error is None},
        rounds=ROUNDS,
        warmup=0,
        calls=calls,
        first_calls=False,
        select=select,
        on_error=on_error,
        clock=clock,
    )
    return {n: measured(n, timings[n]) if n in timings else first[n] for n in functions}


def _calls() -> int:
    return 1 if Conditions.current().device_kind == "cpu" else STEPS_ON_DEVICE


class TrainingSteps:
    """Runs the training function of a model on one batch, again and again, as `fit` does.

    `train_on_batch` reads the loss back after each step, and on JAX moves all
    variables into the step and out of it: on a GPU this can take as long as the
    step. On JAX the variables of the model are given away with the first step;
    only the training goes on, with a state of its own.

    Args:
        model: a compiled model; at each step `model.train_function` runs.
        x: inputs, on the device.
        y: targets, or None.
        sample_weight: or None.
    """

    def __init__(self, model: keras.Model, x: Any, y: Any, sample_weight: Any = None) -> None:
        self.model = model
        self.batch = (x, y, sample_weight)
        self._is_built = False
        self._state: Any = None
        self._initial: list[tuple[keras.Variable, np.ndarray]] | None = None

    def run(self) -> tuple[Any, Any]:
        """Runs one step.

        Returns:
            The logs, and on JAX the state, which is computed apart from them:
            both have to be waited for.
        """
        self._build()
        backend = keras.backend.backend()
        train = self.model.train_function
        if backend == "jax":
            if self._state is None:
                self._state = keras_internals.take_training_state(self.model)
            logs, self._state = train(self._state, iter([self.batch]))
            return logs, self._state
        return train([self.batch] if backend == "torch" else iter([self.batch])), None

    def rewind(self) -> None:
        """Goes back to the values at its first call, which keeps them on the host.

        It does so after a failed step, too: JAX may have deleted the state by then.
        """
        self._build()
        self._state = None
        if self._initial is None:
            model = self.model
            if not model.optimizer.built:  # Only JAX needs it before the first step.
                model.optimizer.build(model.trainable_variables)
            variables = [
                *model.trainable_variables,
                *model.non_trainable_variables,
                *model.optimizer.variables,
                *model.metrics_variables,
            ]
            # A copy: the arrays of a CPU may share memory with the variables.
            self._initial = [(v, np.array(ops.convert_to_numpy(v))) for v in variables]
        for variable, value in self._initial:
            variable.assign(value)

    def _build(self) -> None:
        if not self._is_built:
            keras_internals.build_for_training(self.model, self.batch)
            self._is_built = True


class Contest:
    """A copy of a model, to be trained in several variants on one device.

    Args:
        model: a built model; it is not changed.
        batch_size: images in a batch.
        data: a sample batch, or None; see `sample_batch`.
        jit_compile: as for `compile`; `"auto"` keeps what the model has.
        rules: which layers can be rewritten.
        clock: returns the time in seconds.

    Attributes:
        batch: what it trains on.
        first: variant → its first step, or the error of it.

    Raises:
        ValueError: if no faithful copy can be made, or no inputs synthesised.
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
        # With several steps in one execution, a sample would be their sum.
        self.model.steps_per_execution = 1
        self.batch = sample_batch(self.model, batch_size, data)
        self._steps = TrainingSteps(
            self.model, self.batch.x, self.batch.y, self.batch.sample_weight
        )
        self._clock = clock
        self._layers = {
            place.path: (place.layer, family)
            for place in walk_layers(self.model)
            if (family := find_family(type(place.layer), rules)) is not None
        }
        #: Variant → what its layers are, and its training function.
        self._variants: dict[str, tuple[list[LayerState], Any]] = {}
        self.first: dict[str, Measured] = {}

    def add(self, name: str, variant: Variant) -> Measured:
        """Compiles a variant, and returns the time of its first step, or its error."""
        states = [
            become(layer, family, variant.get(path, STOCK))
            for path, (layer, family) in self._layers.items()
        ]
        recompile(self.model, "train")
        self._variants[name] = states, self.model.train_function
        try:
            self._steps.rewind()
        except Exception as error:  # Its optimizer cannot be built, say.
            self.first[name] = Measured.failed(error)
        else:
            self.first[name] = time_first_call(lambda: self._step(name), self._clock)
        return self.first[name]

    def compare(
        self, name: str, variant: Variant, other: str, jit_compile: bool
    ) -> dict[str, Measured]:
        """Times a variant, and stock compiled in another way, for a few steps in turn.

        Args:
            name: of the variant; it is compiled if it was not added.
            variant: path → lowering.
            other: the name of stock, compiled as `jit_compile` says.
            jit_compile: as for `compile`.
        """
        if name not in self._variants:
            self.add(name, variant)
        former, self.model.jit_compile = self.model.jit_compile, jit_compile
        try:
            self.add(other, {})
        finally:
            self.model.jit_compile = former
        first = {name: self.first[name], other: self.first.pop(other)}
        running = [each for each in first if first[each].error is None]
        if running:
            self._steps.rewind()  # A first step may have failed.
        timings = time_interleaved(
            {each: functools.partial(self._step, each) for each in running},
            rounds=COMPARED_ROUNDS,
            warmup=0,
            calls=_calls(),
            first_calls=False,
            on_error=self._steps.rewind,
            clock=self._clock,
        )
        return {
            each: Measured.from_timings(timings[each], first[each].first_seconds)
            if each in timings
            else first[each]
            for each in first
        }

    def time(self, seconds: float = ROUNDS_SECONDS) -> dict[str, Measured]:
        """Times the training steps of all variants that were added, in turn.

        Args:
            seconds: the rounds end after so many, if a decision is possible.
        """
        if any(first.error is None for first in self.first.values()):
            self._steps.rewind()  # A first step may have failed.
        return time_rounds(
            {name: functools.partial(self._step, name) for name in self.first},
            self.first,
            seconds=seconds,
            calls=_calls(),
            clock=self._clock,
            on_error=self._steps.rewind,
        )

    def _step(self, name: str) -> tuple[Any, Any]:
        states, self.model.train_function = self._variants[name]
        for state in states:
            state.set()
        return self._steps.run()
