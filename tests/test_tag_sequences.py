"""The example of an LSTM that tags sequences."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

from diagconv_tf import minimal_effort


@pytest.fixture(scope="module")
def example():
    path = pathlib.Path(__file__).parents[1] / "examples" / "tag_sequences.py"
    spec = importlib.util.spec_from_file_location("tag_sequences", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tags_are_those_of_a_slow_reading(example):
    symbols, tags = example.make_sequences(20, 12, seed=3)
    assert (symbols >= example.LETTERS).any()
    for sequence, found in zip(symbols, tags, strict=True):
        last = 0
        for symbol, tag in zip(sequence, found, strict=True):
            if symbol >= example.LETTERS:
                last = 1 + symbol - example.LETTERS
            assert tag == symbol % example.KINDS + example.KINDS * last
    assert tags.max() == example.TAGS - 1
    np.testing.assert_array_equal(example.make_sequences(20, 12, seed=3)[1], tags)


def test_it_trains_and_prints_accuracies(example, capsys, monkeypatch):
    treated = []
    rewrite = example.rewrite

    def spy(model, treatment, **options):
        treated.append(type(rewrite(model, treatment, **options).layers[1]))

    monkeypatch.setattr(example, "rewrite", spy)
    example.compare([2], units=4, epochs=1, sequences=32, length=5, seed=0)
    lines = capsys.readouterr().out.splitlines()
    names = ["most frequent tag", "ordinary", "k=2 of 4"]
    assert [re.sub(r": \d+\.\d\d %$", "", line) for line in lines] == names
    assert treated == [minimal_effort.MinimalEffortLSTM]
