"""Every setting of a recipe changes what is built, fed or optimised."""

import keras
import numpy as np
import pytest

from recipes import data, models, optimizers, train
from recipes.config import Config
from recipes.distributing import Distribution

SIZE = 32


@pytest.fixture
def one_block(monkeypatch):
    """Networks of one block: what is traced is most of the time of a step."""
    monkeypatch.setattr(models, "_V1_BLOCKS", models._V1_BLOCKS[:1])
    monkeypatch.setattr(models, "_V2_STAGES", models._V2_STAGES[:1])


def built(config):
    images = data.load("synthetic", image_size=config.image_size)
    return train.build_model(config, images, Distribution())


@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize(
    ("network", "policy"),
    [("mobilenet_v1", "mixed_bfloat16"), ("mobilenet_v2", "mixed_float16")],
)
def test_an_example_that_is_wrong_by_far_has_its_gradient_in_half_precision(network, policy):
    """Of cross-entropy and a softmax p it is p minus the label, for any logits."""
    config = Config(
        model=network,
        width_multiplier=0.25,
        dtype_policy=policy,
        learning_rate=1.0,
        momentum=0.0,
        schedule="constant",
        warmup_fraction=0.0,
    )
    model = built(config)
    optimizers.compile_model(model, config, 10)
    kernel, bias = model.trainable_variables[-2:]
    kernel.assign(np.zeros(kernel.shape))
    gap = 20.0
    bias.assign(np.array([gap, *[0.0] * 9]))
    before = keras.ops.convert_to_numpy(bias).copy()
    model.train_on_batch(np.zeros((2, SIZE, SIZE, 3), "float32"), np.array([1, 1]))
    change = keras.ops.convert_to_numpy(bias) - before
    np.testing.assert_allclose(change, [-1, 1, *[0.0] * 8], atol=1e-5)
    assert model.outputs[0].dtype == "float32"


@pytest.mark.usefixtures("one_block")
def test_probabilities_are_the_softmax_of_the_trained_logits():
    model = built(Config(width_multiplier=0.25))
    saved = models.with_probabilities(model)
    assert [v.path for v in saved.variables] == [v.path for v in model.variables]
    assert saved.input is model.input  # As a tensor, not as a list: so it is served.
    for _ in range(2):
        images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype("float32")
        logits, found = (keras.ops.convert_to_numpy(m(images)) for m in (model, saved))
        exponentials = np.exp(logits)
        expected = exponentials / exponentials.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        model.trainable_variables[-1].assign(np.arange(10.0))  # The weights are shared.
    # A model that has a layer of this name, and half precision.
    inputs = keras.Input((4,), dtype="float32")
    half = keras.layers.Dense(3, name="probabilities", dtype="bfloat16")(inputs)
    again = models.with_probabilities(keras.Model(inputs, half))
    assert again.outputs[0].dtype == "float32"
