"""tune: which lowering is the fastest for each layer, where the model will train.

Every distinct problem is measured alone, pass by pass; but under a compiler that
fuses, times of layers do not add up. So the whole model decides: the training
step of stock, of the best choices, and of single lowerings for all layers, timed
in turn. What is not faster than stock there is not chosen.

Where several devices share a batch, each computes its own images: measured is
one replica's share, on one device, and where there are several processes on the
first of them.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from absl import logging

from diagconv_tf import distribution, keras_internals
from diagconv_tf.distribution import Replicas
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import Inspection, inspect_model
from diagconv_tf.layers import kernel_channels_axis
from diagconv_tf.lowerings import LoweringLike, why_not
from diagconv_tf.measurements import Measured, ProblemMeasurements
from diagconv_tf.model_tree import check_built
from diagconv_tf.plan import Plan
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.tuning import candidates, choosing, keys
from diagconv_tf.tuning.cache import Cache
from diagconv_tf.tuning.first_process import from_first_process
from diagconv_tf.tuning.measuring import ProblemBench
from diagconv_tf.tuning.problems import LayersOfProblem, Problem, distinct_problems
from diagconv_tf.tuning.progress import Progress
from diagconv_tf.tuning.sample_batch import check_inputs_can_be_made_up
from diagconv_tf.tuning.training_bench import ROUNDS_SECONDS, TrainingBench, Variant

#: The variant in which each problem has its own choice.
PLAN = "plan"

#: Other sizes of blocks are tried where the best blocks are within this factor
#: of the best of all.
_NEAR_THE_BEST = 1.5

#: Of a budget, what the steps of the whole model need is kept free: so many
#: first steps of stock (a plan's takes up to twice as long), and single steps.
_FIRST_STEPS_RESERVED = 2.5
_STEPS_RESERVED = 8


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
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Measures which lowering trains each layer of a model fastest, here.

    The model is not changed; a copy of it is trained, with its loss and its
    optimizer. A model that is not compiled is tuned with a mean of squares and
    plain gradient descent.

    For a model of a `tf.distribute.Strategy`, or under a `keras.distribution`,
    one replica's share of a batch is measured on one device. Where there are
    several processes, all must call this: the first one measures, the others
    wait for its plan.

    Args:
        model: a built model.
        batch_size: images in a batch, as it will be trained, of all replicas
            together.
        data: a sample batch as `fit` takes it, `x`, `(x, y)` or
            `(x, y, sample_weight)`; for models whose inputs cannot be made up
            (integers, text, open sizes), or whose targets cannot.
        jit_compile: as for `compile`: whether the training step will be
            compiled. `"auto"` means as the model was compiled. On JAX it must
            be: Keras runs there eagerly what it does not compile.
        budget_seconds: measure for about so many seconds. Problems with few
            FLOPs are then left out first, and get the choice of the most
            similar one that was measured, or stay stock. The steps of stock
            and of the plan are timed even if that takes longer. None means as
            long as it takes.
        cache_dir: where measurements are kept; None means what
            `DIAGCONV_CACHE_DIR` names, else the user's cache folder.
        refresh: measure again what the cache knows.
        rules: which layer classes can become which.
        clock: returns the time in seconds.

    Returns:
        A plan for `rewrite`, with all that was measured. Where nothing is
        faster than stock by more than the spread, all its choices are
        `"stock"`, and its `reason` says so.

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
    share = replicas.per_replica_batch(batch_size)
    compiled = _will_be_compiled(model, jit_compile)
    _check_not_eager(model, compiled)
    if distribution.strategy_of(model) is not None:
        _check_strategy_can_compile(compiled, replicas)
        # The copy that is measured has no strategy, which "auto" asks for.
        jit_compile = compiled

    def measure() -> Plan:
        inspection = inspect_model(model, share, data=data, rules=rules)
        if inspection.unknown:
            raise ValueError(
                f"Expected a model that can be called. Received: '{model.name}': "
                f"{inspection.unknown}"
            )
        if data is None:
            check_inputs_can_be_made_up(model, share)
        _warn_of_divided_channels(model, inspection)
        tuner = _Tuner(
            model=model,
            batch_size=batch_size,
            inspection=inspection,
            conditions=Conditions.current(compiled, replicas.num_replicas),
            cache=Cache(cache_dir),
            refresh=refresh,
            clock=clock,
            deadline=None if budget_seconds is None else clock() + budget_seconds,
            make_bench=lambda: TrainingBench(model, share, data, jit_compile, rules, clock),
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


def _warn_of_divided_channels(model: keras.Model, inspection: Inspection) -> None:
    axes = [kernel_channels_axis(row.layer) for row in inspection.rows if row.eligible]
    if any(axis is not None and axis.size > 1 for axis in axes):
        logging.warning(
            "%s: devices share the channels of some layers. Measured is one device that computes "
            "all channels of its images.",
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
    clock: Callable[[], float]
    deadline: float | None
    make_bench: Callable[[], TrainingBench]
    data: Any
    bench: TrainingBench | None = None
    reserved: float = 0.0

    def run(self) -> Plan:
        groups = distinct_problems(self.inspection)
        if not groups:
            return self._plan({}, (), {}, "No convolution with groups can be rewritten.")
        with Progress(len(groups) * len(PASSES) + 2) as progress:
            problems = self._measure_problems(groups, progress)
            variants = self._variants(problems)
            progress.report("whole training steps", len(groups) * len(PASSES))
            steps = self._measure_variants(variants, progress)
        choice = choosing.choose_variant(steps)
        return self._plan(variants[choice.name], problems, steps, f"{choice.name}: {choice.reason}")

    def _measure_problems(
        self, groups: Sequence[LayersOfProblem], progress: Progress
    ) -> tuple[ProblemMeasurements, ...]:
        measured: list[ProblemMeasurements] = []
        left_out: list[LayersOfProblem] = []
        for index, group in enumerate(groups):
            progress.report(group.paths[0], index * len(PASSES))
            passes = self._measure_problem(group, progress)
            if set(passes) != set(PASSES):
                left_out.append(group)
                continue
            choice = choosing.choose_lowering(passes, group.problem.native_is_stock)
            measured.append(_measurements(group, passes, choice))
        known = list(measured)
        for group in left_out:
            choice = choosing.choose_by_similarity(group.problem, known)
            measured.append(_measurements(group, {}, choice))
        return tuple(measured)

    def _measure_problem(
        self, group: LayersOfProblem, progress: Progress
    ) -> dict[str, dict[str, Measured]]:
        """Pass → candidate → times; passes are missing where time was short."""
        problem = group.problem
        cache_keys = {
            name: keys.of_problem(problem, name, self.conditions) for name in (STOCK, "lowerings")
        }
        known = {} if self.refresh else self._read_problem(cache_keys)
        bench: ProblemBench | None = None
        passes: dict[str, dict[str, Measured]] = {}
        for pass_name in PASSES:
            found: dict[str, Measured] = {}
            for names in self._waves(problem, found):
                missing = [n for n in names if f"{pass_name}/{n}" not in known]
                if missing:
                    if self.bench is None:
                        self._start()
                    if self._seconds_left(self.reserved) <= 0:
                        # Failures are not kept; what did not fail may be enough.
                        names = [n for n in names if n not in missing]
                        if not found and STOCK not in names:
                            return passes
                        found.update((n, known[f"{pass_name}/{n}"]) for n in names)
                        break
                    bench = bench or ProblemBench(problem, self.conditions, self.clock)
                    times = [m.median for m in found.values() if m.ok]
                    new = bench.measure(pass_name, missing, min(times, default=None))
                    new = {f"{pass_name}/{name}": m for name, m in new.items()}
                    known.update(new)
                    self._write_problem(cache_keys, new)
                found.update((n, known[f"{pass_name}/{n}"]) for n in names)
            passes[pass_name] = found
            progress.advance()
        return passes

    def _waves(self, problem: Problem, found: Mapping[str, Measured]) -> Iterator[list[str]]:
        """Candidates to measure together; what comes later depends on what was `found`."""
        yield candidates.first_candidates(problem, self.conditions)
        times = {name: m.median for name, m in found.items() if m.ok}
        blocks = [time for name, time in times.items() if name.startswith(("diagonal", "dense"))]
        if blocks and min(blocks) <= _NEAR_THE_BEST * min(times.values()):
            yield candidates.further_candidates(problem, self.conditions)

    def _read_problem(self, cache_keys: Mapping[str, Any]) -> dict[str, Measured]:
        return {n: m for key in cache_keys.values() for n, m in self.cache.read(key).items()}

    def _write_problem(self, cache_keys: Mapping[str, Any], new: Mapping[str, Measured]) -> None:
        new = {name: m for name, m in new.items() if m.lasts}
        # What stock runs depends on the layer, what lowerings do does not.
        stock = {name: m for name, m in new.items() if name.endswith(f"/{STOCK}")}
        for key, part in (
            (cache_keys[STOCK], stock),
            (cache_keys["lowerings"], {n: m for n, m in new.items() if n not in stock}),
        ):
            if part:
                self.cache.add(key, part)

    def _start(self) -> None:
        """Trains stock for a step: that tells what to keep time for.

        Raises:
            ValueError: if the model cannot be trained, in stock or in any other
                layers; asked before hours of measuring.
        """
        self.bench = self.make_bench()
        stock = self.bench.add(STOCK, {})
        if not stock.ok:
            native = {row.path: "native" for row in self.inspection.rows if row.eligible}
            if not self.bench.add("native", native).ok:
                _raise_untrainable(self.model, stock, self.bench.batch.synthetic)
        if stock.ok and self.deadline is not None:
            self.reserved = (
                _FIRST_STEPS_RESERVED * stock.first_seconds + _STEPS_RESERVED * stock.median
            )

    def _variants(self, problems: Sequence[ProblemMeasurements]) -> dict[str, Variant]:
        """What is timed in the whole model, by name."""
        rows = {row.path: row for row in self.inspection.rows}
        plan = {path: p.choice for p in problems for path in p.layers if p.choice != STOCK}
        variants: dict[str, Variant] = {STOCK: {}, PLAN: plan}
        for name in choosing.promising_lowerings(problems):
            variant = {
                path: name
                for problem in problems
                # Where it was not worth measuring, it would be slow.
                if not problem.passes or problem.runs(name)
                for path in problem.layers
                if not any(why_not(spec, name) for spec in rows[path].specs)
            }
            if variant and variant not in variants.values():
                variants[name] = variant
        if not plan:
            del variants[PLAN]
        return variants

    def _measure_variants(
        self, variants: Mapping[str, Variant], progress: Progress
    ) -> dict[str, Measured]:
        key = keys.of_training_step(
            self.model, self.inspection, self.data, self.conditions, variants
        )
        if not self.refresh:
            known = self.cache.read(key)
            least = variants if self.deadline is None else {STOCK, PLAN} & set(variants)
            if known and set(least) <= set(known):
                return {name: known[name] for name in variants if name in known}
        if self.bench is None:
            self._start()
        bench = self.bench
        names = [STOCK]
        for name, variant in variants.items():
            if name == STOCK:
                continue
            expected = 1.5 * (bench.first[STOCK].first_seconds or 0.0)
            if name != PLAN and self._seconds_left(expected) <= 0:
                continue
            bench.add(name, variant)
            names.append(name)
        progress.advance()
        left = self._seconds_left(0.0)
        steps = bench.time(names, seconds=max(min(ROUNDS_SECONDS, left), 1e-3))
        progress.advance()
        # They were timed in turn, to be compared: kept are all of them, or none.
        if all(step.lasts for step in steps.values()):
            self.cache.add(key, steps)
        return steps

    def _seconds_left(self, reserved: float) -> float:
        if self.deadline is None:
            return float("inf")
        return self.deadline - self.clock() - reserved

    def _plan(
        self,
        variant: Variant,
        problems: tuple[ProblemMeasurements, ...],
        steps: Mapping[str, Measured],
        reason: str,
    ) -> Plan:
        wanted = {path: variant.get(path, STOCK) for p in problems for path in p.layers}
        plan = Plan(
            conditions=self.conditions,
            lowerings={p.spec: wanted[p.layers[0]] for p in reversed(problems)},
            reason=reason,
            batch_size=self.batch_size,
            problems=problems,
            steps=steps,
        )
        return dataclasses.replace(plan, overrides=self._overrides(plan, wanted))

    def _overrides(self, plan: Plan, wanted: Mapping[str, LoweringLike]) -> dict[str, LoweringLike]:
        """Paths of layers for which the problem does not say what is wanted.

        So it is where two classes pose the same problem, or sizes are open,
        and then several problems fit.
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


def _measurements(
    group: LayersOfProblem, passes: Mapping[str, Mapping[str, Measured]], choice: choosing.Choice
) -> ProblemMeasurements:
    problem = group.problem
    return ProblemMeasurements(
        problem.spec, problem.stock_op, group.paths, passes, choice.name, choice.reason
    )


def _raise_untrainable(model: keras.Model, stock: Measured, synthetic: tuple[str, ...]) -> None:
    advice = "; pass a batch of it as `data`" if synthetic else ""
    of = f", on synthetic {' and '.join(synthetic)}" if synthetic else ""
    raise ValueError(
        f"Expected a model that can be trained{advice}. Received: '{model.name}', whose training "
        f"step fails{of}: {stock.error}"
    )
