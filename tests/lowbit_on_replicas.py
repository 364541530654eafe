"""Run as a script: trains on two virtual CPUs, and prints what it found as JSON.

Virtual devices must be asked for before TensorFlow starts, so that this is a process of its
own; test_lowbit_models.py says what the findings must be.
"""

import json

import keras
import numpy as np
import tensorflow as tf

from diagconv_tf import LowBit, rewrite
from diagconv_tf.lowbit import StochasticRounding

DELTA = 0.01


def main():
    devices = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        devices[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    inputs = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    with strategy.scope():
        keras.utils.set_random_seed(0)
        x = symbolic = keras.Input((6,))
        for name in "abc":
            x = keras.layers.Dense(6, name=name)(x)
        model = keras.Model(symbolic, x)
        model.compile(StochasticRounding(keras.optimizers.SGD(0.1), DELTA, seed=1), "mse")
    # Outside the scope, as users do.
    rewrite(model, LowBit(gradients=2, seed=5), in_place=True)
    middle = model.get_layer("b")

    @tf.function
    def gradient():
        x = tf.constant(inputs)
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = middle(x, training=True) * x
        return tape.gradient(outputs, x)

    # Both replicas have the same inputs and weights, and so differ by their noise.
    first, second = strategy.run(gradient).values
    kernels = []
    for _ in range(2):
        model.train_on_batch(inputs, inputs)
        kernels.append([part.numpy() for part in middle.kernel.value.values])
    steps = kernels[-1][0] / DELTA
    print(
        json.dumps(
            {
                "noise differs": bool(np.any(first.numpy() != second.numpy())),
                "kernels are equal": bool(np.array_equal(*kernels[-1])),
                "kernels change": bool(np.any(kernels[0][0] != kernels[1][0])),
                "on the grid": bool(np.allclose(steps, np.round(steps), atol=1e-3)),
            }
        )
    )


if __name__ == "__main__":
    main()
