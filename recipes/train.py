"""Trains a network, stock and diagonalwise, on the same batches, and compares.

    python -m recipes.train --config=digits_mobilenet_v1
    python -m recipes.train --config=digits_mobilenet_v1 --epochs=2 --compare=stock,shifted

Reads from top to bottom: checks → data → models → fit → report → export. The
results are in `runs/NAME`; `recipes/report.py` says which files.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import keras
from absl import app, flags, logging

from diagconv_tf import StepTimer, export, files, inspect_model
from recipes import config as config_module
from recipes import data, models
from recipes.config import (
    Config,
    config_from_flags,
    define_flags,
    exit_with_line,
    load_config,
    parse_flags,
)
from recipes.report import (
    MetricsLog,
    RunReport,
    StopAfter,
    TensorBoardLog,
    VariantResult,
    environment,
    new_run_folder,
)

CONFIG = flags.DEFINE_string(
    "config", "digits_mobilenet_v1", "a file in recipes/configs, or the path of one"
)
define_flags()
flags.adopt_module_key_flags(config_module)  # So that --help shows them.


class RecipeError(ValueError):
    """What the user can mend, found before the training begins."""


def run_recipe(config: Config, *, verbose: int = 1) -> RunReport:
    """Trains every variant of `config` and writes the results.

    All variants start from the same weights and see the same batches and the
    same dropout.

    Args:
        config: The experiment.
        verbose: Of `model.fit`: 1 shows progress bars, 0 nothing.

    Returns:
        What was measured, and the folder of the results.

    Raises:
        RecipeError: Before any training, if the data, a lowering or the folder
            of the results is not as expected.
    """
    on_tensorflow = keras.backend.backend() == "tensorflow"

    # Data, models and folder: whatever can be wrong is found here, in seconds.
    try:
        images = data.load(
            config.dataset,
            image_size=config.image_size,
            data_dir=config.data_dir,
            download=config.download,
        )
        steps_per_epoch = len(training_batches(config, images))
        variants = {name: build_model(config, images, name) for name in config.variants}
        folder = new_run_folder(config)
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error
    logging.info("The results will be in %s", folder)
    logging.info("%s", inspect_model(next(iter(variants.values())), config.batch_size))
    if not on_tensorflow:
        logging.warning(
            "TensorBoard events and a SavedModel need the TensorFlow backend. Received: %s",
            keras.backend.backend(),
        )

    # The same start for all.
    start = next(iter(variants.values())).get_weights()
    for model in variants.values():
        model.set_weights(start)

    # Fit.
    results = []
    with open(folder / "metrics.jsonl", "w") as metrics_file:
        for variant, model in variants.items():
            logging.info(
                "Training %s (%s): %d epochs of %d steps with %d images",
                config.model,
                variant,
                config.epochs,
                steps_per_epoch,
                config.batch_size,
            )
            # The same dropout for all: on PyTorch it has no generator of its own.
            keras.utils.set_random_seed(config.seed)
            compile_model(model, config, steps_per_epoch)
            # The timer comes first, so that it does not time the others.
            timer, log = StepTimer(), MetricsLog(variant, metrics_file)
            batches = training_batches(config, images)
            callbacks = [timer, log, data.FollowEpochs(batches)]
            if on_tensorflow:
                callbacks.append(TensorBoardLog(folder / "tensorboard" / file_name(variant)))
            if config.max_steps is not None:
                callbacks.append(StopAfter(config.max_steps))
            model.fit(
                batches,
                validation_data=data.EvaluationBatches(images.test, config.batch_size),
                epochs=config.epochs,
                callbacks=callbacks,
                shuffle=False,  # The batches know their order.
                verbose=verbose,
            )
            result = VariantResult(
                name=variant,
                losses=tuple(log.losses),
                test_accuracies=tuple(log.test_accuracies),
                steps=timer.summary(),
                step_seconds=timer.timings.samples,
            )
            log.write_end(result)
            results.append(result)

    # Report.
    report = RunReport(config, folder, environment(), tuple(results))
    report.write()

    # Export: the last variant as it was trained, and in stock layers.
    files.write_aside(folder / "model.keras", model.save)
    if on_tensorflow:
        # TensorFlow tells every step of it through absl.
        with quiet_logging():
            exported = export(model, folder / "saved_model")
        logging.info("%s", exported)
    return report


def training_batches(config: Config, images: data.ImageData) -> data.TrainingBatches:
    """The training images as batches of epoch 0."""
    return data.TrainingBatches(
        images.train, config.batch_size, seed=config.seed, augmentation=config.augmentation
    )


def build_model(config: Config, images: data.ImageData, variant: str) -> keras.Model:
    """The network with the depthwise layers of `variant`.

    Raises:
        ValueError: If the lowering is unknown or cannot compute a layer.
    """
    # The same initial weights, and seeds of dropout, in every variant.
    keras.utils.set_random_seed(config.seed)
    build = {"mobilenet_v1": models.mobilenet_v1, "mobilenet_v2": models.mobilenet_v2}
    former_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype_policy)
    try:
        return build[config.model](
            images.image_shape,
            images.classes,
            width_multiplier=config.width_multiplier,
            stem=config.stem,
            dropout=config.dropout,
            batch_norm_momentum=config.batch_norm_momentum,
            lowering=parse_lowering(variant),
        )
    finally:
        keras.config.set_dtype_policy(former_policy)


def parse_lowering(variant: str) -> models.Lowering | None:
    """The lowering for the layers; `None` for `"stock"`, a dict for JSON."""
    if variant == "stock":
        return None
    if not variant.startswith("{"):
        return variant
    try:
        return json.loads(variant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected a lowering per pass to be a JSON object. Received: {variant} ({error})"
        ) from error


def compile_model(model: keras.Model, config: Config, steps_per_epoch: int) -> None:
    """SGD with Nesterov momentum, a linear warm-up and a cosine to zero."""
    steps = config.epochs * steps_per_epoch
    warmup_steps = int(config.warmup_fraction * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        # Not 0, or the first step would be lost.
        initial_learning_rate=config.learning_rate / max(1, warmup_steps),
        warmup_target=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=steps - warmup_steps,
    )
    optimizer = keras.optimizers.SGD(
        schedule,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay or None,
    )
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(
        optimizer,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile={"auto": "auto", "on": True, "off": False}[config.jit_compile],
    )


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Only warnings and errors are logged inside."""
    former = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(former)


def file_name(variant: str) -> str:
    """`variant` without the characters that file systems dislike."""
    return re.sub(r"[^\w.]+", "-", variant).strip("-")


def main(argv: list[str]) -> None:
    """Runs the recipe that the flags describe."""
    del argv
    logging.set_verbosity(logging.INFO)
    try:
        config = config_from_flags(load_config(CONFIG.value))
    except ValueError as error:
        exit_with_line(str(error), code=2)
    try:
        report = run_recipe(config)
    except RecipeError as error:
        exit_with_line(str(error), code=1)
    report.print()
    print(f"Results: {report.folder}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
