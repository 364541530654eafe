"""What ends a training before its time: a signal, or a loss that is no number."""

from __future__ import annotations

import math
import os
import pathlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import keras

#: Exit code of a training that was interrupted and can go on: `EX_TEMPFAIL` of
#: sysexits.h, "try again".
EXIT_INTERRUPTED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(Exception):  # noqa: N818 - as KeyboardInterrupt, it is no error.
    """A signal has ended the training.

    Args:
        signal_name: such as `"SIGTERM"`.
        step: batches that the model has been trained on.
        path: of the checkpoint from which it goes on; `None` if there is none.

    Attributes:
        flags: what to add to the command to go on.
    """

    def __init__(self, signal_name: str, step: int, path: pathlib.Path | None):
        self.signal_name = signal_name
        self.step = step
        self.path = path
        self.flags = "--resume"
        super().__init__(signal_name, step, path)

    def __str__(self) -> str:
        return (
            f"Interrupted by {self.signal_name} after step {self.step}. The same command with "
            f"{self.flags} "
            + (
                f"goes on from {self.path}"
                if self.path
                else "starts from the beginning: there is no checkpoint yet"
            )
        )


class NonFiniteLossError(FloatingPointError):
    """Loss or weights are NaN or infinite: nothing good can come of further steps."""


class Interruption:
    """Notices SIGTERM and SIGINT while it is entered.

    The first of them only sets `signal_name`, so that the step can be finished
    and saved; a SIGINT after it ends the process at once, even in the middle of
    a compilation. Afterwards the signals are handled as before; one that came
    too late to end the training is then given again.

    In other threads than the main one Python cannot handle signals: there it
    notices nothing.

    Attributes:
        signal_name: such as `"SIGTERM"`; `None` if none has come.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._former: dict[int, Any] = {}
        self._process: int | None = None

    def asked(self, step: int | None = None) -> bool:
        """Whether the training shall end here.

        Args:
            step: batches that the model has been trained on; None where a step
                is not finished.
        """
        return self.signal_name is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            # None: it was not set from Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()
        if kind is None and self.signal_name is not None and self._process is not None:
            signal.raise_signal(signal.Signals[self.signal_name])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker has inherited this, but is ended in the usual way.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            tell_of_saving(self.signal_name)


def tell_of_saving(signal_name: str) -> None:
    """Says on stderr that the signal was noticed."""
    # Not `print`: the signal may have come in the middle of one.
    os.write(2, f"\n{signal_name}: saving after this step (Ctrl-C: end at once)\n".encode())


class LossCheck:
    """Watches for a loss that is NaN or infinite.

    Keras's `TerminateOnNaN` ends the training as if it were complete: the model
    would be evaluated, saved and reported. And it knows neither the learning
    rate nor what to do.

    What this looks at is Keras's mean over the epoch so far. It stays NaN or
    infinite once a loss was, so it need not be looked at in every step.
    Non-finite gradients are no reason to stop: the dynamic loss scale of
    float16 causes them now and then, and skips the step.
    """

    def __init__(self) -> None:
        self._loss, self._step = math.nan, 0
        self._last: tuple[float, int] | None = None

    def passes(self, logs: dict[str, Any] | None, step: int) -> bool:
        """Whether the loss in Keras's `logs` is finite, if there is one.

        Args:
            logs: of a batch or an epoch.
            step: batches that the model has been trained on.
        """
        if not logs or "loss" not in logs:
            return True
        self._loss, self._step = float(keras.ops.convert_to_numpy(logs["loss"])), step
        if math.isfinite(self._loss):
            self._last = self._loss, step
            return True
        return False

    def error(self, model: keras.Model, epoch: int) -> NonFiniteLossError:
        """What to raise when `passes` was false.

        Args:
            model: compiled.
            epoch: from 0.
        """
        return self._error(f"The loss is {self._loss}", self._step, model, epoch)

    def error_of_weights(self, model: keras.Model, step: int, epoch: int) -> NonFiniteLossError:
        """What to raise where the loss is finite, but the step has left weights that are not.

        Args:
            model: compiled.
            step: batches that the model has been trained on.
            epoch: from 0.
        """
        return self._error("Weights are NaN or infinite", step, model, epoch)

    def _error(self, what: str, step: int, model: keras.Model, epoch: int) -> NonFiniteLossError:
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        policies = sorted({layer.dtype_policy.name for layer in model.layers})
        last = "no mean before was looked at"
        if self._last is not None:
            last = "the last finite mean was {:.6g} after step {}".format(*self._last)
        advice = ["a lower learning rate", "a longer warm-up"]
        if any("float16" in name.replace("bfloat16", "") for name in policies):
            advice.append("bfloat16 instead of float16")
        return NonFiniteLossError(
            f"{what} after step {step}, in epoch {epoch + 1} (learning rate {rate:.3g}, "
            f"{', '.join(policies)}); {last}. Try {', '.join(advice)}, or look for broken images "
            "and labels: in a run of another --name, because --resume keeps the settings of this "
            "one. Nothing was saved since: the last checkpoint is good"
        )
