"""What inspect_model says of models whose convolutions are known."""

import json
import random

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import (
    DEFAULT_RULES,
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    Rule,
    inspect_model,
    keras_internals,
)
from tests import model_zoo

PATHS = {
    "sequential": ["dw1", "grouped", "separable"],
    "skip connections": ["dw1", "dw2"],
    "called several times": ["shared"],
    "nested and shared": ["middle/inner/shared", "middle/inner/own"],
    "in a wrapper": ["each/dw1"],
    "composite": [
        "block1/depthwise",
        "block1/separable",
        "block2/depthwise",
        "block2/separable",
    ],
}


@pytest.mark.parametrize("name", PATHS)
def test_every_convolution_with_groups_has_a_row(name):
    model = model_zoo.MODELS[name][0]()
    rows = inspect_model(model).rows
    assert sorted(row.path for row in rows) == sorted(PATHS[name])
    assert all(row.eligible and row.lowering == "stock" for row in rows)


def test_a_shared_layer_has_one_row_with_all_its_paths():
    rows = inspect_model(model_zoo.nested_and_shared()).rows
    shared = next(row for row in rows if row.path.endswith("shared"))
    assert sorted(shared.paths) == ["middle/inner/shared", "shared"]


def test_figures_of_known_layers():
    inputs = keras.Input((8, 6, 4))
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", name="dw")(inputs)
    x = layers.SeparableConv2D(5, (2, 3), name="separable")(x)
    x = layers.Dense(7)(x)
    inspection = inspect_model(keras.Model(inputs, x), batch_size=10)
    depthwise, separable = inspection.rows
    assert depthwise.flops == 2 * 10 * (4 * 3 * 4) * 9
    assert depthwise.least_bytes == 4 * (10 * 8 * 6 * 4 + 9 * 4 + 10 * 4 * 3 * 4)
    assert depthwise.parameters == 9 * 4 + 4
    assert separable.flops == 2 * 10 * (3 * 1 * 4) * 6
    dense = 2 * 10 * 3 * (5 * 7)
    pointwise = 2 * 10 * 3 * (4 * 5)
    assert inspection.total_flops == depthwise.flops + separable.flops + pointwise + dense
    assert depthwise.flops_share == depthwise.flops / inspection.total_flops
    assert depthwise.main_spec.batch == 10


def test_every_call_counts():
    (row,) = inspect_model(model_zoo.called_several_times(), batch_size=1).rows
    assert [spec.height for spec in row.specs] == [8, 8, 4]
    assert row.flops == 2 * 9 * 4 * (64 + 64 + 16)


def test_without_a_batch_size_figures_are_for_one_image():
    model = model_zoo.skip_connections()
    one, none = inspect_model(model, 1), inspect_model(model)
    assert [row.flops for row in one.rows] == [row.flops for row in none.rows]
    assert all(row.main_spec.batch is None for row in none.rows)


def _open_sizes():
    inputs = keras.Input((None, None, 4))
    return keras.Model(inputs, layers.DepthwiseConv2D(3, name="dw")(inputs))


def test_open_sizes_are_not_guessed_and_data_settles_them():
    inspection = inspect_model(_open_sizes())
    assert inspection.rows[0].flops is None
    assert inspection.total_flops is None
    assert inspection.rows[0].main_spec.height is None
    assert "`data`" in inspection.unknown
    assert "`data`" in str(inspection)
    x = np.zeros((3, 9, 7, 4), "float32")
    for data in (x, (x, np.zeros(3))):
        settled = inspect_model(_open_sizes(), data=data)
        assert settled.batch_size == 3
        assert settled.rows[0].main_spec.input_shape == (3, 9, 7, 4)
    assert inspect_model(_open_sizes(), 5, data=x).rows[0].main_spec.batch == 5


def _instance_call():
    layer = layers.DepthwiseConv2D(3)
    layer.call = lambda inputs: inputs
    return layer


class _NeverCalled(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.used = layers.DepthwiseConv2D(3)
        self.unused = layers.DepthwiseConv2D(3, name="unused")

    def build(self, input_shape):
        self.used.build(input_shape)

    def call(self, inputs):
        return self.used(inputs)


#: name: (input shape, layer, words of the reason)
REASONS = {
    "a user's subclass": ((8, 8, 4), lambda: model_zoo.OwnDepthwise(3), "no rule names"),
    "1-D depthwise": ((8, 4), lambda: layers.DepthwiseConv1D(3), "not handled: 1-dim"),
    "1-D separable": ((8, 4), lambda: layers.SeparableConv1D(4, 3), "not handled: 1-dim"),
    "1-D grouped": ((8, 4), lambda: layers.Conv1D(4, 3, groups=2), "not handled: 1-dim"),
    "3-D grouped": ((4, 4, 4, 4), lambda: layers.Conv3D(4, 3, groups=2), "not handled: 3-dim"),
    "another call": ((8, 8, 4), _instance_call, "replaced on the object"),
    "never called": ((8, 8, 4), _NeverCalled, "not built"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_not(name):
    shape, make, words = REASONS[name]
    inputs = keras.Input(shape)
    model = keras.Model(inputs, make()(inputs))
    refused = [row for row in inspect_model(model).rows if not row.eligible]
    assert len(refused) == 1
    assert words in "; ".join(refused[0].reasons)


def test_standard_convolutions_are_left_out():
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, layers.Dense(2)(layers.Conv2D(4, 3)(inputs)))
    inspection = inspect_model(model)
    assert inspection.rows == ()
    assert inspection.total_flops == 2 * 36 * (9 * 4 * 4 + 4 * 2)


def test_a_users_rule_makes_a_subclass_eligible():
    class Fast(model_zoo.OwnDepthwise, DiagonalwiseDepthwiseConv2D):
        pass

    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, model_zoo.OwnDepthwise(3)(inputs))
    (row,) = inspect_model(model, rules=(*DEFAULT_RULES, Rule(model_zoo.OwnDepthwise, Fast))).rows
    assert row.eligible


def test_what_a_saved_model_holds():
    rows = {row.path: row for row in inspect_model(model_zoo.composite()).rows}
    assert not rows["block1/depthwise"].survives_saving
    for name in ("nested and shared", "in a wrapper", "sequential"):
        rows = inspect_model(model_zoo.MODELS[name][0]()).rows
        assert all(row.survives_saving for row in rows)


def test_json_holds_what_the_rows_hold():
    model = model_zoo.sequential()
    inspection = inspect_model(model, 4)
    content = json.loads(inspection.to_json())
    assert content["batch_size"] == 4
    assert [row["path"] for row in content["rows"]] == [row.path for row in inspection.rows]
    assert [row["flops"] for row in content["rows"]] == [row.flops for row in inspection.rows]
    assert all(row["eligible"] for row in content["rows"])


def test_the_table_is_not_cut_off_in_a_pipe(capsys):
    name = "a_layer_with_a_name_" + "longer_" * 30 + "than_a_line"
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, layers.DepthwiseConv2D(3, name=name)(inputs))
    print(inspect_model(model))
    assert name in capsys.readouterr().out


class _Leaky(layers.Layer):
    """Leaves what its call has seen in attributes of every kind."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dw = layers.DepthwiseConv2D(3, name="dw", activity_regularizer="l2")
        self.dropout = layers.Dropout(0.5)
        self.seed = keras.random.SeedGenerator(3)
        self.mean = keras.metrics.Mean()
        self.fails = False
        self.list, self.dict, self.set, self.nested = [], {}, set(), ([{}],)
        self.last = None
        self.calls = 0

    def build(self, input_shape):
        self.dw.build(input_shape)

    def call(self, x):
        self.last = x
        self.calls += 1
        self.list.append(x)
        self.dict["last"] = x
        self.set.add(self.calls)
        self.nested[0][0]["last"] = x
        setattr(self, f"attribute_{self.calls}", x)
        self.add_loss(keras.ops.mean(x))
        self.mean.update_state(x)
        x = self.dropout(x + keras.random.normal((4,), seed=self.seed), training=True)
        layers.Dense(2)  # Takes a name.
        random.random()
        np.random.normal()
        if self.fails:
            raise RuntimeError("not today")
        return self.dw(x)


def _leaky():
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, _Leaky()(inputs))


def _content(value):
    """A container with its content, at every depth; all else by identity."""
    if isinstance(value, dict):
        return {key: _content(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_content(inner) for inner in value]
    return set(value) if isinstance(value, set) else id(value)


def _visible_state(model):
    """What a user can see of a model and of Keras."""
    parts = list(keras_internals.flatten_layers(model))
    return {
        "attributes": [(type(layer), _content(dict(vars(layer)))) for layer in parts],
        "losses": [id(loss) for loss in model.losses],
        "metrics": [float(metric.result()) for metric in model.layers[1]._metrics],
        "values": [keras.ops.convert_to_numpy(variable).tolist() for variable in model.variables],
        "global": _content(dict(keras_internals.global_state())),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1:3],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_looking_leaves_no_trace(fails):
    model = _leaky()
    model(np.ones((2, 8, 8, 4), "float32"))  # Now it has losses.
    model.layers[1].fails = fails
    assert len(model.losses) == 2
    before = _visible_state(model)
    inspection = inspect_model(model, 4)
    after = _visible_state(model)
    assert bool(inspection.unknown) == fails
    for name, value in before.items():
        np.testing.assert_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["composite", "subclassed", "skip connections"])
def test_looking_changes_nothing(name):
    model = model_zoo.MODELS[name][0]()
    inputs = model_zoo.random_inputs(model)
    before = [value.copy() for value in model.get_weights()]
    outputs = keras.ops.convert_to_numpy(model(inputs))
    attributes = [_content(dict(vars(layer))) for layer in keras_internals.flatten_layers(model)]
    inspect_model(model, 4)
    parts = keras_internals.flatten_layers(model)
    assert [_content(dict(vars(layer))) for layer in parts] == attributes
    assert all(map(np.array_equal, model.get_weights(), before))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(inputs)), outputs)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_sizes_are_integers_of_any_kind_and_channels_are_known(data_format):
    layer = DiagonalwiseDepthwiseConv2D(3, data_format=data_format)
    spec = layer.spec(tuple(np.array([2, 8, 8, 8])))
    assert spec == layer.spec((2, 8, 8, 8))
    assert all(type(size) is int for size in spec.input_shape)
    unknown = (1, 8, 8, None) if data_format == "channels_last" else (1, None, 8, 8)
    for convolution in (layer, DiagonalwiseConv2D(4, 3, groups=2, data_format=data_format)):
        with pytest.raises(ValueError, match=r"known number of channels.*Received"):
            convolution.spec(unknown)


def test_a_call_that_cannot_be_traced_leaves_sizes_of_the_build():
    class Stubborn(keras.Model):
        def __init__(self):
            super().__init__()
            self.dw = layers.DepthwiseConv2D(3, name="dw")
            self.traceable = True

        def call(self, inputs):
            if not self.traceable:
                raise RuntimeError("not today")
            return self.dw(inputs)

    model = Stubborn()
    model(np.zeros((2, 8, 8, 4), "float32"))
    model.traceable = False
    inspection = inspect_model(model, 4)
    assert "not today" in inspection.unknown
    assert inspection.rows[0].main_spec.input_channels == 4
    assert inspection.rows[0].eligible


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("model.keras", "a keras.Model"),
        (None, "a keras.Model"),
        (layers.Dense(3), "a keras.Model"),
        (keras.Sequential([layers.DepthwiseConv2D(3)]), "a built model"),
    ],
)
def test_what_is_no_built_model_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        inspect_model(model)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8"])
def test_batch_sizes_that_are_none(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        inspect_model(model_zoo.sequential(), batch_size)


def test_einsum_dense_layers_count():
    inputs = keras.Input((5, 4))
    x = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3))(inputs)
    x = layers.EinsumDense("...de,de->...e", output_shape=(3,))(x)
    assert inspect_model(keras.Model(inputs, x), 1).total_flops == 2 * 5 * 4 * 6 + 2 * 5 * 6
