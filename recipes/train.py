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
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
from absl import app, flags, logging

from diagconv_tf import StepTimer, export, files, inspect_model
from recipes import config as config_module
from recipes import data, dorefa_models, models, processes
from recipes.averaging import (
    SwapAverages,
    average_statistics,
    finalize_averages,
    stop_averaging,
)
from recipes.checkpoints import Checkpoints, weights_digest
from recipes.config import (
    BUILT_IN,
    Config,
    config_from_flags,
    define_flags,
    exit_with_line,
    load_config,
    parse_flags,
)
from recipes.distributing import Distribution, divide_cpu, synchronize_batch_norms
from recipes.finetuning import load_start
from recipes.fitting import fit_from
from recipes.input_wait import seconds_without_input
from recipes.interruption import (
    EXIT_INTERRUPTED,
    NonFiniteLossError,
    TrainingInterrupted,
)
from recipes.optimizers import average_momentum, compile_model
from recipes.profiling import Profile
from recipes.recording import MetricsLog, StopAfter, TensorBoardLog
from recipes.report import RunReport, environment
from recipes.results import VariantResult
from recipes.run_folder import (
    Progress,
    open_run_folder,
    progress_until,
    resume_flags,
    shared_settings,
)
from recipes.variants import Variant

CONFIG = flags.DEFINE_string(
    "config", "digits_mobilenet_v1", "a file in recipes/configs, or the path of one"
)
define_flags()
processes.define_flags()
for module in (config_module, processes):  # So that --help shows them.
    flags.adopt_module_key_flags(module)


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
        verbose: Of `model.fit`: 1 shows progress bars, 0 nothing.

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
        distribution.processes.agree("settings", shared_settings(config))
        variants = parse_variants(config)
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
            model = build_model(config, images, distribution)
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
    results = []
    with distribution.scope():
        for variant in variants:
            try:
                model, result = train_variant(
                    config, images, variant, folder, distribution, verbose=verbose
                )
            except TrainingInterrupted as interruption:
                interruption.flags = flags_to_resume
                raise
            results.append(result)
        jit_compile = bool(model.jit_compile)
        # The last variant, in stock layers again wherever that computes the same.
        restored = variant.finish(model)
        test = evaluation_data(config, images, distribution)
        accuracy = restored.evaluate(test, return_dict=True, verbose=0)["accuracy"]
    exported = ""
    if distribution.is_first:
        files.write_aside(folder / "model.keras", without_training_state(restored).save)
        if variant.keeps_float_weights:
            files.write_aside(folder / "low_bit.keras", without_training_state(model).save)
        exported = export_model(restored, folder)
    report = RunReport(
        config,
        folder,
        {**environment(), "devices": distribution.describe(jit_compile)},
        tuple(results),
        accuracy,
        exported,
        images.skipped_files,
    )
    if distribution.is_first:
        report.write()
    return report


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
    return variants


def train_variant(
    config: Config,
    images: data.ImageData,
    variant: Variant,
    folder: pathlib.Path,
    distribution: Distribution,
    *,
    verbose: int = 1,
) -> tuple[keras.Model, VariantResult]:
    """Trains one variant to its end, from its last checkpoint if there is one.

    Returns:
        The trained model, and what was measured.

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
    checkpoints = Checkpoints(folder / "checkpoints" / variant.file_name)

    # The same start for all.
    model = build_model(config, images, distribution)
    if config.ema_momentum:
        average_statistics(model, average_momentum(config))
    compile_model(model, config, steps_per_epoch, variant.wrap)
    plan = variant.apply(model, config)
    if plan is not None and is_first:
        (folder / "plans").mkdir(exist_ok=True)
        plan.save(folder / "plans" / f"{variant.file_name}.json", overwrite=True)
    # The same dropout for all: on PyTorch it has no generator of its own.
    keras.utils.set_random_seed(config.seed)
    try:
        start = checkpoints.restore(model)
        steps_done = start.step if start else 0
        others.agree("lowering or plan", plan.to_json() if plan else str(variant.lowering))
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
        stop_averaging(model)
        return model, VariantResult.from_json(result_file.read_text())
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
        # The timer comes first, so that it does not time the others.
        timer = StepTimer()
        log = MetricsLog(variant.name, file, progress, start.record if start else {})
        callbacks = [timer, log]
        if config.max_steps is not None:
            callbacks.append(StopAfter(steps - steps_done))
        callbacks += optional_callbacks(config, variant, folder, timer, is_first)
        fit_from(
            model,
            start,
            functools.partial(training_data, config, images, distribution),
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            validation_data=evaluation_data(config, images, distribution),
            callbacks=callbacks,
            checkpoints=checkpoints if is_first else None,
            save_every=config.checkpoint_epochs,
            record=log.state,
            interruption=interruption,
            verbose=verbose,
        )
    result = VariantResult(
        name=variant.name,
        losses=tuple(log.losses),
        test_accuracies=tuple(log.test_accuracies),
        steps=timer.summary(),
        step_seconds=timer.timings.samples,
        without_input_seconds=seconds_without_input(
            model, next(iter(training_data(config, images, distribution, 0)))
        ),
        choice=plan.reason if plan is not None else "",
        bits=variant.bits,
    )
    # Not before the step without input has been timed: it would be compiled again.
    stop_averaging(model)
    if is_first:
        result_file.parent.mkdir(exist_ok=True)
        files.write_text(result_file, result.to_json())
    return model, result


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
    """The network in Keras's own layers, with the weights that all variants start from.

    Raises:
        ValueError: If a file has no model that fits the images.
    """
    # The same initial weights, and seeds of dropout, in every variant.
    keras.utils.set_random_seed(config.seed)
    if config.model not in BUILT_IN:
        model = load_start(config.model, images.image_shape, images.classes)
    else:
        model = _built_in(config, images)
    distribution.prepare(model, config)
    return model


def _built_in(config: Config, images: data.ImageData) -> keras.Model:
    build = {
        "mobilenet_v1": models.mobilenet_v1,
        "mobilenet_v2": models.mobilenet_v2,
        "small_cnn": models.small_cnn,
        "svhn_cnn": dorefa_models.svhn_cnn,
        "alexnet": dorefa_models.alexnet,
    }
    stem = {"stem": config.stem} if "mobilenet" in config.model else {}
    former_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype_policy)
    try:
        return build[config.model](
            images.image_shape,
            images.classes,
            width_multiplier=config.width_multiplier,
            **stem,
            dropout=config.dropout,
            batch_norm_momentum=config.batch_norm_momentum,
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
        group = processes.group_from_flags()
    except ValueError as error:
        exit_with_line(str(error), code=2)
    try:
        if group is not None:
            divide_cpu(config.cpu_devices)
        others = processes.Processes.join(group)
    except (ValueError, OSError) as error:
        exit_with_line(str(error), code=1)
    with others.ending_together():
        try:
            report = run_recipe(config, others, verbose=1)
        except (RecipeError, NonFiniteLossError) as error:
            others.end_with_line(str(error), code=1)
        except TrainingInterrupted as interruption:
            others.leave()
            exit_with_line(str(interruption), code=EXIT_INTERRUPTED)
        others.leave()
    if others.is_first:
        report.print()
        print(f"Results: {report.folder}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
