"""Whatever Keras's own layers pass of Keras's own tests, ours pass.

Keras ships its tests in its wheel. Here they run twice, with stock layers and
with ours put in their place, and the outcomes must agree.
"""

import functools
import importlib
import unittest

import pytest

from diagconv_tf import DiagonalwiseConv2D, DiagonalwiseDepthwiseConv2D, DiagonalwiseSeparableConv2D
from tests.numerics import BACKEND, THOROUGH

PLACES = {
    "depthwise_conv_test": ("DepthwiseConv2D", DiagonalwiseDepthwiseConv2D),
    "separable_conv_test": ("SeparableConv2D", DiagonalwiseSeparableConv2D),
    "conv_test": ("Conv2D", DiagonalwiseConv2D),
}


def outcomes(module):
    """`{test: "passed", "skipped" or "failed"}` and `{failed test: traceback}`.

    Tests of 1-D and 3-D layers are left out.
    """
    result = unittest.TestResult()
    tests = [
        test
        for group in unittest.defaultTestLoader.loadTestsFromModule(module)
        for test in group
        if not any(rank in test.id() for rank in ("1d", "3d"))
    ]
    unittest.TestSuite(tests).run(result)
    bad = {_name(test): text for test, text in result.failures + result.errors}
    skipped = {_name(test) for test, _ in result.skipped}
    return {
        name: "failed" if name in bad else "skipped" if name in skipped else "passed"
        for name in map(_name, tests)
    }, bad


def _name(test):
    # What follows shows the arguments, and so the class.
    return test.id().split(" ")[0]


def reload(module_name):
    """Keras's test module, its tables of cases made anew."""
    name = f"keras.src.layers.convolutional.{module_name}"
    module = pytest.importorskip(name, reason="this Keras comes without its tests")
    return importlib.reload(module)


@functools.cache
def stock_outcomes(module_name):
    return outcomes(reload(module_name))[0]


# They are of the layers' interfaces, which know no lowering; what these compute has tests of
# its own. So one on each backend is enough.
LOWERINGS = {"tensorflow": ["diagonal:2"], "torch": ["shifted"]}
if THOROUGH:
    LOWERINGS = {backend: ["diagonal:2", "shifted"] for backend in LOWERINGS}


# Keras's tests say nothing of backends that the lowerings' own tests do not;
# compiling every one apart, JAX would take minutes.
@pytest.mark.slow
@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("lowering", LOWERINGS.get(BACKEND, []))
@pytest.mark.parametrize(
    "module_name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PLACES]
)
def test_ours_pass_what_stock_passes(module_name, lowering, monkeypatch):
    stock = stock_outcomes(module_name)
    stock_name, ours = PLACES[module_name]
    # Not a subclass with another default: it would not be registered to load.
    monkeypatch.setitem(ours.__init__.__kwdefaults__, "lowering", lowering)
    from keras.src import layers

    monkeypatch.setattr(layers, stock_name, ours)
    own, messages = outcomes(reload(module_name))
    assert own.keys() == stock.keys()
    assert sum(outcome == "passed" for outcome in stock.values()) >= 5
    different = {n: messages.get(n, own[n]) for n in stock if own[n] != stock[n]}
    assert not different, "\n".join(f"{n}: {text}" for n, text in different.items())
