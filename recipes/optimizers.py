"""How a recipe's model is compiled: loss, optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from diagconv_tf import keras_internals
from recipes.config import Config

#: Name of the metric that counts where the right class is among the five most probable.
TOP5_ACCURACY = "top5_accuracy"


def compile_model(
    model: keras.Model,
    config: Config,
    steps_per_epoch: int,
    wrap: Callable[[keras.Optimizer, keras.Model], keras.Optimizer] | None = None,
) -> None:
    """Compiles `model`, which gives logits, as `config` says.

    With `label_smoothing` the labels must be one-hot, else class numbers. `wrap` makes
    another optimizer of the optimizer and the model.
    """
    spared = () if config.decay_depthwise else _depthwise_kernels(model)
    optimizer = make_optimizer(config, steps_per_epoch, spared)
    if wrap is not None:
        optimizer = wrap(optimizer, model)
    if config.label_smoothing:
        loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=config.label_smoothing
        )
        top_k = keras.metrics.TopKCategoricalAccuracy
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        top_k = keras.metrics.SparseTopKCategoricalAccuracy
    # Of five classes or fewer, the right one is always among the first five.
    top5 = [top_k(5, name=TOP5_ACCURACY)] if model.output_shape[-1] > 5 else []
    model.compile(
        optimizer,
        loss=loss,
        # Keras finds out which accuracy fits the loss; the name is the same. Weights
        # come where several devices share a batch: see `data.evaluation_dataset`.
        weighted_metrics=["accuracy", *top5],
        jit_compile={"auto": "auto", "true": True, "false": False}[config.jit_compile],
    )


def make_optimizer(
    config: Config, steps_per_epoch: int, spared: Sequence[keras.Variable] = ()
) -> keras.Optimizer:
    """SGD with Nesterov momentum, RMSprop or Adam, with weight decay on kernels only.

    A step is a batch; the weights are updated every `gradient_accumulation` of
    them.

    Args:
        config: The settings.
        steps_per_epoch: Batches.
        spared: Kernels without weight decay.
    """
    arguments: dict[str, Any] = {
        "learning_rate": learning_rate(config, steps_per_epoch),
        "weight_decay": config.weight_decay or None,
    }
    if config.gradient_accumulation > 1:
        arguments["gradient_accumulation_steps"] = config.gradient_accumulation
    if config.ema_momentum:
        arguments |= {"use_ema": True, "ema_momentum": average_momentum(config)}
    if config.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(momentum=config.momentum, nesterov=True, **arguments)
    elif config.optimizer == "rmsprop":
        optimizer = keras.optimizers.RMSprop(
            rho=config.rho, momentum=config.momentum, epsilon=config.epsilon, **arguments
        )
    else:
        optimizer = keras.optimizers.Adam(
            beta_1=config.momentum, epsilon=config.epsilon, **arguments
        )
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(
            var_list=list(spared), var_names=["bias", "gamma", "beta"]
        )
    return optimizer


def _depthwise_kernels(model: keras.Model) -> list[keras.Variable]:
    # Their names do not tell: it is "kernel", as elsewhere.
    depthwise = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
    separable = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
    layers = list(keras_internals.flatten_layers(model))
    return [layer.kernel for layer in layers if isinstance(layer, depthwise)] + [
        layer.depthwise_kernel for layer in layers if isinstance(layer, separable)
    ]


def average_momentum(config: Config) -> float:
    """What one batch leaves of an average, so that an update leaves `config.ema_momentum`.

    Keras averages the weights after every batch, whether it has updated them
    or not, as batch norms move their statistics with every batch.
    """
    return config.ema_momentum ** (1 / config.gradient_accumulation)


def learning_rate(
    config: Config, steps_per_epoch: int
) -> keras.optimizers.schedules.LearningRateSchedule | float:
    """The learning rate at each step: a linear warm-up, then `config.schedule`.

    With gradient accumulation, too, Keras asks for the rate of a step, not of an update.
    """
    total = config.epochs * steps_per_epoch
    warmup = int(config.warmup_fraction * total)
    schedules = keras.optimizers.schedules
    if config.schedule == "cosine":
        after: Any = schedules.CosineDecay(config.learning_rate, max(1, total - warmup))
    elif config.schedule == "step":
        steps = [max(1, round(epochs * steps_per_epoch)) for epochs in config.decay_epochs]
        if len(steps) == 1:
            after = schedules.ExponentialDecay(
                config.learning_rate, steps[0], config.decay_rate, staircase=True
            )
        else:
            rates = [config.learning_rate * config.decay_rate**n for n in range(len(steps) + 1)]
            # The last update with a rate, where the others count the first with the next.
            after = schedules.PiecewiseConstantDecay([step - 1 for step in steps], rates)
    else:
        after = config.learning_rate
    return WarmUp(config.learning_rate, warmup, after) if warmup else after


@keras.saving.register_keras_serializable(package="diagconv_recipes")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly, from one part of the peak in the first update; then another schedule.

    (Of Keras's own schedules only the cosine has a warm-up, and that begins
    with an update of rate 0.)

    Args:
        peak: learning rate that the warm-up ends with.
        updates: its length; update number `updates` is the first of `after`.
        after: a schedule, which begins with its own update 0, or a constant.
    """

    def __init__(
        self,
        peak: float,
        updates: int,
        after: keras.optimizers.schedules.LearningRateSchedule | float,
    ) -> None:
        self.peak = peak
        self.updates = updates
        self.after = after

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        after = self.after
        if callable(after):
            after = after(ops.maximum(step - self.updates, 0))
        return ops.where(step < self.updates, self.peak * (step + 1) / self.updates, after)

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "updates": self.updates,
            "after": keras.saving.serialize_keras_object(self.after),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WarmUp:
        return cls(**{**config, "after": keras.saving.deserialize_keras_object(config["after"])})
