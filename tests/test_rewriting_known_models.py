"""Networks that people use: those of keras.applications and of KerasHub."""

import functools

import keras
import numpy as np
import pytest

from diagconv_tf import inspect_model, restore, rewrite
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.model_tree import walk_layers
from tests import model_zoo
from tests.numerics import BACKEND, THOROUGH

applications = keras.applications


def _application(name, size=32, **arguments):
    if name == "NASNetLarge":
        size = 64
    return getattr(applications, name)(
        weights=None, include_top=False, input_shape=(size, size, 3), **arguments
    )


def _in_float64(build):
    """Without training, EfficientNetV2L turns a change of 1e-6 in its input into one of 80 %."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        return build()
    finally:
        keras.config.set_dtype_policy(policy)


def _keras_hub(name, **arguments):
    keras_hub = pytest.importorskip("keras_hub")
    return getattr(keras_hub.models, name)(**arguments)


_MOBILENET = {
    "stackwise_expansion": [[16], [8, 24]],
    "stackwise_num_blocks": [1, 2],
    "stackwise_num_filters": [[8], [8, 8]],
    "stackwise_kernel_size": [[3], [5, 5]],
    "stackwise_num_strides": [[2], [2, 1]],
    "stackwise_se_ratio": [[0.25], [None, 0.25]],
    "stackwise_activation": [["relu"], ["relu", "hard_swish"]],
    "stackwise_padding": [[1], [2, 2]],
    "output_num_filters": 16,
    "depthwise_filters": 8,
    "depthwise_stride": 2,
    "depthwise_residual": False,
    "last_layer_filter": 16,
    "squeeze_and_excite": 0.5,
    "image_shape": (32, 32, 3),
}
_EFFICIENTNET = {
    "stackwise_width_coefficients": [1.0, 1.0],
    "stackwise_depth_coefficients": [1.0, 1.0],
    "stackwise_kernel_sizes": [3, 5],
    "stackwise_num_repeats": [1, 2],
    "stackwise_input_filters": [8, 8],
    "stackwise_output_filters": [8, 16],
    "stackwise_expansion_ratios": [1, 4],
    "stackwise_strides": [1, 2],
    "stackwise_squeeze_and_excite_ratios": [0.25, 0.25],
    "stackwise_block_types": ["v1", "v1"],
    "stackwise_force_input_filters": [0, 0],
    "stackwise_nores_option": [False, False],
    "dropout": 0.2,
    "input_shape": (32, 32, 3),
}
_XCEPTION = {
    "stackwise_conv_filters": [[4, 4], [8, 8]],
    "stackwise_pooling": [True, False],
    "image_shape": (32, 32, 3),
}
_MIT = {
    "layerwise_depths": [1, 1],
    "image_shape": (32, 32, 3),
    "hidden_dims": [8, 16],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.0,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
}

#: name: (builder, number of convolutions with groups, as far as it is published)
MODELS = {
    "MobileNet": (functools.partial(_application, "MobileNet", alpha=0.25), 13),
    "MobileNetV2": (functools.partial(_application, "MobileNetV2", alpha=0.35), 17),
    "MobileNetV3Small": (functools.partial(_application, "MobileNetV3Small"), 11),
    "EfficientNet": (model_zoo.efficientnet, 7),
    "Xception": (functools.partial(_application, "Xception", size=71), 34),
    "NASNet": (model_zoo.nasnet, None),
    "ConvNeXt": (model_zoo.convnext, 5),
    "KerasHub MobileNet": (functools.partial(_keras_hub, "MobileNetBackbone", **_MOBILENET), None),
    "KerasHub EfficientNet": (
        functools.partial(_keras_hub, "EfficientNetBackbone", **_EFFICIENTNET),
        3,
    ),
    "KerasHub Xception": (functools.partial(_keras_hub, "XceptionBackbone", **_XCEPTION), None),
    "KerasHub MiT": (functools.partial(_keras_hub, "MiTBackbone", **_MIT), 2),
}
#: Further sizes of the same architectures.
if THOROUGH:
    MODELS |= {
        "EfficientNetB0": (functools.partial(_application, "EfficientNetB0"), 16),
        "NASNetMobile": (functools.partial(_application, "NASNetMobile"), 160),
        "ConvNeXtTiny": (functools.partial(_application, "ConvNeXtTiny"), 18),
    }
    MODELS |= {
        name: (functools.partial(_application, name), None)
        for name in (
            "MobileNetV3Large",
            *(f"EfficientNetB{number}" for number in range(1, 8)),
            *(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M")),
            "NASNetLarge",
            *(f"ConvNeXt{size}" for size in ("Small", "Base", "Large", "XLarge")),
        )
    }
    large = functools.partial(_application, "EfficientNetV2L")
    MODELS["EfficientNetV2L"] = (functools.partial(_in_float64, large), None)


#: One of each kind of layer: what else is in a network is not the layer's matter. Uncompiled,
#: those of the deepest networks take minutes.
WITH_GRADIENTS = ("MobileNet", "ConvNeXt", "KerasHub Xception") if BACKEND == "tensorflow" else ()


def ours(model):
    return [place.layer for place in walk_layers(model) if isinstance(place.layer, LoweredLayer)]


def outputs(model, inputs):
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(inputs))]


def facts(model):
    """All that a rewriting must not change, but the classes."""
    return (
        type(model),
        [place.path for place in walk_layers(model)],
        [variable.path for variable in model.variables],
    )


def input_gradient_and_weight_gradients(model, inputs):
    """Gradients of a random projection of the outputs, in evaluation mode."""
    import tensorflow as tf

    inputs = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = 0.0
        for number, y in enumerate(keras.tree.flatten(model(inputs))):
            weights = np.random.default_rng(number).normal(size=y.shape).astype("float32")
            total += tf.reduce_sum(y * weights)
    sources = [inputs, *(variable.value for variable in model.trainable_variables)]
    return [gradient.numpy() for gradient in tape.gradient(total, sources)]


def assert_close(values, wanted, tolerance):
    scale = max(np.abs(want).max() for want in wanted)
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=0, atol=tolerance * scale)


# The models are Keras's own and the code that handles them knows no backend:
# the other two run a small one.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MODELS
        if BACKEND == "tensorflow" or THOROUGH or name == "KerasHub MobileNet"
    ],
)
def test_there_and_back(name):
    if BACKEND == "torch" and name.startswith("NASNet"):
        pytest.skip("Keras has no NASNet on PyTorch")
    build, count = MODELS[name]
    model = build()
    inputs = np.random.default_rng(0).normal(size=(2, *model.inputs[0].shape[1:])).astype("float32")
    stock, stock_weights, stock_outputs = facts(model), model.get_weights(), outputs(model, inputs)
    rows = inspect_model(model).rows
    assert all(row.eligible for row in rows)
    assert len(rows) == (count or len(rows)) > 0

    copy = rewrite(model, "diagonal:32")
    assert len(ours(copy)) == len(rows)
    assert ours(model) == []
    assert facts(copy) == stock
    assert_close(outputs(copy, inputs), stock_outputs, 1e-4)
    if hasattr(model, "pyramid_outputs"):
        assert copy.pyramid_outputs.keys() == model.pyramid_outputs.keys()
    restored = restore(copy)
    assert facts(restored) == stock
    assert [place.layer.get_config() for place in walk_layers(restored)] == [
        place.layer.get_config() for place in walk_layers(model)
    ]
    assert all(map(np.array_equal, restored.get_weights(), stock_weights))
    assert all(map(np.array_equal, outputs(restored, inputs), stock_outputs))
    del copy, restored

    gradients = None
    if name in WITH_GRADIENTS:
        gradients = input_gradient_and_weight_gradients(model, inputs)
    rewrite(model, "shifted", in_place=True)
    assert len(ours(model)) == len(rows)
    if gradients:
        assert_close(input_gradient_and_weight_gradients(model, inputs), gradients, 1e-4)
    restore(model, in_place=True)
    assert ours(model) == []
    assert facts(model) == stock
    assert all(map(np.array_equal, outputs(model, inputs), stock_outputs))
