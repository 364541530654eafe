"""Moving averages of batch norms' statistics, beside those of the weights.

With `use_ema`, Keras's optimizers average the trainable weights only. Batch
norms' moving mean and variance stay those of the latest weights, which do not
go with averaged ones. So `ExponentialMovingAverage` in TF-slim's training of
ImageNet takes `moving_average_variables`, the batch norms' statistics among
them, and timm's `ModelEmaV2` the whole `state_dict`. The same is done here:
the statistics are averaged with the momentum of the weights, so that both lag
alike.

The averages are variables of the batch norms while the model is trained: so
the compiled step updates them, on every backend and all devices, and
checkpoints have them. Before and after, the layers are Keras's own.

    average_statistics(model, momentum)    # then compile, with use_ema
    model.fit(..., callbacks=[SwapAverages()])
    finalize_averages(model)               # `fit_from` does that
    stop_averaging(model)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from absl import logging

from diagconv_tf import keras_internals
from diagconv_tf.class_swap import set_class
from diagconv_tf.model_tree import walk_layers

_Pairs = list[tuple[keras.Variable, keras.Variable]]


class AveragingBatchNormalization(keras.layers.BatchNormalization):
    """A batch norm that averages its moving statistics in each training step.

    `average_statistics` makes them of Keras's own; none is ever constructed.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        outputs = super().call(inputs, training=training, mask=mask)
        if training and self.trainable:
            momentum = self._average_momentum
            for statistic, average in _statistics(self):
                average.assign(momentum * average + (1.0 - momentum) * statistic)
        return outputs


def average_statistics(model: keras.Model, momentum: float) -> None:
    """Lets the batch norms of `model` average their moving statistics in training.

    The averages begin with the present statistics. A layer that is called twice
    in a step averages twice, as it moves its statistics twice.

    Batch norms of other classes than Keras's own are left alone: their
    statistics may be others. A warning names them.

    Args:
        model: built, and not compiled yet.
        momentum: of a batch: `average = momentum * average + (1 - momentum) * statistic`.
    """
    others = []
    for place in walk_layers(model):
        layer = place.layer
        if type(layer) is keras.layers.BatchNormalization and layer.built:
            _begin(layer, momentum)
        elif isinstance(layer, keras.layers.BatchNormalization):
            others.append(f"{place.path} ({type(layer).__name__})")
    if others:
        logging.warning(
            "The weights are averaged, but not the statistics of the batch norms that are not "
            "exactly keras.layers.BatchNormalization; the accuracy may suffer: %s",
            ", ".join(others),
        )


def finalize_averages(model: keras.Model) -> None:
    """The averages of weights and statistics, where there are any, become their values.

    Keras's `fit` does that at its end, but for the weights only.

    Args:
        model: compiled; its optimizer has been built.
    """
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for layer in _averaging_layers(model):
        for statistic, average in _statistics(layer):
            _assign(model, statistic, average)


def stop_averaging(model: keras.Model) -> None:
    """Makes the batch norms Keras's own again; their averages are gone.

    Args:
        model: any; without `average_statistics` before, it stays as it is.
    """
    layers = _averaging_layers(model)
    for layer in layers:
        for average in vars(layer).pop("_averages"):
            keras_internals.untrack_variable(layer, average)
        del vars(layer)["_average_momentum"]
        set_class(layer, keras.layers.BatchNormalization)
    if keras.backend.backend() == "torch":
        # Models have parameters of their own for the variables of their layers.
        keras_internals.track_torch_variables(model)
    if layers:
        # They were compiled with the averages.
        model.train_function = model.test_function = model.predict_function = None


class SwapAverages(keras.callbacks.Callback):
    """Evaluates with the averages of weights and statistics in place of the latest.

    Keras's `SwapEMAWeights` swaps the weights only; and on TensorFlow it adds
    and subtracts, so that the weights come back rounded.
    """

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._swap()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self._swap()

    def _swap(self) -> None:
        pairs = _weights(self.model.optimizer)
        for layer in _averaging_layers(self.model):
            pairs += _statistics(layer)
        for variable, average in pairs:
            _exchange(self.model, variable, average)


def _begin(layer: keras.layers.Layer, momentum: float) -> None:
    statistics = (layer.moving_mean, layer.moving_variance)
    # A built layer takes no more variables, unless it is told to.
    keras_internals.tracker(layer).unlock()
    try:
        averages = tuple(
            # As `BatchNormalization.build` makes the statistics themselves.
            layer.add_weight(
                shape=statistic.shape,
                dtype=statistic.dtype,
                name=f"{statistic.name}_average",
                initializer="zeros",
                trainable=False,
                autocast=False,
            )
            for statistic in statistics
        )
    finally:
        keras_internals.tracker(layer).lock()
    for average, statistic in zip(averages, statistics, strict=True):
        average.assign(_value(statistic))
    # Past the bookkeeping of attributes: the layer has them in its lists, and
    # what no attribute names leaves no trace when it is taken out of these.
    vars(layer).update(_averages=averages, _average_momentum=momentum)
    set_class(layer, AveragingBatchNormalization)


def _averaging_layers(model: keras.Model) -> list[AveragingBatchNormalization]:
    layers: Iterable[keras.layers.Layer] = (place.layer for place in walk_layers(model))
    return [layer for layer in layers if isinstance(layer, AveragingBatchNormalization)]


def _statistics(layer: AveragingBatchNormalization) -> _Pairs:
    mean, variance = layer._averages
    return [(layer.moving_mean, mean), (layer.moving_variance, variance)]


def _weights(optimizer: keras.Optimizer) -> _Pairs:
    # A `LossScaleOptimizer` wraps the one that averages.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Keras averages no variables that are overwritten with their gradients.
    return keras_internals.averaged_variables(optimizer)


def _exchange(model: keras.Model, one: keras.Variable, other: keras.Variable) -> None:
    if keras.backend.backend() == "tensorflow":
        # On each device its own: they differ where batch norms are not synchronized.
        update = model.distribute_strategy.extended.update
        update(one.value, _exchange_on_device, args=(other.value,))
        return
    held = _value(one)
    one.assign(_value(other))
    other.assign(held)


def _exchange_on_device(one: Any, other: Any) -> None:
    held = one.read_value()
    one.assign(other)
    other.assign(held)


def _assign(model: keras.Model, variable: keras.Variable, source: keras.Variable) -> None:
    if keras.backend.backend() == "tensorflow":
        update = model.distribute_strategy.extended.update
        update(variable.value, lambda one, other: one.assign(other), args=(source.value,))
        return
    variable.assign(_value(source))


def _value(variable: keras.Variable) -> np.ndarray:
    # A copy: on JAX two variables must not share an array, or the next step
    # cannot donate it; on PyTorch it would follow the variable.
    return np.array(keras.ops.convert_to_numpy(variable))
