"""Run as a script: trains on two virtual CPUs, and prints what it found as JSON.

Virtual devices must be asked for before a framework starts, so that this is a process of
its own; test_mesimp.py says what the findings must be.
"""

import contextlib
import json
import os

BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras  # noqa: E402 - JAX reads the variable when it is imported.
import numpy as np  # noqa: E402

from diagconv_tf import keras_internals, rewrite  # noqa: E402
from diagconv_tf.minimal_effort import MinimalEffort, activeness  # noqa: E402
from diagconv_tf.minimal_effort.compacting import compact  # noqa: E402
from diagconv_tf.minimal_effort.mesimp import MeSimp  # noqa: E402
from diagconv_tf.minimal_effort.unit_graph import unit_graph  # noqa: E402
from tests import slow_activeness  # noqa: E402

BATCH, K = 8, 4


def two_devices():
    if BACKEND == "jax":
        devices = keras.distribution.list_devices()
        return keras.distribution.DataParallel(devices=devices)
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def weights_of(model):
    # While JAX trains, they are elsewhere.
    keras_internals.sync_training_state(model)
    variables = (v for v in model.trainable_variables if not activeness.is_counter(v))
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def made():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(12, activation="relu", name="first")(inputs)
    hidden = keras.layers.Dense(10, activation="relu", name="second")(hidden)
    model = rewrite(keras.Model(inputs, keras.layers.Dense(3)(hidden)), MinimalEffort(k=K))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def main():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype("float32")
    y = rng.normal(size=(40, 3)).astype("float32")
    devices = two_devices()
    with devices.scope():
        model = made()
    # Outside the scope, as users of TensorFlow do; a distribution of Keras must be current.
    with devices.scope() if BACKEND == "jax" else contextlib.nullcontext():
        graph = unit_graph(model)
        activeness.attach(model, graph, [(layer, K) for layer in graph.hidden[:2]])
        expected = [np.zeros(12, int), np.zeros(10, int)]

        def count(step, logs=None):
            part = slice(step * BATCH, (step + 1) * BATCH)
            hits = slow_activeness.hits(weights_of(model), x[part], y[part], K)
            for total, new in zip(expected, hits, strict=True):
                total += new

        watch = keras.callbacks.LambdaCallback(on_train_batch_begin=count)
        # `fit` and not `train_on_batch`, which on TensorFlow gives every replica all examples.
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[watch])
        found = activeness.activeness_of(model)
        activeness.detach(model)
        # The second epoch is an ordinary one, with a new state of the optimizer.
        simplify = MeSimp(rate=0.3, prune_every=0.4, cycle_epochs=1)
        model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[simplify])
        kernel = model.get_layer("first").kernel.value
        parts = getattr(kernel, "values", None) or [s.data for s in kernel.addressable_shards]
        same = bool(np.array_equal(*map(np.asarray, parts)))
        smaller = compact(model)
        error = np.max(np.abs(model.predict(x, verbose=0) - smaller.predict(x, verbose=0)))
    print(
        json.dumps(
            {
                "hits": [found[path].hits.tolist() for path in ("first", "second")],
                "expected": [total.tolist() for total in expected],
                "examples": [found[path].examples for path in ("first", "second")],
                "weights are equal": same,
                "left": [smaller.get_layer(path).units for path in ("first", "second")],
                "left by the prunings": [p.after for p in simplify.prunings[-2:]],
                "error of the compact model": float(error),
            }
        )
    )


if __name__ == "__main__":
    main()
