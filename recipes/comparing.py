"""The step times of a run: its variants and Keras's default take turns."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
from absl import logging

from diagconv_tf import files, keras_internals
from diagconv_tf.text import summarize_error
from recipes.data.synthetic import RepeatedBatch
from recipes.processes import Processes
from recipes.results import Trained
from recipes.step_times import StepTimes, Timed, time_in_turn
from recipes.variants import STOCK

#: The row of Keras's own layers, compiled as Keras does by itself, where no variant is that.
KERAS_DEFAULT = "Keras's default"


@dataclasses.dataclass(frozen=True)
class ComparedSteps:
    """What the steps of a run's variants take.

    Attributes:
        times: of each variant, and of Keras's default; empty where the timing
            failed.
        default: the name of Keras's default in `times`.
        error: why the timing failed; empty where it did not.
    """

    times: dict[str, StepTimes] = dataclasses.field(default_factory=dict)
    default: str = KERAS_DEFAULT
    error: str = ""


def compare_steps(
    trained: Sequence[Trained],
    make_default: Callable[[], keras.Model],
    read: Callable[[], Any],
    file: pathlib.Path,
    processes: Processes,
) -> ComparedSteps:
    """Times the steps of all variants, and of Keras's default, in turn.

    They are kept in a file: a finished run that is resumed is not timed again.

    Args:
        trained: the variants; of two that share a model one is timed.
        make_default: makes Keras's own layers, compiled as Keras does by
            itself. It is called where no variant is that.
        read: makes the data set of the training.
        file: where the times are kept; of several processes the first reads
            and writes it.
        processes: those that train together.
    """
    default = next((x.result.name for x in trained if _is_default(x)), KERAS_DEFAULT)
    names = {x.result.name for x in trained} | {default}
    if not any(each.is_new for each in trained):
        text = processes.from_first(file.read_text() if file.exists() else "{}")
        kept = {name: StepTimes.from_dict(fields) for name, fields in json.loads(text).items()}
        if names <= kept.keys():
            return ComparedSteps(kept, default)
    try:
        data = read()
        repeated, pipeline = _one_batch(data), None if isinstance(data, RepeatedBatch) else read
        timed = {}
        if default == KERAS_DEFAULT:
            timed[default] = Timed(make_default(), repeated)
        of_model = {id(x.model): x for x in reversed(trained)}
        timed |= {
            x.result.name: Timed(x.model, repeated, pipeline)
            for x in trained
            if x is of_model[id(x.model)]
        }
        found = time_in_turn(timed, agreed=processes.from_first)
    except Exception as error:  # Hours of training are worth more than these seconds.
        text = f"the steps could not be timed: {summarize_error(error)}"
        logging.warning("%s", text)
        return ComparedSteps(default=default, error=text)
    times = {x.result.name: found[of_model[id(x.model)].result.name] for x in trained}
    times = {**found, **times}
    if processes.is_first:
        content = {name: dataclasses.asdict(each) for name, each in times.items()}
        files.write_text(file, json.dumps(content))
    return ComparedSteps(times, default)


def _is_default(trained: Trained) -> bool:
    """Whether a variant has Keras's own layers, compiled as Keras does by itself."""
    model = trained.model
    return trained.result.name == STOCK and bool(model.jit_compile) == (
        keras_internals.resolve_jit_compile(model)
    )


def _one_batch(data: Any) -> Callable[[], Any]:
    """Makes data sets of the first batch of `data`, in the form that `fit` was given."""
    if isinstance(data, RepeatedBatch):
        return lambda: data
    # TensorFlow is installed whatever the backend: the datasets need it.
    import tensorflow as tf

    batch = next(iter(data))
    return functools.partial(tf.data.Dataset.repeat, tf.data.Dataset.from_tensors(batch))
