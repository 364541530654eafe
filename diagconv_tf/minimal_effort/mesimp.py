"""MeSimp: a model loses the hidden units that are rarely active, while it trains.

Source: Training Simplification and Model Simplification for Deep Learning: A Minimal Effort
Back Propagation Method, arXiv 1711.06528, section 3.2; where it leaves something open, the
authors' PyTorch code (`lancopku/meProp`, `meSimp`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import keras
import numpy as np
from absl import logging

from diagconv_tf import class_swap, keras_internals
from diagconv_tf.distribution import strategy_of
from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.lowbit.rounding import StochasticRounding
from diagconv_tf.minimal_effort import activeness
from diagconv_tf.minimal_effort.operands import TopK
from diagconv_tf.minimal_effort.optimizer_state import renew
from diagconv_tf.minimal_effort.removal import Remover
from diagconv_tf.minimal_effort.unit_graph import HiddenLayer, UnitGraph, unit_graph

#: A fraction of an epoch such as 1 / 3 is not exact.
_SLACK = 1e-6


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What one pruning did to one layer.

    Attributes:
        epoch: the epoch in which it was, from 0.
        path: the layer's path.
        examples: for how many examples activeness was counted.
        threshold: the number of hits below which a unit was removed.
        before: units that the layer had.
        after: units that it has left.
    """

    epoch: int
    path: str
    examples: int
    threshold: int
    before: int
    after: int


class MeSimp(keras.callbacks.Callback):
    """Removes units of minimal-effort layers that are rarely among the top k.

    A model that `rewrite(model, MinimalEffort(...))` returned trains in cycles. In the first,
    third, fifth … cycle rarely active units are removed, in the others it trains as it is, and
    recovers; the backward passes take the top k in all of them. A pruning removes the units
    that were active for fewer than `int(rate * examples)` examples since the last one.
    Activeness is counted as `ActivenessCounter` says.

    A removed unit has zeros for its own weights and for the rows that read it, and keeps them
    while this callback is there. Without it, it also does where zeros in front of its
    activation are zeros behind it (ReLU, tanh, …). `compact(model)` gives the smaller model.

    Pruned are the dense layers and convolutions with a `TopK` whose units can be taken out, by
    the graph: `plan_compaction` lists the others, with the reasons. For convolutions there
    is no source: they are an extension.

    While `fit` runs, layers have counters, which are among `model.trainable_weights`;
    checkpoints have them, too. Before and after it the model and its optimizer have nothing
    of this callback. After an exception in `fit`, counters stay, and the next `fit` goes on
    with them; `activeness.detach(model)` removes them. An epoch whose first batch has a number
    above 0 is the rest of a broken one: what its first batches had done is not done again.

    Args:
        rate: share of examples for which a unit must be active, above 0 and below 1.
        prune_every: fraction of an epoch between two prunings, above 0 and up to 1. Where the
            number of steps is not known, the first epoch has one pruning, at its end.
        cycle_epochs: epochs of a cycle.
        renew_optimizer: whether the optimizer's state starts anew with every cycle, as in
            the authors' code; the paper does not mention it. A learning-rate schedule then
            starts again, too.

    Attributes:
        prunings: what was done in the last `fit`: a list of `Pruning`.

    Raises:
        ValueError: if an argument is out of range; and when `fit` starts, if the model has no
            minimal-effort layer, none that can lose units, no graph, or an optimizer that
            rounds weights; and later, if a pruning would remove all units of a layer.
    """

    def __init__(
        self,
        rate: float = 0.1,
        prune_every: float = 1 / 8,
        cycle_epochs: int = 5,
        renew_optimizer: bool = True,
    ) -> None:
        super().__init__()
        if not _is_number(rate) or not 0 < rate < 1:
            raise ValueError(
                f"Expected `rate` to be a number above 0 and below 1. Received: rate={rate!r}"
            )
        if not _is_number(prune_every) or not 0 < prune_every <= 1:
            raise ValueError(
                "Expected `prune_every` to be a fraction of an epoch, above 0 and up to 1. "
                f"Received: prune_every={prune_every!r}"
            )
        if isinstance(cycle_epochs, bool) or not isinstance(cycle_epochs, int) or cycle_epochs < 1:
            raise ValueError(
                "Expected `cycle_epochs` to be an integer of at least 1. "
                f"Received: cycle_epochs={cycle_epochs!r}"
            )
        if not isinstance(renew_optimizer, bool):
            raise ValueError(
                f"Expected `renew_optimizer` to be a bool. Received: {renew_optimizer!r}"
            )
        self.rate = rate
        self.prune_every = prune_every
        self.cycle_epochs = cycle_epochs
        self.renew_optimizer = renew_optimizer
        self.prunings: list[Pruning] = []
        self._run: _Run | None = None
        self._steps: int | None = None
        self._epoch = 0
        self._begins = False
        self._simplifies = False
        self._prunings_due = 0
        self._seen = 0
        self._is_training = False

    def set_params(self, params: Any) -> None:
        # The first that a callback learns of a `fit`. Another callback, listed before this one,
        # may load a checkpoint as soon as the training begins: counters must be there.
        super().set_params(params)
        if self._run is None:
            self._run = _Run(self.model)
            self.prunings = []
            self._is_training = False
        self._steps = (params or {}).get("steps")

    def on_test_begin(self, logs: Any = None) -> None:
        self._leave_unless_trained()

    def on_predict_begin(self, logs: Any = None) -> None:
        self._leave_unless_trained()

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_training = True

    def on_train_end(self, logs: Any = None) -> None:
        self._leave()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._begins = epoch, True
        self._simplifies = epoch // self.cycle_epochs % 2 == 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not self._begins:
            return
        self._begins = False
        self._prunings_due = self.due(batch)
        if batch == 0:
            self._begin_cycle(self._epoch)

    def _begin_cycle(self, epoch: int) -> None:
        if epoch % self.cycle_epochs != 0 or self._run is None:
            return
        # Brings the variables up to date, on JAX.
        model = self.model
        if self._simplifies:
            self._run.reset()
        if self.renew_optimizer and epoch > 0:
            with _scope(model):
                renew(model.optimizer, keras_internals.optimized_variables(model.optimizer))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._steps is None:
            self._seen = batch + 1
            return
        if not self._simplifies:
            return
        # With several steps per execution, some batches have no call.
        done = self.due(batch + 1)
        if done > self._prunings_due:
            self._prunings_due = done
            self._prune()

    def due(self, batches: int) -> int:
        """How many prunings an epoch has had after so many batches; 0 while that is not known."""
        if self._steps is None:
            return 0
        return math.floor(batches / (self._steps * self.prune_every) + _SLACK)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._steps is None:
            self._steps = self._seen
            if self._simplifies:
                self._prune()

    def _prune(self) -> None:
        if self._run is None:
            return
        keras_internals.sync_training_state(self.model)
        done = self._run.prune(self.rate, self._epoch)
        self.prunings += done
        for pruning in done:
            logging.info(
                "Epoch %d: '%s' keeps %d of %d units (active for %d of %d examples at least).",
                pruning.epoch + 1,
                pruning.path,
                pruning.after,
                pruning.before,
                pruning.threshold,
                pruning.examples,
            )

    def _leave_unless_trained(self) -> None:
        if not self._is_training:
            self._leave()

    def _leave(self) -> None:
        self._is_training = False
        if self._run is not None:
            activeness.detach(self.model)
            self._run = None


class _Run:
    """The model of one `fit`, its units, and those that are left."""

    def __init__(self, model: keras.Model) -> None:
        with class_swap.lock, _scope(model):
            self.graph: UnitGraph = unit_graph(model)
            chosen = _prunable(model, self.graph)
            activeness.attach(model, self.graph, chosen)
            self.remover = Remover(self.graph, model.optimizer)
        self.layers = [layer for layer, _ in chosen]

    def reset(self) -> None:
        for layer in self.layers:
            self._counter(layer).reset()

    def prune(self, rate: float, epoch: int) -> list[Pruning]:
        removed = self.graph.removed()
        gone: np.ndarray = np.zeros(self.graph.count, bool)
        done = []
        for layer in self.layers:
            found = self._counter(layer).read()
            threshold = int(found.examples * rate)
            there = ~removed[layer.numbers]
            falls = there & (found.hits < threshold)
            if falls.any() and (falls == there).all():
                raise ValueError(
                    f"Expected a `rate` at which some unit of '{layer.path}' stays. Received: "
                    f"rate={rate}, but the most active one of {there.sum()} was so for "
                    f"{found.hits[there].max()} of {found.examples} examples"
                )
            gone[layer.numbers] = falls
            before = int(there.sum())
            after = before - int(falls.sum())
            done.append(Pruning(epoch, layer.path, found.examples, threshold, before, after))
        if gone.any():
            self.remover.remove(gone)
        self.reset()
        return done

    @staticmethod
    def _counter(layer: HiddenLayer) -> activeness.ActivenessCounter:
        counter = activeness.counter_of(layer.layer)
        assert counter is not None  # It is taken away when `fit` ends.
        return counter


def _scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """In which the model's `tf.distribute` strategy makes variables."""
    strategy = strategy_of(model)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def _prunable(model: keras.Model, graph: UnitGraph) -> list[tuple[HiddenLayer, int]]:
    """The layers that can lose units, each with the number of active units of an example.

    Raises:
        ValueError: if there are none; the message says why.
    """
    optimizer = getattr(model, "optimizer", None)
    while optimizer is not None:
        if isinstance(optimizer, StochasticRounding):
            raise ValueError(
                "Expected an optimizer that leaves zeros as they are. Received: "
                "StochasticRounding, which rounds weights to a grid"
            )
        optimizer = getattr(optimizer, "inner_optimizer", None)
    with_top_k = [
        (layer, operand.keeps(layer.count))
        for layer in graph.hidden
        if isinstance(operand := operands_of(layer.layer).gradients, TopK)
    ]
    if not with_top_k:
        raise ValueError(
            "Expected a model with minimal-effort layers, as rewrite(model, MinimalEffort(k=...)) "
            f"makes it. Received: '{model.name}', which has no dense layer or convolution that "
            "trains with the top k"
        )
    reasons = {layer.path: layer.reasons or _frozen(layer) for layer, _ in with_top_k}
    prunable = [(layer, k) for layer, k in with_top_k if not reasons[layer.path]]
    if not prunable:
        whole = "; ".join(f"{path}: {', '.join(why)}" for path, why in reasons.items())
        raise ValueError(
            f"Expected a minimal-effort layer that can lose units. Received: '{model.name}', in "
            f"which none can ({whole})"
        )
    return prunable


def _frozen(layer: HiddenLayer) -> tuple[str, ...]:
    return () if layer.layer.trainable else ("it is frozen: nothing counts its active units",)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
