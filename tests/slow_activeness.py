"""The activeness of a small perceptron's units, in NumPy, one example after another."""

import numpy as np


def largest(row, k):
    """Which numbers of a row are its k largest by magnitude and not zero."""
    order = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))
    flags = np.zeros(len(row), bool)
    flags[order[:k]] = True
    return flags & (row != 0)


def hits(weights, x, y, k, unified=False):
    """How often each hidden unit is active in one batch; one array for each hidden layer.

    Args:
        weights: kernels and biases of dense layers with ReLU, the last without.
        x: inputs.
        y: targets of a squared error.
        k: units that each hidden layer's backward pass takes.
        unified: whether a batch takes the same units.
    """
    layers = [
        (np.float64(weights[i]), np.float64(weights[i + 1])) for i in range(0, len(weights), 2)
    ]
    inputs, before = [np.float64(x)], []
    for kernel, bias in layers:
        before.append(inputs[-1] @ kernel + bias)
        inputs.append(np.maximum(before[-1], 0))
    gradient = before[-1] - y
    counts = []
    for number in range(len(layers) - 2, -1, -1):
        gradient = gradient @ layers[number + 1][0].T * (before[number] > 0)
        active = np.array([largest(row, k) for row in gradient])
        counts.insert(0, active.sum(axis=0))
        if unified:
            gradient = gradient * largest(np.abs(gradient).sum(axis=0), k)
        else:
            gradient = gradient * active
    return counts
