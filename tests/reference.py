"""Grouped 2-D convolution in plain NumPy float64, and its two gradients.

Written from the definition, window by window, with nothing from the package:
the forward pass gathers a window of the padded input for every output pixel,
the gradients scatter and accumulate over the same windows.
"""

import itertools

import numpy as np


def _geometry(size, kernel, stride, dilation, padding):
    """(zeros before, zeros after, outputs) along one axis."""
    extent = (kernel - 1) * dilation + 1
    if padding == "valid":
        return 0, 0, (size - extent) // stride + 1
    outputs = (size + stride - 1) // stride
    total = max((outputs - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2, outputs


def _windows(x_shape, kernel_size, strides, dilation_rate, padding):
    """Padding of an NHWC input, output size, and a slice pair per output pixel."""
    vertical, horizontal = (
        _geometry(x_shape[1 + axis], kernel_size[axis], strides[axis], dilation_rate[axis], padding)
        for axis in (0, 1)
    )
    windows = {}
    for row, column in itertools.product(range(vertical[2]), range(horizontal[2])):
        windows[row, column] = tuple(
            slice(first, first + (k - 1) * d + 1, d)
            for first, k, d in zip(
                (row * strides[0], column * strides[1]), kernel_size, dilation_rate, strict=True
            )
        )
    pads = ((0, 0), vertical[:2], horizontal[:2], (0, 0))
    return pads, (vertical[2], horizontal[2]), windows


def conv(x, k, g, *, groups, strides=(1, 1), dilation_rate=(1, 1), padding="valid"):
    """Outputs, input gradient and kernel gradient of a grouped convolution.

    Args:
        x: inputs, NHWC.
        k: kernel `(kh, kw, C / groups, F)`, output channels group by group.
        g: gradient by the outputs, of their shape, or a function of the shape.

    Returns:
        `(y, dx, dk, g)` in float64.
    """
    x, k = np.asarray(x, "float64"), np.asarray(k, "float64")
    kh, kw, i, f = k.shape
    o = f // groups
    pads, size, windows = _windows(x.shape, (kh, kw), strides, dilation_rate, padding)
    padded = np.pad(x, pads)
    y = np.zeros((len(x), *size, f))
    g = np.asarray(g(y.shape) if callable(g) else g, "float64")
    d_padded, dk = np.zeros_like(padded), np.zeros_like(k)
    by_group = k.reshape(kh, kw, i, groups, o)
    for (row, column), (rows, columns) in windows.items():
        window = padded[:, rows, columns, :].reshape(len(x), kh, kw, groups, i)
        d_out = g[:, row, column, :].reshape(len(x), groups, o)
        y[:, row, column, :] = np.einsum("nhwgi,hwigo->ngo", window, by_group).reshape(len(x), f)
        d_window = np.einsum("ngo,hwigo->nhwgi", d_out, by_group)
        d_padded[:, rows, columns, :] += d_window.reshape(len(x), kh, kw, groups * i)
        dk += np.einsum("nhwgi,ngo->hwigo", window, d_out).reshape(kh, kw, i, f)
    _, height, width, _ = x.shape
    top, left = pads[1][0], pads[2][0]
    return y, d_padded[:, top : top + height, left : left + width], dk, g
