"""`tune`: which lowerings train a model fastest, measured where it will train.

A contest of whole training steps decides, among stock and a few choices for all layers:
under a compiler that fuses, times of layers do not add up. (In all 16 plans of
scripts/results, one lowering for all layers won.) With `per_layer=True` every distinct
workload is measured alone, too, and the choice for each enters the contest.

Where several devices share a batch, each computes its own images: one replica's part is
measured on one device, and where there are several processes on the first of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import rich.progress
from absl import logging
from rich.console import Console

from diagconv_tf import distribution, keras_internals
from diagconv_tf.distribution import Replicas, from_first_process
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import Inspection, inspect_model
from diagconv_tf.layers import kernel_channels_axis
from diagconv_tf.lowerings import LoweringLike, parse
from diagconv_tf.measurements import (
    WRONG_NUMBERS,
    Measured,
    WorkloadMeasurements,
    least_rounds,
)
from diagconv_tf.model_tree import check_built
from diagconv_tf.plan import Plan
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.text import summarize_error
from diagconv_tf.tuning import candidates, checking, choosing, keys
from diagconv_tf.tuning.cache import Cache
from diagconv_tf.tuning.candidates import Variant
from diagconv_tf.tuning.contest import ROUNDS_SECONDS, Contest
from diagconv_tf.tuning.layer_benchmark import LayerBenchmark
from diagconv_tf.tuning.sample_batch import check_synthetic_inputs
from diagconv_tf.tuning.workloads import LayersOfWorkload, distinct_workloads

#: The variant in which each layer has the lowering that was fastest for it alone.
PER_LAYER = "per_layer"

#: Of a budget, so many times stock's first step is kept for that of a variant.
_FIRST_STEPS_RESERVED = 1.5

#: Tells the user what begins now.
Report = Callable[[str], None]


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
    (`measurements.ratios_to_stock`). Nor can a variant win that computes wrong
    numbers: every distinct workload of the winner is compared with float64
    (`tuning.checking`). It takes the compilation of stock and of each variant,
    and some seconds.

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
        per_layer: also measure each distinct workload alone, pass by pass, and
            let the best choice for each compete. It takes minutes, and compiles
            a function for each workload, pass and lowering.
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
    _check_arguments(batch_size, jit_compile, budget_seconds)
    check_built(model)
    replicas = distribution.replicas_of(model)
    per_replica_batch = replicas.per_replica_batch(batch_size)
    compiled = _will_be_compiled(model, jit_compile)
    _check_not_eager(model, compiled)
    if distribution.strategy_of(model) is not None:
        _check_strategy_can_compile(compiled, replicas)
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
            batch_size=batch_size,
            inspection=inspection,
            conditions=Conditions.current(compiled, replicas.num_replicas),
            cache=Cache(cache_dir),
            refresh=refresh,
            per_layer=per_layer,
            clock=clock,
            deadline=None if budget_seconds is None else clock() + budget_seconds,
            make_contest=lambda: Contest(model, per_replica_batch, data, jit_compile, rules, clock),
            data=data,
        )
        return tuner.run()

    if replicas.num_processes == 1:
        plan = distribution.undistributed(measure)
    else:
        text = from_first_process(
            lambda: distribution.undistributed(measure).to_json(), replicas.process_index
        )
        plan = Plan.from_json(text)
    logging.info("%s: %s", model.name, plan.reason)
    return plan


def _check_arguments(batch_size: Any, jit_compile: Any, budget_seconds: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"Expected `batch_size` to be an integer >= 1. Received: {batch_size!r}")
    if jit_compile not in (True, False, "auto"):
        raise ValueError(
            f'Expected `jit_compile` to be True, False or "auto". Received: {jit_compile!r}'
        )
    if budget_seconds is not None and not budget_seconds > 0:
        raise ValueError(
            f"Expected `budget_seconds` to be above 0 or None. Received: {budget_seconds!r}"
        )


def _will_be_compiled(model: keras.Model, jit_compile: bool | str) -> bool:
    if jit_compile == "auto":
        # Reading the property of a model that is not compiled would set it.
        return (
            bool(model.jit_compile)
            if model.compiled
            else keras_internals.resolve_jit_compile(model)
        )
    return bool(jit_compile) and keras_internals.supports_jit(model)


def _check_not_eager(model: keras.Model, compiled: bool) -> None:
    if model.run_eagerly:
        received = "run_eagerly=True"
    elif keras.backend.backend() == "jax" and not compiled:
        received = (
            "jit_compile=False on JAX (as which TensorFlow saves models on a CPU); compile the "
            "model with jit_compile=True"
        )
    else:
        return
    raise ValueError(
        "Expected a model that Keras does not run eagerly: that is for debugging, and no choice "
        f"of lowerings makes it fast. Received: {received}"
    )


def _check_strategy_can_compile(compiled: bool, replicas: Replicas) -> None:
    if compiled and replicas.num_replicas > 1:
        raise ValueError(
            "Expected a training step without XLA under a strategy of several replicas: TensorFlow "
            "cannot compile one ('Trying to access resource … located in device …'). Received: "
            "jit_compile=True"
        )


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
    """One run of `tune`."""

    model: keras.Model
    batch_size: int
    inspection: Inspection
    conditions: Conditions
    cache: Cache
    refresh: bool
    per_layer: bool
    clock: Callable[[], float]
    deadline: float | None
    make_contest: Callable[[], Contest]
    data: Any

    def run(self) -> Plan:
        groups = distinct_workloads(self.inspection)
        if not groups:
            return self._plan({}, (), {}, "No convolution with groups can be rewritten.")
        variants = candidates.contest_variants(groups, self.conditions)
        with _progress(len(variants) + 3 + self.per_layer * len(groups)) as report:
            workloads = tuple(self._measured_alone(group, report) for group in groups)
            alone = {
                path: w.choice
                for w in workloads
                if w.choice not in (None, STOCK)
                for path in w.layers
            }
            if alone and alone not in variants.values():
                variants = {PER_LAYER: alone, **variants}
            steps, choice = self._decide({STOCK: {}, **variants}, report)
        variant = variants.get(choice.name, {})
        return self._plan(variant, workloads, steps, f"{choice.name}: {choice.reason}")

    def _measured_alone(self, group: LayersOfWorkload, report: Report) -> WorkloadMeasurements:
        """A workload, with its times if they are asked for and the budget allows."""
        workload = group.workload
        measurements = WorkloadMeasurements(workload.spec, workload.stock_op, group.paths)
        if not self.per_layer:
            return measurements
        report(group.paths[0])
        names = candidates.layer_candidates(workload, self.conditions)
        key = keys.of_workload(workload, names, self.conditions)
        known = {} if self.refresh else self.cache.read(key)
        if known:
            passes = {p: {n: known[f"{p}/{n}"] for n in names} for p in PASSES}
        else:
            _ = self._contest  # A model that cannot be trained is refused at once.
            if self._seconds_left() <= 0:
                return dataclasses.replace(measurements, reason="not measured: no time was left")
            passes = LayerBenchmark(workload, self.conditions, self.clock).measure(names)
            self._keep(
                key, {f"{p}/{n}": m for p, found in passes.items() for n, m in found.items()}
            )
        choice = choosing.choose_lowering(passes, workload.native_is_stock)
        return dataclasses.replace(
            measurements, passes=passes, choice=choice.name, reason=choice.reason
        )

    @functools.cached_property
    def _contest(self) -> Contest:
        """The contest, in which stock has made its first steps.

        Raises:
            ValueError: if the model cannot be trained, in stock or in any other
                layers.
        """
        contest = self.make_contest()
        stock = contest.add(STOCK, {})
        if not stock.ok:
            native = {row.path: "native" for row in self.inspection.rows if row.eligible}
            if not contest.add("native", native).ok:
                _raise_untrainable(self.model, stock, contest.batch.synthetic)
        return contest

    def _decide(
        self, variants: Mapping[str, Variant], report: Report
    ) -> tuple[dict[str, Measured], choosing.Choice]:
        """The times of whole training steps, and the variant that they speak for."""
        key = keys.of_contest(self.model, self.inspection, self.data, self.conditions, variants)
        known = {} if self.refresh else self.cache.read(key)
        # With a budget, a contest with fewer variants is as good as can be had.
        if known and (self.deadline is not None or set(known) == set(variants)):
            return known, choosing.choose_variant(known)
        steps = self._run_contest(variants, report)
        choice = choosing.choose_variant(steps)
        report("the numbers of the fastest")
        while choice.name != STOCK and (wrong := self._why_wrong(variants[choice.name])):
            steps[choice.name] = Measured.failed(wrong, steps[choice.name].first_seconds)
            choice = choosing.choose_variant(steps)
        self._keep(key, steps)
        return steps, choice

    def _run_contest(self, variants: Mapping[str, Variant], report: Report) -> dict[str, Measured]:
        report(f"first steps: {STOCK}")
        contest = self._contest
        stock = contest.first[STOCK]
        names = [STOCK]
        for name, variant in variants.items():
            if name == STOCK:
                continue
            report(f"first steps: {name}")
            entered = [contest.first[n].median for n in names if contest.first[n].ok]
            rounds = least_rounds(len(names)) * sum(entered)
            expected = _FIRST_STEPS_RESERVED * (stock.first_seconds or 0.0) + rounds
            if self._seconds_left() > expected:
                contest.add(name, variant)
                names.append(name)
        report("training steps in turn")
        return contest.time(names, seconds=max(min(ROUNDS_SECONDS, self._seconds_left()), 1e-3))

    def _why_wrong(self, variant: Variant) -> str:
        """The error of a variant that computes wrong numbers; empty where all are right."""
        distinct = {
            (spec, str(parse(variant[row.path]))): variant[row.path]
            for row in self.inspection.rows
            if row.path in variant
            for spec in row.specs
        }
        for (spec, _), lowering in distinct.items():
            try:
                if wrong := checking.why_wrong(spec, lowering, self.conditions):
                    return f"{WRONG_NUMBERS}: {wrong}"
            except Exception as error:
                return f"its numbers cannot be checked: {summarize_error(error)}"
        return ""

    def _keep(self, key: Mapping[str, Any], contest: Mapping[str, Measured]) -> None:
        # Failures may pass. Times are compared with those of the same rounds only, so
        # all of them are kept, or none.
        if all(measured.lasts for measured in contest.values()):
            self.cache.write(key, contest)

    def _seconds_left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - self.clock()

    def _plan(
        self,
        variant: Variant,
        workloads: tuple[WorkloadMeasurements, ...],
        steps: Mapping[str, Measured],
        reason: str,
    ) -> Plan:
        wanted = {path: variant.get(path, STOCK) for w in workloads for path in w.layers}
        plan = Plan(
            conditions=self.conditions,
            lowerings={w.spec: wanted[w.layers[0]] for w in reversed(workloads)},
            reason=reason,
            batch_size=self.batch_size,
            workloads=workloads,
            steps=steps,
        )
        return dataclasses.replace(plan, overrides=self._overrides(plan, wanted))

    def _overrides(self, plan: Plan, wanted: Mapping[str, LoweringLike]) -> dict[str, LoweringLike]:
        """Paths of layers for which the spec does not say what is wanted.

        So it is where two classes of layers have equal specs, or where sizes
        are open, so that several specs fit.
        """
        rows = self.inspection.rows
        if self.data is not None:
            rows = inspect_model(self.model).rows
        overrides = {}
        for row in rows:
            if row.path not in wanted:
                continue
            try:
                found = plan.lowering_for(row)
            except ValueError:
                found = None
            if found != wanted[row.path]:
                overrides[row.path] = wanted[row.path]
        return overrides


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Shows progress, with the time left, on standard error; nothing without a terminal.

    Args:
        total: number of steps of the work.

    Yields:
        A function that says what begins now.
    """
    console = Console(stderr=True)
    columns = (
        rich.progress.TextColumn("tuning {task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with rich.progress.Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = itertools.count()
        yield lambda what: bar.update(task, description=what, completed=next(begun))


def _raise_untrainable(model: keras.Model, stock: Measured, synthetic: tuple[str, ...]) -> None:
    advice = "; pass a batch of it as `data`" if synthetic else ""
    of = f", on synthetic {' and '.join(synthetic)}" if synthetic else ""
    raise ValueError(
        f"Expected a model that can be trained{advice}. Received: '{model.name}', whose training "
        f"step fails{of}: {stock.error}"
    )
