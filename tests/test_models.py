"""MobileNetV1 and V2 are those of keras.applications."""

import dataclasses

import keras
import numpy as np
import pytest

from recipes import models

# The networks are graphs of Keras's layers, the same on every backend;
# tests/test_recipes.py trains one of them on each.
pytestmark = pytest.mark.backends("tensorflow")

CLASSES = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of ours and of keras.applications with the same settings."""

    name: str
    height: int
    width: int
    width_multiplier: float

    @property
    def shape(self):
        return (self.height, self.width, 3)

    def ours(self, **arguments):
        build = getattr(models, self.name)
        return build(self.shape, CLASSES, width_multiplier=self.width_multiplier, **arguments)

    def theirs(self):
        build = {
            "mobilenet_v1": keras.applications.MobileNet,
            "mobilenet_v2": keras.applications.MobileNetV2,
        }[self.name]
        return build(
            input_shape=self.shape, alpha=self.width_multiplier, weights=None, classes=CLASSES
        )


CASES = (
    Case("mobilenet_v1", 64, 64, 0.25),
    Case("mobilenet_v1", 33, 40, 0.5),  # Odd sizes: the paddings differ between the two.
    Case("mobilenet_v2", 64, 64, 0.35),
    Case("mobilenet_v2", 33, 47, 1.4),  # Above 1 the last convolution grows as well.
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request):
    """(case, ours, theirs) with the same weights, none of them trivial."""
    case = request.param
    ours, theirs = case.ours(), case.theirs()
    rng = np.random.default_rng(0)
    # All vectors: biases, and scale, offset, mean and variance of the batch norms.
    theirs.set_weights(
        [rng.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in theirs.get_weights()]
    )
    ours.set_weights(theirs.get_weights())
    return case, ours, theirs


def describe(layer):
    """What must be equal, layer by layer. Automatic names are counted up."""
    config = layer.get_config()
    keys = ("strides", "padding", "filters", "use_bias", "momentum", "epsilon", "rate")
    automatic = isinstance(layer, keras.layers.InputLayer | keras.layers.GlobalAveragePooling2D)
    return (
        type(layer).__name__,
        None if automatic else layer.name,
        tuple(layer.output.shape),
        [tuple(weight.shape) for weight in layer.weights],
        {key: config[key] for key in keys if key in config},
    )


def predict(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def images_for(case, count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, *case.shape)).astype("float32")


def test_layers_equal_keras_applications(pair):
    _, ours, theirs = pair
    assert [describe(layer) for layer in ours.layers] == [
        describe(layer) for layer in theirs.layers
    ]
    assert ours.count_params() == theirs.count_params()


def test_outputs_equal_keras_applications(pair):
    case, ours, theirs = pair
    images = images_for(case)
    expected = predict(theirs, images)
    assert np.ptp(expected) > 1e-3  # Else anything would pass.
    np.testing.assert_allclose(predict(ours, images), expected, atol=1e-6)


# Height of the outputs of the depthwise layers, one after another. ImageNet: table 1 of arXiv
# 1704.04861 and table 2 of arXiv 1801.04381. CIFAR: what the strides of github.com/kuangliu/
# pytorch-cifar (models/mobilenet.py, models/mobilenetv2.py) make of 32.
HEIGHTS = {
    ("mobilenet_v1", "imagenet", 224): [112, 56, 56, 28, 28, *[14] * 6, 7, 7],
    ("mobilenet_v1", "cifar", 32): [32, 16, 16, 8, 8, *[4] * 6, 2, 2],
    ("mobilenet_v2", "imagenet", 224): [112, 56, 56, *[28] * 3, *[14] * 7, *[7] * 4],
    ("mobilenet_v2", "cifar", 32): [32, 32, 32, *[16] * 3, *[8] * 7, *[4] * 4],
}


@pytest.mark.parametrize(("name", "stem", "size"), HEIGHTS)
def test_sizes_are_those_of_the_sources(name, stem, size):
    model = getattr(models, name)((size, size, 3), 10, width_multiplier=0.35, stem=stem)
    depthwise = [x for x in model.layers if isinstance(x, keras.layers.DepthwiseConv2D)]
    assert [x.output.shape[1] for x in depthwise] == HEIGHTS[name, stem, size]
    # The weights interchange with those of the other stem, and of keras.applications.
    case = Case(name, 32, 32, 0.35)
    expected = [tuple(w.shape) for w in case.theirs().get_weights()[:-2]]
    assert [tuple(w.shape) for w in model.get_weights()[:-2]] == expected


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_depthwise_kernels_begin_as_he_says(name):
    """arXiv 1502.01852, equation 10, for the 9 inputs of an output."""
    model = getattr(models, name)((32, 32, 3), 10)
    depthwise = [x for x in model.layers if isinstance(x, keras.layers.DepthwiseConv2D)]
    for layer in depthwise:
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        # Of 288 values or more the deviation is off by 4 %.
        assert kernel.std() == pytest.approx((2 / 9) ** 0.5, rel=0.2)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_logits_are_what_the_probabilities_are_of(name):
    case = Case(name, 32, 32, 0.25)
    probabilities, logits = case.ours(), case.ours(classifier_activation=None)
    logits.set_weights(probabilities.get_weights())
    images = images_for(case)
    exponentials = np.exp(predict(logits, images))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predict(probabilities, images), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_channels_first_has_the_same_weights_and_sizes(name):
    build = getattr(models, name)
    last = build((32, 71, 4), 3, width_multiplier=0.25)
    keras.config.set_image_data_format("channels_first")
    try:
        first = build((4, 32, 71), 3, width_multiplier=0.25)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert [tuple(w.shape) for w in first.weights] == [tuple(w.shape) for w in last.weights]

    def sizes(model, axes):
        shapes = [x.output.shape for x in model.layers if isinstance(x, keras.layers.ReLU)]
        return [tuple(shape[axis] for axis in axes) for shape in shapes]

    assert sizes(first, (2, 3, 1)) == sizes(last, (1, 2, 3))


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_shape": (31, 32, 3)}, r"at least 32.*\(31, 32, 3\)"),
        ({"input_shape": (32, 31, 3)}, r"at least 32.*\(32, 31, 3\)"),
        ({"input_shape": (32, 32)}, r"three positive integers.*\(32, 32\)"),
        ({"input_shape": (None, 32, 3)}, r"three positive integers.*None"),
        ({"classes": 0}, "classes=0"),
        ({"stem": "resnet"}, "'imagenet', 'cifar'.*'resnet'"),
        ({"width_multiplier": 0}, "width_multiplier=0"),
        ({"dropout": 1.0}, r"\[0, 1\).*dropout=1.0"),
        ({"classifier_activation": "relu"}, "'softmax', None.*'relu'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(name, changed, message):
    arguments = {"input_shape": (32, 32, 3), "classes": 2, **changed}
    with pytest.raises(ValueError, match=message) as error:
        getattr(models, name)(**arguments)
    assert "Received" in str(error.value)


def test_a_width_without_filters_is_refused():
    with pytest.raises(ValueError, match=r"at least one of the 32 filters.*0\.01"):
        models.mobilenet_v1((32, 32, 3), 2, width_multiplier=0.01)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 8), (8, 8), (11.2, 16), (11.9, 16), (12, 16), (33.6, 32), (22.4, 24), (1792.0, 1792)],
)
def test_filters_are_rounded_to_multiples_of_8(value, expected):
    assert models._make_divisible(value) == expected
