"""`--profile`: a trace of a few steps, in which layers have their names."""

from __future__ import annotations

import pathlib
from typing import Any

import keras
from absl import logging

#: Steps before the trace: the first ones trace and compile.
BEFORE = 10
STEPS = 20


class Profile(keras.callbacks.Callback):
    """Traces `STEPS` steps, or some more, with the profiler of the backend.

    TensorFlow and JAX write what TensorBoard's profile plugin and Perfetto
    read; Keras opens a name scope for each layer, so that operations carry the
    layers' names. PyTorch writes a trace for Perfetto or chrome://tracing.
    It begins and ends with a group of steps: see `recipes.fitting.fit_from`.

    Args:
        folder: for the trace; it is made.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self.folder = folder
        self._steps = self._group_begin = 0
        self._end_at: int | None = None
        self._torch: Any = None
        self._running = False

    def on_train_batch_begin(self, batch, logs=None):
        self._group_begin = batch
        if self._end_at is None and self._steps >= BEFORE:
            self._end_at = self._steps + STEPS
            self.folder.mkdir(parents=True, exist_ok=True)
            self._start()
            self._running = True

    def on_train_batch_end(self, batch, logs=None):
        self._steps += batch - self._group_begin + 1
        if self._running and self._end_at is not None and self._steps >= self._end_at:
            self._end()

    def on_train_end(self, logs=None):
        if self._running:
            self._end()
        if self._end_at is None:
            logging.warning(
                "No profile: expected more than %d steps, received %d.", BEFORE, self._steps
            )

    def _start(self) -> None:
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            tf.profiler.experimental.start(str(self.folder))
        elif backend == "jax":
            import jax

            jax.profiler.start_trace(str(self.folder))
        else:
            import torch

            # Modules are told by the stack: Keras's layers are torch modules.
            self._torch = torch.profiler.profile(with_stack=True, with_modules=True)
            self._torch.start()

    def _end(self) -> None:
        self._running = False
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            tf.profiler.experimental.stop()
        elif backend == "jax":
            import jax

            jax.profiler.stop_trace()
        else:
            self._torch.stop()
            self._torch.export_chrome_trace(str(self.folder / "trace.json"))
            self._torch = None
