"""Minimal effort back-propagation for an LSTM that tags sequences whose tags need memory.

    python examples/tag_sequences.py
    python examples/tag_sequences.py --k=4,10 --units=256 --epochs=8

The sequences are made here. Their symbols are letters, and a few of them brackets; the tag of a
letter is its kind, and which bracket came last, however long ago. Trained are an ordinary
LSTM and, from the same weights, one for each k: of the gradient of each gate the k largest
elements of each example and step are kept (arXiv 1711.06528). The tag accuracy of each
is printed; the most frequent tag alone gives what the first line says.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from absl import app, flags, logging

from diagconv_tf import MinimalEffort, rewrite

LETTERS, BRACKETS = 20, 3
KINDS = 2
TAGS = KINDS * (BRACKETS + 1)


def make_sequences(count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random sequences and their tags.

    Args:
        count: number of sequences.
        length: symbols of each.
        seed: of the sequences.

    Returns:
        Symbols, int32, (count, length), brackets after the letters; and tags, the same.
    """
    rng = np.random.default_rng(seed)
    symbols = rng.integers(LETTERS, size=(count, length))
    is_bracket = rng.random((count, length)) < 0.1
    symbols[is_bracket] = LETTERS + rng.integers(BRACKETS, size=is_bracket.sum())
    # The place of the last bracket up to here; -1 before the first.
    places = np.where(is_bracket, np.arange(length), -1)
    last = np.maximum.accumulate(places, axis=1)
    brackets = np.take_along_axis(symbols, np.maximum(last, 0), axis=1) - LETTERS
    state = np.where(last < 0, 0, brackets + 1)
    tags = symbols % KINDS + KINDS * state
    return symbols.astype("int32"), tags.astype("int32")


def build_model(units: int) -> keras.Model:
    """A tagger: (batch, length) symbols → (batch, length, tags) logits."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(LETTERS + BRACKETS, 32),
            keras.layers.LSTM(units, return_sequences=True),
            keras.layers.Dense(TAGS),
        ]
    )
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(k: int | None, units: int, epochs: int, sequences: int, length: int, seed: int) -> float:
    """Trains an LSTM.

    Args:
        k: elements that are kept of a gate's gradient; `None` trains as usual.
        units: of the LSTM.
        epochs: passes over the training sequences.
        sequences: number of training sequences.
        length: symbols of a sequence.
        seed: of weights, sequences and their order.

    Returns:
        The share of right tags in new sequences.
    """
    keras.utils.set_random_seed(seed)
    model = build_model(units)
    if k is not None:
        rewrite(model, MinimalEffort(k=k), in_place=True)
    symbols, tags = make_sequences(sequences, length, seed)
    model.fit(symbols, tags, batch_size=32, epochs=epochs, verbose=0)
    test = make_sequences(500, length, seed + 1)
    return model.evaluate(*test, batch_size=100, verbose=0, return_dict=True)["accuracy"]


def compare(numbers: Sequence[int], **settings: int) -> None:
    """Trains as usual and with each k, and prints the accuracies; settings are of `train`."""
    _, tags = make_sequences(500, settings["length"], settings["seed"] + 1)
    print(f"most frequent tag: {100 * np.bincount(tags.ravel()).max() / tags.size:.2f} %")
    for k in (None, *numbers):
        name = "ordinary" if k is None else f"k={k} of {settings['units']}"
        print(f"{name}: {100 * train(k, **settings):.2f} %", flush=True)


def main(_: list[str]) -> None:
    """Compares what the flags say."""
    values = flags.FLAGS
    try:
        numbers = [int(text) for text in values.k]
    except ValueError as error:
        raise app.UsageError(f"Expected integers as --k. Received: {values.k}") from error
    logging.set_verbosity(logging.ERROR)  # `rewrite` warns that gradients change.
    names = ("units", "epochs", "sequences", "length", "seed")
    compare(numbers, **{name: values[name].value for name in names})


if __name__ == "__main__":
    flags.DEFINE_list("k", ["2", "10", "32"], "Elements that are kept of a gate's gradient.")
    flags.DEFINE_integer("units", 128, "Units of the LSTM.", lower_bound=1)
    flags.DEFINE_integer("epochs", 4, "Passes over the training sequences.", lower_bound=1)
    flags.DEFINE_integer("sequences", 1000, "Training sequences.", lower_bound=1)
    flags.DEFINE_integer("length", 30, "Symbols of a sequence.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of weights, sequences and their order.", lower_bound=0)
    app.run(main)
