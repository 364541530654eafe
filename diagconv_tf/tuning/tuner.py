"""`tune`: which lowerings train a model fastest, measured where it will train.

A contest of whole training steps decides, among stock and a few choices for all layers:
under a compiler that fuses, times of layers do not add up. (In all 16 plans of
scripts/results, one lowering for all layers won.) With `per_layer=True` every distinct
workload is measured alone, too, and the choice for each enters the contest.

Where several devices share a batch, each computes its own images: one replica's part is
measured on one device, and where there are several processes on the first of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from absl import logging
from rich.console import Console

from diagconv_tf import distribution, keras_internals
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import ConvolutionRow, Inspection, inspect_as_built, inspect_model
from diagconv_tf.layers import kernel_channels_axis
from diagconv_tf.lowerings import LoweringLike, parse
from diagconv_tf.measurements import WRONG_NUMBERS, Measured, Workload
from diagconv_tf.model_tree import check_built
from diagconv_tf.plan import Plan
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.spec import STOCK
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import check_whole_number
from diagconv_tf.tuning import candidates, checking, choosing, keys
from diagconv_tf.tuning.cache import Cache
from diagconv_tf.tuning.candidates import Variant
from diagconv_tf.tuning.contest import ROUNDS_SECONDS, Contest
from diagconv_tf.tuning.layer_benchmark import measure_alone
from diagconv_tf.tuning.sample_batch import check_synthetic_inputs

#: The variant in which each layer has the lowering that was fastest for it alone.
PER_LAYER = "per_layer"

#: Keras's own layers, compiled as Keras does by itself.
DEFAULT = "default"

#: A variant is tried if so many times stock's first step is left of the budget: for its
#: own first step, and for the rounds.
_FIRST_STEPS_RESERVED = 2.0


def tune(
    model: keras.Model,
    batch_size: int,
    *,
    data: Any = None,
    jit_compile: bool | str = "auto",
    budget_seconds: float | None = None,
    cache_dir: str | os.PathLike | None = None,
    refresh: bool = False,
    rules: Sequence[Rule] = DEFAULT_RULES,
    per_layer: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Measures which lowerings train a model fastest, here.

    Stock and a few variants of the model train in turn for some steps each. A
    variant is chosen only if it is faster than stock, round by round: with a
    probability of at most 1 % any variant wins that is not
    (`measurements.ratios_to_stock`). The steps end as soon as that is decided.
    Nor can a variant win that computes wrong numbers: its workloads are
    compared with float64 (`tuning.checking`). It takes the compilation of stock
    and of each variant, and some seconds.

    Where the training step is compiled in another way than Keras does by itself
    (TensorFlow on a CPU with XLA, say), the chosen variant is timed beside Keras's
    default for a few steps, and `reason` says which is faster.

    The model is not changed; a copy of it is trained, with its loss and its
    optimizer. A model that is not compiled is tuned with a mean of squares and
    plain gradient descent.

    For a model of a `tf.distribute.Strategy`, or under a `keras.distribution`,
    one replica's part of a batch is measured on one device. Where there are
    several processes, all must call this: the first one measures, the others
    wait for its plan.

    Args:
        model: a built model.
        batch_size: images in a batch, as it will be trained, of all replicas
            together.
        data: a sample batch as `fit` takes it, `x`, `(x, y)` or
            `(x, y, sample_weight)`; for models whose inputs, or targets, cannot
            be synthetic (integers, text, open sizes).
        jit_compile: as for `compile`: whether the training step will be
            compiled. `"auto"` means as the model was compiled. On JAX it must
            be: Keras runs there eagerly what it does not compile.
        budget_seconds: measure for about so many seconds. Variants for which no
            time is left are not tried, those that compile slowly first. Stock is
            timed even if that takes longer. None means as long as it takes.
        cache_dir: where contests are kept; None means what
            `DIAGCONV_CACHE_DIR` names, else the user's cache folder.
        refresh: measure again what the cache knows.
        rules: which layer classes can become which.
        per_layer: also measure each distinct workload alone, and let the best
            choice for each compete. It takes minutes: a function is compiled
            for each workload and lowering.
        clock: returns the time in seconds.

    Returns:
        A plan for `rewrite`, with all that was measured. Where nothing is
        faster than stock, all its choices are `"stock"`, and its `reason` says
        so.

    Raises:
        ValueError: if `model` is not a built Keras model or cannot be copied
            faithfully, an argument is out of range, `data` is needed, or the
            model cannot be trained; if Keras would run it eagerly; if the
            replicas do not divide `batch_size`, or for a strategy with which
            Keras cannot train.
        RuntimeError: if the first process could not tune; the message says why.
    """
    check_whole_number("batch_size", batch_size, least=1)
    if budget_seconds is not None and not budget_seconds > 0:
        raise ValueError(
            f"Expected `budget_seconds` to be above 0 or None. Received: {budget_seconds!r}"
        )
    check_built(model)
    replicas = distribution.replicas_of(model)
    per_replica_batch = replicas.per_replica_batch(batch_size)
    compiled = _is_compiled(model, jit_compile, replicas.num_replicas)
    if distribution.strategy_of(model) is not None:
        # The copy that is measured has no strategy, which "auto" asks for.
        jit_compile = compiled

    def measure() -> Plan:
        inspection = inspect_model(model, per_replica_batch, data=data, rules=rules)
        if inspection.unknown:
            raise ValueError(
                f"Expected a model that can be called. Received: '{model.name}': "
                f"{inspection.unknown}"
            )
        if data is None:
            check_synthetic_inputs(model, per_replica_batch)
        _warn_of_sharded_channels(model, inspection)
        tuner = _Tuner(
            model=model,
            data=data,
            inspection=inspection,
            rules=rules,
            conditions=Conditions.current(compiled, replicas.num_replicas),
            cache=Cache(cache_dir, refresh),
            clock=clock,
            deadline=float("inf") if budget_seconds is None else clock() + budget_seconds,
            default_jit_compile=keras_internals.resolve_jit_compile(model),
            make_contest=lambda: Contest(model, per_replica_batch, data, jit_compile, rules, clock),
        )
        return dataclasses.replace(tuner.run(per_layer), batch_size=batch_size)

    if replicas.num_processes == 1:
        plan = distribution.undistributed(measure)
    else:
        text = distribution.from_first_process(
            lambda: distribution.undistributed(measure).to_json(), replicas.process_index
        )
        plan = Plan.from_json(text)
    logging.info("%s: %s", model.name, plan.reason)
    return plan


def _is_compiled(model: keras.Model, jit_compile: bool | str, num_replicas: int) -> bool:
    """Whether the training step will be compiled.

    Raises:
        ValueError: if `jit_compile` is out of range, if Keras would run the model
            eagerly, or where TensorFlow cannot compile under a strategy.
    """
    if jit_compile not in (True, False, "auto"):
        raise ValueError(
            f'Expected `jit_compile` to be True, False or "auto". Received: {jit_compile!r}'
        )
    if jit_compile != "auto":
        compiled = bool(jit_compile) and keras_internals.supports_jit(model)
    elif model.compiled:
        compiled = bool(model.jit_compile)
    else:  # Reading the property of a model that is not compiled would set it.
        compiled = keras_internals.resolve_jit_compile(model)
    eager = "run_eagerly=True" if model.run_eagerly else ""
    if keras.backend.backend() == "jax" and not compiled and not eager:
        eager = (
            "jit_compile=False on JAX (as which TensorFlow saves models on a CPU); compile the "
            "model with jit_compile=True"
        )
    if eager:
        raise ValueError(
            "Expected a model that Keras does not run eagerly: that is for debugging, and no "
            f"choice of lowerings makes it fast. Received: {eager}"
        )
    if compiled and num_replicas > 1 and distribution.strategy_of(model) is not None:
        raise ValueError(
            "Expected a training step without XLA under a strategy of several replicas: TensorFlow "
            "cannot compile one ('Trying to access resource … located in device …'). Received: "
            "jit_compile=True"
        )
    return compiled


def _warn_of_sharded_channels(model: keras.Model, inspection: Inspection) -> None:
    axes = [kernel_channels_axis(row.layer) for row in inspection.rows if row.eligible]
    if any(axis is not None and axis.size > 1 for axis in axes):
        logging.warning(
            "%s: the channels of some layers are sharded. One device is measured that computes all "
            "channels of its images.",
            model.name,
        )


@dataclasses.dataclass
class _Tuner:
    """One run of `tune`; it measures what the cache does not know."""

    model: keras.Model
    data: Any
    inspection: Inspection
    rules: Sequence[Rule]
    conditions: Conditions
    cache: Cache
    clock: Callable[[], float]
    deadline: float
    default_jit_compile: bool
    make_contest: Callable[[], Contest]

    def __post_init__(self) -> None:
        uniform = candidates.contest_variants(self.inspection, self.conditions)
        self.variants: dict[str, Variant] = {STOCK: {}, **uniform}
        # A spinner that turned faster would take time from what is measured.
        self.progress = Console(stderr=True).status("tuning", refresh_per_second=1)

    def run(self, per_layer: bool) -> Plan:
        workloads = candidates.distinct_workloads(self.inspection)
        if not workloads:
            return Plan(self.conditions, reason="No convolution with groups can be rewritten.")
        with self.progress:
            if per_layer:
                workloads = [self._measure_alone(workload) for workload in workloads]
                alone = {path: w.choice for w in workloads if w.choice for path in w.layers}
                alone = {path: choice for path, choice in alone.items() if choice != STOCK}
                if alone not in self.variants.values():
                    self.variants = {STOCK: {}, PER_LAYER: alone, **self.variants}
            steps = self._measure_steps()
            choice = choosing.choose(steps)
            reason, default_steps = self._reason(choice)
        chosen = self.variants[choice.name]
        wanted = {path: chosen.get(path, STOCK) for w in workloads for path in w.layers}
        plan = Plan(
            conditions=self.conditions,
            lowerings={w.spec: wanted[w.layers[0]] for w in reversed(workloads)},
            reason=reason,
            workloads=tuple(workloads),
            steps=steps,
            default_steps=default_steps,
        )
        # Two classes of layers may have equal specs, and with open sizes several specs fit.
        overrides = {
            row.path: wanted[row.path]
            for row in inspect_as_built(self.model, self.rules).rows
            if row.path in wanted and not _says(plan, row, wanted[row.path])
        }
        return dataclasses.replace(plan, overrides=overrides)

    def _measure_alone(self, workload: Workload) -> Workload:
        """The workload with its times and a choice, if the budget allows."""
        names = candidates.layer_candidates(workload, self.conditions)
        key = keys.of_workload(workload, names, self.conditions)
        times = self.cache.read(key)
        if not times:
            _ = self._contest  # A model that cannot be trained is refused at once.
            if self.clock() >= self.deadline:
                return dataclasses.replace(workload, reason="not measured: no time was left")
            self.progress.update(f"tuning: {workload.layers[0]}")
            times = measure_alone(workload, names, self.conditions, self.clock)
            self._keep(key, times)
        choice = choosing.choose(times)
        return dataclasses.replace(workload, times=times, choice=choice.name, reason=choice.reason)

    @functools.cached_property
    def _contest(self) -> Contest:
        """The contest, in which stock has made its first step, or failed.

        Raises:
            ValueError: if no variant of the model can be trained.
        """
        contest = self.make_contest()
        for name, variant in self.variants.items():
            self.progress.update(f"tuning: first step of {name}")
            if contest.add(name, variant).error is None:
                return contest
        synthetic = " and ".join(contest.batch.synthetic)
        advice = "; pass a batch of it as `data`" if synthetic else ""
        on = f", on synthetic {synthetic}" if synthetic else ""
        raise ValueError(
            f"Expected a model that can be trained{advice}. Received: '{self.model.name}', "
            f"whose training step fails{on}: {contest.first[STOCK].error}"
        )

    @functools.cached_property
    def _contest_key(self) -> dict[str, Any] | None:
        return keys.of_contest(
            self.model, self.inspection, self.data, self.conditions, self.variants
        )

    def _measure_steps(self) -> dict[str, Measured]:
        """The times of whole training steps; what computes wrong numbers has an error."""
        key = self._contest_key
        steps = self.cache.read(key)
        # With a budget, a contest with fewer variants is as good as can be had.
        if steps and (self.deadline < float("inf") or set(steps) == set(self.variants)):
            return steps
        first = self._contest.first
        for name in [name for name in self.variants if name not in first]:
            self.progress.update(f"tuning: first step of {name}")
            expected = _FIRST_STEPS_RESERVED * (first[STOCK].first_seconds or 0.0)
            if self.deadline - self.clock() > expected:
                self._contest.add(name, self.variants[name])
        self.progress.update("tuning: training steps in turn")
        steps = self._contest.time(min(ROUNDS_SECONDS, self.deadline - self.clock()))
        self.progress.update("tuning: the numbers of the fastest")
        while (name := choosing.choose(steps).name) != STOCK:
            wrong = self._why_wrong(self.variants[name])
            if not wrong:
                break
            steps[name] = Measured.failed(wrong, steps[name].first_seconds)
        self._keep(key, steps)
        return steps

    def _reason(self, choice: choosing.Choice) -> tuple[str, dict[str, Measured]]:
        """Why, and the times of the choice beside Keras's default, if they were taken."""
        steps = self._measure_default(choice.name)
        beside = ""
        if steps:
            beside = choosing.compare_with_default(
                steps[choice.name], steps[DEFAULT], self.conditions
            )
        return ". ".join(filter(None, (f"{choice.name}: {choice.reason}", beside))), steps

    def _measure_default(self, name: str) -> dict[str, Measured]:
        """The times of a variant and of Keras's default; empty where stock is the default."""
        jit_compile = self.default_jit_compile
        if jit_compile == self.conditions.compiled:
            return {}
        variant = self.variants[name]
        key = keys.of_default(self._contest_key, variant, jit_compile)
        steps = self.cache.read(key)
        if steps or self.clock() >= self.deadline:
            return steps
        self.progress.update("tuning: Keras's default")
        steps = self._contest.compare(name, variant, DEFAULT, jit_compile)
        self._keep(key, steps)
        return steps

    def _why_wrong(self, variant: Variant) -> str:
        """The error of a variant that computes wrong numbers; empty where all are right."""
        distinct = {}
        for row in self.inspection.rows:
            if (lowering := variant.get(row.path)) is not None:
                for spec in row.specs:
                    checked = checking.checked_size(spec, self.conditions)
                    distinct[checked, str(parse(lowering))] = lowering
        for (spec, _), lowering in distinct.items():
            try:
                if wrong := checking.why_wrong(spec, lowering, self.conditions):
                    return f"{WRONG_NUMBERS}: {wrong}"
            except Exception as error:
                return f"its numbers cannot be checked: {summarize_error(error)}"
        return ""

    def _keep(self, key: Mapping[str, Any] | None, measured: Mapping[str, Measured]) -> None:
        # Failures may pass. Times are compared with those of the same rounds only, so
        # all of them are kept, or none.
        if all(m.lasts for m in measured.values()):
            self.cache.write(key, measured)


def _says(plan: Plan, row: ConvolutionRow, wanted: LoweringLike) -> bool:
    try:
        return plan.lowering_for(row) == wanted
    except ValueError:
        return False
