"""Times of a training step that can be compared: all variants in turn, after the training.

Times taken in the training do not compare: variants train one after another,
and in between the machine gets warm, or other work comes and goes. So here the
trained variants take turns of a few steps, and each is compared with another
turn by turn. A turn is a `fit` of Keras, on one batch that is there already and
then on the input pipeline: the difference is the wait for input, taken within
the same seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from diagconv_tf import keras_internals
from diagconv_tf.timing import percentile, synchronize

#: Turns of each variant, at most.
TURNS = 5

#: Steps of a turn that count, and those before them: the first ones start the input.
STEPS = 5
_LEFT_OUT = 2

#: No further turn begins after so many seconds.
BUDGET_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How long the steps of one variant are, those of another being 1.

    Attributes:
        median: of the turns' ratios of medians.
        lowest: of these ratios.
        highest: likewise.
    """

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.lowest:.2f}–{self.highest:.2f})"


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a variant's training steps, by turns.

    A step lasts from the end of the one before to its own end, on every
    backend, with the device idle at both ends.

    Attributes:
        turns: on a batch that is there already.
        input_turns: on the input pipeline; empty where that was not timed.
    """

    turns: tuple[tuple[float, ...], ...]
    input_turns: tuple[tuple[float, ...], ...] = ()

    @property
    def samples(self) -> tuple[float, ...]:
        """Those of all turns, on a batch that is there already."""
        return tuple(seconds for turn in self.turns for seconds in turn)

    def percentile(self, percent: float) -> float | None:
        """Of the samples, in seconds; None where there are none."""
        return percentile(self.samples, percent)

    @property
    def input_wait(self) -> float | None:
        """The share of a step that waits for its input, in [0, 1]: the median of the turns."""
        shares = [
            1 - statistics.median(there) / statistics.median(read)
            for there, read in zip(self.turns, self.input_turns, strict=False)
        ]
        return max(0.0, statistics.median(shares)) if shares else None

    def compared_with(self, other: StepTimes) -> Comparison:
        """The steps in parts of those of `other`, turn by turn."""
        ratios = [
            statistics.median(mine) / statistics.median(theirs)
            for mine, theirs in zip(self.turns, other.turns, strict=False)
        ]
        return Comparison(statistics.median(ratios), min(ratios), max(ratios))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StepTimes:
        """What `dataclasses.asdict` made, after JSON."""
        return cls(**{name: tuple(map(tuple, turns)) for name, turns in fields.items()})


@dataclasses.dataclass(frozen=True)
class Timed:
    """A model that takes turns.

    Attributes:
        model: compiled. It, its optimizer and its metrics are afterwards what
            they were. One that has been trained is not compiled again: the
            shapes are those of the training.
        repeated: makes a data set of one batch, as the training has it.
        read: makes that of the input pipeline; None where that is not timed.
    """

    model: keras.Model
    repeated: Callable[[], Any]
    read: Callable[[], Any] | None = None


def time_in_turn(
    timed: Mapping[str, Timed],
    *,
    turns: int = TURNS,
    steps: int = STEPS,
    budget_seconds: float = BUDGET_SECONDS,
    agreed: Callable[[str], str] = str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, StepTimes]:
    """Times the training steps of several models, which take turns.

    Each first makes a step that does not count, which compiles what has not
    been compiled. Who follows whom changes from turn to turn.

    Args:
        timed: name → model.
        turns: at most.
        steps: of a turn that count.
        budget_seconds: no further turn begins after so many.
        agreed: of several processes that train together, what the first one
            says: all must make the same turns.
        clock: returns the time in seconds.

    Returns:
        Name → times, in the order of `timed`; of all the same number of turns.
    """
    there: dict[str, list[tuple[float, ...]]] = {name: [] for name in timed}
    read: dict[str, list[tuple[float, ...]]] = {name: [] for name in timed}
    names = list(timed)
    with contextlib.ExitStack() as stack:
        rewind = {name: stack.enter_context(_preserved(each.model)) for name, each in timed.items()}

        def turn(name: str, dataset: Any, steps: int) -> tuple[float, ...]:
            rewind[name]()
            return _fit(timed[name].model, dataset, steps, clock)

        for name in names:
            turn(name, timed[name].repeated(), 0)
        start = clock()
        for number in range(turns):
            over = number > 0 and clock() - start >= budget_seconds
            if agreed("end" if over else "go on") == "end":
                break
            for name in names[number % len(names) :] + names[: number % len(names)]:
                there[name].append(turn(name, timed[name].repeated(), steps))
                make = timed[name].read
                if make is not None:
                    read[name].append(turn(name, make(), steps))
    return {name: StepTimes(tuple(there[name]), tuple(read[name])) for name in names}


def _fit(
    model: keras.Model, dataset: Any, steps: int, clock: Callable[[], float]
) -> tuple[float, ...]:
    periods = _Periods(clock)
    model.fit(
        dataset,
        steps_per_epoch=_LEFT_OUT + steps,
        shuffle=False,
        callbacks=[periods],
        verbose=0,
    )
    return tuple(periods.seconds[_LEFT_OUT - 1 :])


class _Periods(keras.callbacks.Callback):
    """Keeps the seconds between the ends of two steps.

    The wait for input is in them wherever the backend has it: within Keras's
    step, or before it, as on PyTorch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._clock = clock
        self._last: float | None = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # `self.model` would make JAX write its state back on every step.
        model = keras_internals.callback_model(self)
        synchronize((keras_internals.training_state(model), logs))
        now = self._clock()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


@contextlib.contextmanager
def _preserved(model: keras.Model) -> Iterator[Callable[[], None]]:
    """Yields what brings the variables back, which is also done at the end."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = list({id(v): v for v in (*model.variables, *model.optimizer.variables)}.values())
    # A copy: on CPUs the array may be the memory of the variable itself.
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
    # A model that was never trained has no history.
    history, stopped = getattr(model, "history", None), model.stop_training

    def rewind() -> None:
        # On JAX also before each `fit`: Keras leaves weights and their moving averages
        # as one array at the end of one, and the next cannot donate that twice.
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)

    try:
        yield rewind
    finally:
        rewind()
        model.history, model.stop_training = history, stopped
