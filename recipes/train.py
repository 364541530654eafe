"""Trains a network, stock and diagonalwise, on the same batches, and compares.

    python -m recipes.train --config=digits_mobilenet_v1
    python -m recipes.train --config=digits_mobilenet_v1 --epochs=2 --compare=stock,shifted,tune
    python -m recipes.train --config=imagenet_mobilenet_v2 --distribution=data_parallel

Reads from top to bottom: checks → data → model → tune → rewrite → fit →
restore → report → export. The results are in `runs/NAME`; `recipes/report.py`
says which files. A run that was interrupted goes on with `--resume`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":  # Before any other module imports a framework.
    from recipes.config import import_quietly

    import_quietly()

import keras
from absl import app, flags, logging

from diagconv_tf import StepTimer, export, files, inspect_model
from diagconv_tf.text import summarize_error
from recipes import config as config_module
from recipes import data, dorefa_models, models, processes
from recipes.averaging import (
    SwapAverages,
    average_statistics,
    finalize_averages,
    stop_averaging,
)
from recipes.checkpoints import Checkpoint, Checkpoints, weights_digest
from recipes.choices import chose_stock, explain_choice
from recipes.comparing import compare_steps
from recipes.config import (
    BUILT_IN,
    Config,
    config_from_flags,
    config_names,
    define_flags,
    exit_with_line,
    load_config,
    parse_flags,
)
from recipes.distributing import Distribution, synchronize_batch_norms
from recipes.finetuning import Start, image_input, load_start
from recipes.fitting import fit_from
from recipes.interruption import (
    EXIT_INTERRUPTED,
    NonFiniteLossError,
    TrainingInterrupted,
)
from recipes.mlp import PixelStatistics, mlp
from recipes.optimizers import average_momentum, compile_model
from recipes.phases import phases_of, set_steps_done
from recipes.profiling import Profile
from recipes.recording import MetricsLog, TensorBoardLog, thinned, thinned_losses
from recipes.report import EARLY_STEPS, RunReport, environment
from recipes.results import Trained, VariantResult
from recipes.run_folder import (
    Progress,
    open_run_folder,
    progress_until,
    resume_flags,
    shared_settings,
)
from recipes.simplifying import (
    begin_simplification,
    measure_simplified,
    prunes_after,
    without_removed_units,
)
from recipes.variants import STOCK, Variant

CONFIG = flags.DEFINE_string(
    "config",
    "digits_mobilenet_v1",
    f"one of {', '.join(config_names())}, or the path of a file like these in recipes/configs; "
    "what it sets comes before the other defaults",
)
define_flags()
processes.define_flags()
for module in (config_module, processes):  # So that --help shows them.
    flags.adopt_module_key_flags(module)


#: Pixels of height and width where nothing says them: of the networks of the recipes, and of
#: models from files that take any (that of most models in keras.applications).
BUILT_IN_SIZE, OPEN_SIZE = 32, 224


class RecipeError(ValueError):
    """What the user can mend, found before the training begins."""


def run_recipe(
    config: Config, others: processes.Processes | None = None, *, verbose: int = 1
) -> RunReport:
    """Trains every variant of `config` and writes the results.

    All variants start from the same weights and see the same batches and the
    same dropout.

    Args:
        config: The experiment.
        others: The processes that train together, of which the first one
            writes the files; None means this one alone.
        verbose: Of `model.fit`: 1 shows progress bars, 2 a line for each epoch,
            0 nothing.

    Returns:
        What was measured, and the folder of the results.

    Raises:
        RecipeError: Before any training, if the data, a lowering, the devices
            or the folder of the results is not as expected.
        TrainingInterrupted: After SIGTERM or SIGINT, when the step is saved.
        NonFiniteLossError: If the loss is NaN or infinite.
    """
    # Whatever can be wrong is found here, in seconds.
    try:
        distribution = Distribution.start(config, others)
        config, warnings = with_settings_of_model(config)
        distribution.processes.agree("settings", shared_settings(config))
        variants = parse_variants(config)
        for variant in variants:
            distribution.check(variant.settings(config))
        images = data.load(
            config.dataset,
            image_size=config.image_size,
            data_dir=config.data_dir,
            download=config.download,
            corrupt_images=config.corrupt_images,
            cache_gb=config.cache_gb,
            shuffle_buffer=config.shuffle_buffer,
        )
        data.steps_per_epoch(images, config.batch_size)
        distribution.processes.agree("images", images.digest())
        with distribution.scope():
            start = make_start(config, images, distribution)
            model = start.model
            phases_of(config)[0].prepare(model)
            for variant in variants:
                if variant.simplifies(config):
                    check_simplification(config, images, variant, distribution)
        if config.model not in BUILT_IN:
            distribution.processes.agree(f"weights in {config.model}", weights_digest(model))
        folder = str(open_run_folder(config)) if distribution.is_first else ""
        folder = pathlib.Path(distribution.processes.from_first(folder))
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error
    flags_to_resume = resume_flags(config, folder)
    logging.info("The results will be in %s; to go on with them: %s", folder, flags_to_resume)
    config = dataclasses.replace(config, name=folder.name)
    logging.info("%s", inspect_model(model, config.batch_size))
    trained: list[Trained] = []
    with distribution.scope():
        for variant in variants:
            try:
                trained.append(
                    train_variant(
                        config,
                        images,
                        variant,
                        folder,
                        distribution,
                        stock=next((t for t in trained if t.result.name == STOCK), None),
                        verbose=verbose,
                    )
                )
            except TrainingInterrupted as interruption:
                interruption.flags = flags_to_resume
                raise
        model = trained[-1].model
        compiled = bool(model.jit_compile)
        steps = compare_steps(
            trained,
            functools.partial(default_model, config, images, distribution),
            # More epochs, or a short training would have too few batches.
            functools.partial(
                training_data,
                dataclasses.replace(config, epochs=config.epochs + 10),
                images,
                distribution,
                0,
            ),
            folder / "step_times.json",
            distribution.processes,
        )
        # Not before the steps have been timed: they would be compiled again.
        for each in trained:
            stop_averaging(each.model)
        # The last variant, in stock layers again wherever that computes the same.
        test = evaluation_data(config, images, distribution)
        simplified, smaller = {}, None
        for variant, each in zip(variants, trained, strict=True):
            smaller = None
            if variant.simplifies(config):
                smaller = without_removed_units(each.model)
                simplified[variant.name] = measure_simplified(each.model, smaller, test)
        restored = variants[-1].finish(model) if smaller is None else smaller
        accuracy = restored.evaluate(test, return_dict=True, verbose=0)["accuracy"]
        # As users expect it of a classifier.
        restored = models.with_probabilities(restored)
    report = RunReport(
        config,
        folder,
        {**environment(compiled), "devices": distribution.describe(compiled)},
        tuple(each.result for each in trained),
        accuracy,
        skipped_files=images.skipped_files,
        steps=steps,
        head=start.head,
        warnings=warnings,
        simplified=simplified,
    )
    if distribution.is_first:
        files.write_aside(folder / "model.keras", without_training_state(restored).save)
        if variants[-1].keeps_float_weights:
            low_bit = without_training_state(models.with_probabilities(model))
            files.write_aside(folder / "low_bit.keras", low_bit.save)
        files.write_text(
            folder / "class_names.json", json.dumps(images.class_names, ensure_ascii=False)
        )
        # An export that fails must cost nothing that was measured before.
        report.write()
        try:
            report = dataclasses.replace(report, exported=export_model(restored, folder))
        except Exception as error:  # Whatever Keras and the format's packages raise.
            failure = f"not exported: {summarize_error(error, lines=2)}"
            logging.warning("%s", failure)
            report = dataclasses.replace(report, warnings=(*report.warnings, failure))
        report.write()
    return report


def with_settings_of_model(config: Config) -> tuple[Config, tuple[str, ...]]:
    """`config` with the image size and the range of pixels that its model takes.

    Returns:
        The settings, and warnings for the report.

    Raises:
        ValueError: If the model's file cannot be read.
    """
    size, input_range = BUILT_IN_SIZE, None
    if config.model not in BUILT_IN:
        found = image_input(config.model)
        size, input_range = found.size or OPEN_SIZE, found.input_range
    warnings: tuple[str, ...] = ()
    if config.input_range != "auto" and input_range not in (None, config.input_range):
        warnings = (
            f"{config.model} preprocesses pixels itself, and wants input_range='{input_range}'. "
            f"It gets '{config.input_range}': pixels are preprocessed twice, and all images may "
            "look the same to it",
        )
        logging.warning("%s.", warnings[0])
    settings: dict[str, Any] = {"image_size": config.image_size or size}
    if config.input_range == "auto":
        settings["input_range"] = input_range or "symmetric"
    return dataclasses.replace(config, **settings), warnings


def parse_variants(config: Config) -> list[Variant]:
    """The variants of `config`, in order.

    Raises:
        ValueError: If one is unknown, or two would write the same files.
    """
    variants = [Variant.parse(name) for name in config.variants]
    if len({variant.file_name for variant in variants}) < len(variants):
        raise ValueError(
            "Expected variants whose files have different names. Received: "
            f"{', '.join(config.variants)}"
        )
    if config.simplify and not any(variant.simplifies(config) for variant in variants):
        raise ValueError(
            "Expected `simplify` with a treatment that knows the active units, such as "
            f"'meprop:k=30'. Received: simplify={config.simplify:g} with "
            f"{', '.join(config.variants)}"
        )
    return variants


def check_simplification(
    config: Config, images: data.ImageData, variant: Variant, distribution: Distribution
) -> None:
    """Looks before any training whether `variant` can lose hidden units.

    Raises:
        ValueError: If it cannot; the message says why.
    """
    model = build_model(config, images, distribution)
    if config.ema_momentum:
        average_statistics(model, average_momentum(config))
    compile_model(model, config, 1, variant.wrap)
    assert variant.treatment is not None  # Else it does not simplify.
    variant.treatment.apply(model)
    begin_simplification(model, config, 1)


def train_variant(
    config: Config,
    images: data.ImageData,
    variant: Variant,
    folder: pathlib.Path,
    distribution: Distribution,
    *,
    stock: Trained | None = None,
    verbose: int = 1,
) -> Trained:
    """Trains one variant to its end, from its last checkpoint if there is one.

    Another one that chose Keras's own layers is not trained again where `stock`
    was trained before.

    Raises:
        RecipeError: If a checkpoint cannot be read or is of another model, or
            processes have different plans or checkpoints.
    """
    others, is_first = distribution.processes, distribution.is_first
    config = variant.settings(config)
    steps_per_epoch = data.steps_per_epoch(images, config.batch_size)
    steps = config.epochs * steps_per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    result_file = folder / "results" / f"{variant.file_name}.json"
    metrics_file = folder / "metrics.jsonl" if is_first else pathlib.Path(os.devnull)
    phases = phases_of(config)
    saved = [
        Checkpoints(folder / "checkpoints" / f"{variant.file_name}{phase.suffix}")
        for phase in phases
    ]
    present = max((n for n, each in enumerate(saved) if each.paths()), default=0)

    # The same start for all.
    model = build_model(config, images, distribution)
    if config.ema_momentum:
        average_statistics(model, average_momentum(config))
    # Most of the training is the last phase: lowerings are chosen for that.
    phases[-1].prepare(model)
    compile_model(model, config, steps_per_epoch, variant.wrap)
    plan = variant.apply(model, config)
    if plan is not None and is_first:
        (folder / "plans").mkdir(exist_ok=True)
        plan.save(folder / "plans" / f"{variant.file_name}.json", overwrite=True)
    choice = explain_choice(variant, model, plan)
    others.agree("lowering or plan", plan.to_json() if plan else str(variant.lowering))
    if stock is not None and chose_stock(variant, model):
        choice = f"{choice} (the program of stock, which is not trained twice)"
        return Trained(
            stock.model,
            dataclasses.replace(stock.result, name=variant.name, choice=choice),
            stock.is_new,
        )
    if phases[present] != phases[-1]:
        phases[present].prepare(model)
        compile_model(model, config, steps_per_epoch, variant.wrap)
    simplification = None
    if variant.simplifies(config):
        # Now, because checkpoints have its counters.
        simplification = begin_simplification(model, config, steps_per_epoch)
    # The same dropout for all: on PyTorch it has no generator of its own.
    keras.utils.set_random_seed(config.seed)
    try:
        start = saved[present].restore(model)
        steps_done = start.step if start else 0
        others.agree(f"checkpoint in {folder}", str(steps_done))
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error
    # With a lower `max_steps` than before there is nothing to train, but a test may be missing.
    steps = max(steps, steps_done)
    epochs = -(-steps // steps_per_epoch)
    # One that was ended by a lower `max_steps` has a result too, and goes on.
    is_done = others.from_first("done" if steps_done >= steps and result_file.exists() else "")
    if is_done:
        # As at the end of `fit_from`.
        finalize_averages(model)
        if simplification is not None:
            simplification.on_train_end()
        return Trained(model, VariantResult.from_json(result_file.read_text()), is_new=False)
    progress = Progress()
    if is_first:
        progress = progress_until(
            metrics_file, variant.name, steps_done, start.epochs if start else 0
        )

    logging.info(
        "Training %s (%s): %d epochs of %d steps with %d images, from step %d",
        config.model,
        variant.name,
        epochs,
        steps_per_epoch,
        config.batch_size,
        steps_done,
    )
    with metrics_file.open("a") as file, others.interruption() as interruption:
        log = MetricsLog(variant.name, file, progress, start.record if start else {})
        for phase, checkpoints in zip(phases[present:], saved[present:], strict=True):
            first_step = phase.first_epoch * steps_per_epoch
            if phase is not phases[present]:
                if steps <= first_step:
                    break
                phase.prepare(model)
                compile_model(model, config, steps_per_epoch, variant.wrap)
                set_steps_done(model.optimizer, first_step)
                start = Checkpoint(first_step, phase.first_epoch, log.state())
            # The timer comes first, so that it does not time the others.
            timer = StepTimer()
            callbacks = [timer, log, *optional_callbacks(config, variant, folder, timer, is_first)]
            if simplification is not None:
                callbacks.append(simplification)
            fit_from(
                model,
                start,
                functools.partial(training_data, config, images, distribution),
                steps_per_epoch=steps_per_epoch,
                epochs=min(epochs, phase.end_epoch),
                validation_data=evaluation_data(config, images, distribution),
                callbacks=callbacks,
                checkpoints=checkpoints if is_first else None,
                save_every=config.checkpoint_epochs,
                record=log.state,
                interruption=interruption,
                log_every=config.log_every,
                log_first=EARLY_STEPS,
                tell_after=simplification and prunes_after(simplification),
                max_steps=None if config.max_steps is None else steps,
                verbose=verbose,
            )
    losses = thinned_losses(log.losses, keep=EARLY_STEPS)
    result = VariantResult(
        name=variant.name,
        losses=tuple(losses.values()),
        loss_steps=tuple(losses),
        test_accuracies=tuple(log.test_accuracies),
        steps=timer.summary(),
        step_seconds=thinned(timer.timings.samples),
        choice=choice,
        test_top5_accuracy=log.test_top5_accuracy,
        bits=variant.bits,
        is_treated=variant.treatment is not None,
        kept=variant.kept,
    )
    if is_first:
        result_file.parent.mkdir(exist_ok=True)
        files.write_text(result_file, result.to_json())
    return Trained(model, result)


def default_model(
    config: Config, images: data.ImageData, distribution: Distribution
) -> keras.Model:
    """Keras's own layers, compiled as Keras does by itself; not trained."""
    model = build_model(config, images, distribution)
    if config.ema_momentum:
        average_statistics(model, average_momentum(config))
    phases_of(config)[-1].prepare(model)
    steps_per_epoch = data.steps_per_epoch(images, config.batch_size)
    compile_model(model, dataclasses.replace(config, jit_compile="auto"), steps_per_epoch)
    return model


def optional_callbacks(
    config: Config, variant: Variant, folder: pathlib.Path, timer: StepTimer, is_first: bool
) -> list[keras.callbacks.Callback]:
    """What `config` asks for, and TensorBoard's events where they can be written."""
    callbacks: list[keras.callbacks.Callback] = []
    if config.ema_momentum:
        callbacks.append(SwapAverages())
    if keras.backend.backend() == "tensorflow" and is_first:
        events = folder / "tensorboard" / variant.file_name
        callbacks.append(TensorBoardLog(events, timer))
    if config.profile and is_first:
        callbacks.append(Profile(folder / "profile" / variant.file_name))
    return callbacks


def training_data(
    config: Config, images: data.ImageData, distribution: Distribution, first_step: int
) -> Any:
    """The batches from `first_step` on to the end of the last epoch."""
    return data.training_dataset(
        images,
        config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        augmentation=config.augmentation,
        first_step=first_step,
        input_range=config.input_range,
        one_hot=bool(config.label_smoothing),
        replicas=distribution.replicas,
    )


def evaluation_data(config: Config, images: data.ImageData, distribution: Distribution) -> Any:
    """All test images, or this process's part of them."""
    return data.evaluation_dataset(
        images,
        config.batch_size,
        augmentation=config.augmentation,
        input_range=config.input_range,
        one_hot=bool(config.label_smoothing),
        replicas=distribution.replicas,
    )


def build_model(config: Config, images: data.ImageData, distribution: Distribution) -> keras.Model:
    """The model of `make_start`."""
    return make_start(config, images, distribution).model


def make_start(config: Config, images: data.ImageData, distribution: Distribution) -> Start:
    """The network in Keras's own layers, with the weights that all variants start from.

    It gives logits: see `models.with_probabilities`.

    Raises:
        ValueError: If a file has no model that fits the images.
    """
    # The same initial weights, and seeds of dropout, in every variant.
    keras.utils.set_random_seed(config.seed)
    if config.model not in BUILT_IN:
        start = load_start(config.model, images.image_shape, images.classes)
    else:
        start = Start(_built_in(config, images))
    distribution.prepare(start.model, config)
    return start


def _built_in(config: Config, images: data.ImageData) -> keras.Model:
    build = {
        "mobilenet_v1": models.mobilenet_v1,
        "mobilenet_v2": models.mobilenet_v2,
        "small_cnn": models.small_cnn,
        "svhn_cnn": dorefa_models.svhn_cnn,
        "alexnet": dorefa_models.alexnet,
        "mlp": mlp,
    }
    options: dict[str, Any] = {}
    if "mobilenet" in config.model:
        options["stem"] = config.stem
    if config.model != "mlp":
        options["batch_norm_momentum"] = config.batch_norm_momentum
    elif config.standardize:
        options["statistics"] = PixelStatistics.of(images, config.input_range)
    former_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype_policy)
    try:
        return build[config.model](
            images.image_shape,
            images.classes,
            width_multiplier=config.width_multiplier,
            dropout=config.dropout,
            **options,
            classifier_activation=None,
        )
    finally:
        keras.config.set_dtype_policy(former_policy)


def without_training_state(model: keras.Model) -> keras.Model:
    """`model` as it is saved for others: optimizer, schedule and devices are the recipe's."""
    synchronize_batch_norms(model, False)
    model.compiled = False
    model.optimizer = None
    return model


def export_model(model: keras.Model, folder: pathlib.Path) -> str:
    """Writes a SavedModel where the backend can; returns what was found, or why not."""
    if keras.backend.backend() != "tensorflow":
        return ""
    # TensorFlow tells every step of it through absl.
    with quiet_logging():
        exported = export(model, folder / "saved_model", overwrite=True)
    logging.info("%s", exported)
    return str(exported)


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Only warnings and errors are logged inside."""
    logger = logging.get_absl_logger()
    # absl's own pair of functions is no round trip: it sets a level where there was none.
    former = logger.level
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(former)


def main(argv: list[str]) -> None:
    """Runs the recipe that the flags describe."""
    del argv
    logging.set_verbosity(logging.INFO)
    try:
        config = config_from_flags(load_config(CONFIG.value))
        others = processes.Processes.join()
    except ValueError as error:
        exit_with_line(str(error), code=2)
    try:
        # Progress bars are for terminals; in a file each update would be a line.
        report = run_recipe(config, others, verbose=1 if sys.stdout.isatty() else 2)
    except (RecipeError, NonFiniteLossError) as error:
        exit_with_line(str(error), code=1)
    except TrainingInterrupted as interruption:
        others.wait_for_first()
        exit_with_line(str(interruption), code=EXIT_INTERRUPTED)
    others.wait_for_first()
    if others.is_first:
        report.print()
        print(f"Results: {report.folder}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
