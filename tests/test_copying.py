"""A copied model equals its original and goes on like it.

It has its own of all that the model owns, and shares what others only lent to it.
"""

import functools
import gc
import threading
import types
import weakref

import keras
import numpy as np
import pytest

from diagconv_tf.copying import copy_model
from tests import model_zoo

BACKEND = keras.backend.backend()
layers = keras.layers


class Block(layers.Layer):
    """A composite layer: not registered, and its sublayers have no names."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.steps = [layers.DepthwiseConv2D(3, padding="same"), layers.Conv2D(filters, 1)]
        self.by_name = {"norm": layers.BatchNormalization()}

    def build(self, input_shape):
        for step in self.steps:
            step.build(input_shape)
        self.by_name["norm"].build((*input_shape[:-1], self.filters))
        self.scale = self.add_weight(shape=(self.filters,), initializer="ones")

    def call(self, x, training=None):
        for step in self.steps:
            x = step(x)
        return self.by_name["norm"](x, training=training) * self.scale

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


class OwnTrainStep(keras.Model):
    """A model of this kind is built as `OwnTrainStep(inputs, outputs)`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = keras.metrics.Sum(name="calls")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.calls.update_state(1.0)
        return 2.0 * super().compute_loss(x, y, y_pred, sample_weight)


class Subclassed(keras.Model):
    """Has no `get_config`, keeps layers in containers, and a seed and a weight of its own."""

    def __init__(self, units):
        super().__init__()
        self.blocks = {"body": [Block(units), layers.Dropout(0.5, seed=1)]}
        self.head = layers.Dense(2)
        self.seed = keras.random.SeedGenerator(5)
        self.factor = self.add_weight(shape=(), name="factor", initializer="ones")

    def build(self, input_shape):
        self.blocks["body"][0].build(input_shape)
        self.head.build((None, self.blocks["body"][0].filters))

    def call(self, x, training=False):
        for layer in self.blocks["body"]:
            x = layer(x, training=training)
        noise = keras.random.uniform((), seed=self.seed)
        return self.head(keras.ops.mean(x, axis=(1, 2))) * self.factor + noise


def image_input(name=None):
    return keras.Input((8, 8, 3), name=name)


def small_graph(cls=keras.Model):
    """Shared layers, operations that are not layers, seeds."""
    inputs = image_input()
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    shared = layers.DepthwiseConv2D(3, padding="same", use_bias=False)
    x = shared(keras.ops.relu(shared(x))) * 2.0 + x[..., :1]
    x = layers.Dropout(0.5, seed=3)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return cls(inputs, layers.Dense(2, name="head")(x), name="small")


def sequential():
    return keras.Sequential(
        [image_input(), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)], name="stack"
    )


def sequential_without_input():
    model = keras.Sequential([layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)])
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


def shared_across_levels():
    shared = layers.Conv2D(3, 1, name="shared")
    inner_input = image_input()
    inner = keras.Model(inner_input, shared(Block(3)(inner_input)), name="inner")
    stack = keras.Sequential([image_input(), inner, layers.ReLU()], name="stack")
    inputs = image_input()
    x = shared(stack(inner(inputs)))
    return keras.Model(inputs, layers.GlobalMaxPooling2D()(x), name="outer")


def nested_structures():
    a, b = image_input("a"), image_input("b")
    c = keras.Input((8, 8, 3), name="c", optional=True)
    x = layers.Concatenate()([a, b])
    y = layers.Conv2D(3, 1)(c)
    outputs = {"first": layers.Conv2D(2, 3)(x), "rest": [x[..., :1], (y,)]}
    return keras.Model({"a": a, "more": [b, c]}, outputs)


def nested_structures_input(x):
    return {"a": x, "more": [x + 1, x + 2]}


def wrappers():
    inputs = image_input()
    x = layers.Reshape((8, 24))(inputs)
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(3))(x)
    x = layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True)
    return keras.Model(inputs, layers.GRU(2)(layers.Masking()(x)))


def under_name_scopes():
    with keras.name_scope("outer"), keras.name_scope("stem"):
        inputs = image_input()
        x = layers.Conv2D(2, 3)(inputs)
    return keras.Model(inputs, Block(2)(x))


def with_policies():
    inputs = image_input()
    x = layers.Conv2D(2, 3, dtype="mixed_float16")(inputs)
    x = layers.Conv2D(2, 3, dtype="bfloat16")(x)
    return keras.Model(inputs, layers.Flatten(dtype="float32")(x))


def with_flags():
    """`trainable` is off for a block, on again inside it, and off for one variable."""
    inputs = image_input()
    model = keras.Model(inputs, Block(2, name="block")(layers.Conv2D(2, 3)(inputs)))
    block = model.get_layer("block")
    block.trainable = False
    block.steps[0].trainable = True
    model.layers[1].bias.trainable = False
    return model


class SumOfSizes(keras.regularizers.Regularizer):
    def __call__(self, x):
        return keras.ops.sum(keras.ops.abs(x))

    def get_config(self):
        return {}


def with_regularizers():
    model = sequential()
    first, _, last = model.layers
    first.activity_regularizer = keras.regularizers.L1(0.1)
    first.kernel.regularizer = keras.regularizers.L2(0.2)
    last.bias.constraint = keras.constraints.MaxNorm(1.0)
    last.kernel.regularizer = SumOfSizes()
    return model


def with_state_outside_variables():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3.0, 2.0, size=(20, 8, 8, 3)))
    return keras.Sequential(
        [
            image_input(),
            normalization,
            layers.RandomFlip(seed=1),
            layers.RandomRotation(0.1, seed=2),
            layers.GaussianNoise(0.1, seed=4),
        ]
    )


def with_closures():
    """Functions that refer to parts of the model, or to themselves."""
    dense = layers.Dense(2)

    def twice(x, times=2):
        return dense(x) if times == 0 else twice(x, times - 1)

    model = keras.Sequential([image_input(), layers.Flatten(), dense])
    model.recursive = twice
    model.by_default = lambda x, layer=dense: layer(x)
    model.partial = functools.partial(lambda layer, x: layer(x), dense)
    model.method = dense.get_weights
    return model


def with_attributes():
    model = small_graph()
    model.pyramid_outputs = {"P1": model.layers[1].output, "P2": model.layers[2].output}
    model.class_names = ["cat", "dog"]
    model.settings = types.SimpleNamespace(mean=np.arange(3.0), nested={"model": model})
    model.layers[1].tag = ("stem", {1, 2})
    return model


def backbone_of_a_larger_model():
    model = small_graph()
    keras.Model(model.input, layers.Dense(7, name="other_head")(model.output))
    return model


def adapted():
    """The low-rank weights of fine-tuning, and 8-bit weights."""
    model = sequential()
    model.layers[0].enable_lora(1)
    model.layers[2].quantize("int8")
    return model


MODELS = {
    "graph": small_graph,
    "sequential": sequential,
    "sequential without input": sequential_without_input,
    "shared across levels": shared_across_levels,
    "nested structures": nested_structures,
    "wrappers": wrappers,
    "name scopes": under_name_scopes,
    "dtype policies": with_policies,
    "trainable flags": with_flags,
    "regularizers": with_regularizers,
    "state outside variables": with_state_outside_variables,
    "closures": with_closures,
    "attributes": with_attributes,
    "backbone": backbone_of_a_larger_model,
    "low rank and int8": adapted,
    "own train step": functools.partial(small_graph, OwnTrainStep),
    "subclassed": functools.partial(Subclassed, 3),
}

model_cases = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def images(count=4, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 3)).astype("float32")


def targets(count=4):
    return np.random.default_rng(1).normal(size=(count, 2)).astype("float32")


def built(build):
    """A model with weights that no initialiser makes."""
    model = build()
    if not model.built:
        call(model)
    rng = np.random.default_rng(2)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(rng.uniform(0.05, 0.2, size=variable.shape))
    return model


def call(model, training=False):
    x = images()
    if isinstance(getattr(model, "input", None), dict):
        x = nested_structures_input(x)
    outputs = model(x, training=training)
    return [np.array(keras.ops.convert_to_numpy(y)) for y in keras.tree.flatten(outputs)]


#: JAX compiles every operation when it runs eagerly; there, equal outputs are left
#: to the tests that train.
CALLS_ARE_CHEAP = BACKEND != "jax"


def config_of(value):
    return value.get_config() if hasattr(value, "get_config") else value is None


def described(model):
    """Everything about a model that can be compared, except values."""
    rows = []
    for layer in model._flatten_layers():
        rows.append((type(layer), layer.name, layer.path, layer.trainable, layer.built))
        rows.append((layer.dtype_policy.get_config(), config_of(layer.activity_regularizer)))
        rows.append([len(layer._trainable_variables), len(layer._layers), len(layer._metrics)])
        for variable in layer.variables:
            rows.append((variable.path, variable.name, variable.shape, variable.dtype))
            rows.append((variable.trainable, variable.aggregation, variable._autocast))
            rows.append((config_of(variable.regularizer), config_of(variable.constraint)))
    for group in ("trainable_variables", "non_trainable_variables", "metrics_variables"):
        rows.append([variable.path for variable in getattr(model, group)])
    if not isinstance(model, Subclassed):
        rows.append(model.get_config())
    return rows


def values(model):
    variables = [*model.variables, *model.metrics_variables]
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    return [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in variables]


def assert_equal_arrays(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second, strict=True)


KERAS_OBJECTS = (
    keras.Operation,
    keras.Function,
    keras.Variable,
    keras.KerasTensor,
    keras.Metric,
    keras.Loss,
    keras.Optimizer,
    keras.random.SeedGenerator,
)


def parts(root):
    """What `root` is made of and could be changed by: id -> object."""
    found, seen, pending = {}, {}, [root]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, str, int, float)):
            continue
        seen[id(value)] = value  # also keeps it alive, so that its id stays its own
        if isinstance(value, (*KERAS_OBJECTS, list, dict, set, np.ndarray)):
            found[id(value)] = value
        if isinstance(value, keras.Variable):
            found[id(value.value)] = value.value
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif isinstance(value, types.FunctionType):
            pending += [cell.cell_contents for cell in value.__closure__ or ()]
            pending += [value.__defaults__]
        elif isinstance(value, types.MethodType):
            pending.append(value.__self__)
        elif type(value).__module__.startswith(("keras", "keras_hub", __name__, "types")):
            pending += vars(value).values() if hasattr(value, "__dict__") else []
    return found


@model_cases
def test_copy_equals_original(build):
    model = built(build)
    copied = copy_model(model)
    assert described(copied) == described(model)
    assert_equal_arrays(values(copied), values(model))
    if CALLS_ARE_CHEAP:
        assert_equal_arrays(call(copied), call(model))
        # Twice, because seeds advance.
        for _ in range(2):
            assert_equal_arrays(call(copied, training=True), call(model, training=True))
        assert_equal_arrays(values(copied), values(model))
        losses = [map(keras.ops.convert_to_numpy, m.losses) for m in (copied, model)]
        assert_equal_arrays(*map(list, losses))


@model_cases
def test_nothing_of_the_model_is_shared(build):
    model = built(build)
    model.compile("adam", lambda y, y_pred: keras.ops.mean(y_pred), metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    copied = copy_model(model)
    common = parts(model).keys() & parts(copied).keys()
    assert not [parts(model)[key] for key in common]
    assert len(parts(copied)) > 50  # the walk did walk


@model_cases
def test_original_is_untouched_and_not_kept_alive(build):
    model = built(build)
    model.compile("adam", "mse")
    before = described(model), values(model), node_counts(model), set(parts(model))
    copied = copy_model(model)
    assert (described(model), node_counts(model), set(parts(model))) == (
        before[0],
        before[2],
        before[3],
    )
    assert_equal_arrays(values(model), before[1])

    expected = call(model) if CALLS_ARE_CHEAP else []
    references = [weakref.ref(layer) for layer in model._flatten_layers()]
    references += [weakref.ref(variable) for variable in model.variables]
    references += [weakref.ref(model.optimizer)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert_equal_arrays(call(copied) if CALLS_ARE_CHEAP else [], expected)


def node_counts(model):
    return [
        (len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model._flatten_layers()
    ]


def test_layers_outside_the_model_are_left_behind():
    copied = copy_model(backbone_of_a_larger_model())
    names = {part.name for part in parts(copied).values() if isinstance(part, keras.Operation)}
    assert "head" in names
    assert "other_head" not in names
    # What remains is one consistent graph, from which new models can be made.
    assert copied.get_layer("head").output is copied.output
    extended = keras.Model(copied.input, layers.Dense(1)(copied.get_layer("head").output))
    assert extended(images()).shape == (4, 1)


def test_attributes_refer_to_the_copy():
    copied = copy_model(with_attributes())
    assert copied.pyramid_outputs["P1"] is copied.layers[1].output
    assert copied.settings.nested["model"] is copied
    assert copied.class_names == ["cat", "dog"]
    assert copied.layers[1].tag == ("stem", {1, 2})
    copied = copy_model(with_closures())
    dense, x = copied.layers[-1], np.zeros((1, 192))
    dense.bias.assign([1.0, 2.0])
    for function in (copied.recursive, copied.by_default, copied.partial):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(function(x)), [[1, 2]])
    np.testing.assert_array_equal(copied.method()[1], [1, 2])


def test_sharing_is_kept():
    copied = copy_model(shared_across_levels())
    inner, shared = copied.get_layer("inner"), copied.get_layer("shared")
    assert inner.get_layer("shared") is shared
    assert copied.get_layer("stack").get_layer("inner") is inner


def quantized(model):
    model.layers[-1].quantize("int8")


def shortened(model):
    model.blocks["body"].pop()


@pytest.mark.parametrize(("name", "change"), [("sequential", quantized), ("subclassed", shortened)])
def test_a_copy_lets_go_of_a_part_as_the_original_does(name, change):
    """Keras finds what it tracks by `id`."""
    model = MODELS[name]()
    model.build((None, 8, 8, 3))
    copied = copy_model(model)
    before = tracked(model)
    for each in (model, copied):
        change(each)
    assert tracked(copied) == tracked(model) != before


def tracked(model):
    layers_of_model = [layer.path for layer in model._flatten_layers()]
    return layers_of_model, [weight.path for weight in model.weights]


@pytest.mark.parametrize("saved", [False, True])
def test_copy_of_a_copy_and_a_saved_copy(saved, tmp_path):
    model = built(sequential)
    model.compile("adam", "mse")
    model.train_on_batch(images(), targets())
    copied = copy_model(copy_model(model))
    if saved:
        copied.save(tmp_path / "model.keras")
        copied = keras.models.load_model(tmp_path / "model.keras")
    assert_equal_arrays(copied.get_weights(), model.get_weights())
    assert_equal_arrays(*([m.predict(images(), verbose=0)] for m in (copied, model)))


# What a copy has of its own, and what it shares


class MeanLoss(keras.losses.Loss):
    """The mean of the predictions plus that of `value`; the user keeps a handle on `log`."""

    def __init__(self, value):
        super().__init__()
        self.value, self.log = value, []

    def call(self, y, y_pred):
        return mean_loss(self.value, y, y_pred)


class CallableLoss:
    def __init__(self, value):
        self.value, self.log = value, []

    def __call__(self, y, y_pred):
        return mean_loss(self.value, y, y_pred)

    def method(self, y, y_pred):
        return mean_loss(self.value, y, y_pred)


def mean_loss(value, y, y_pred):
    return keras.ops.mean(y_pred) + keras.ops.mean(getattr(value, "bias", value))


def closure(value):
    return lambda y, y_pred: mean_loss(value, y, y_pred)


def closure_in_closure(value):
    inner = closure(value)
    return lambda y, y_pred: inner(y, y_pred)


def closure_over_container(value):
    values = [{"value": (value,)}]
    return lambda y, y_pred: mean_loss(values[0]["value"][0], y, y_pred)


def default_argument(value):
    def loss(y, y_pred, value=value):
        return mean_loss(value, y, y_pred)

    return loss


def keyword_default(value):
    def loss(y, y_pred, *, value=value):
        return mean_loss(value, y, y_pred)

    return loss


def function_attribute(value):
    def loss(y, y_pred):
        return mean_loss(loss.value, y, y_pred)

    loss.value = value
    return loss


#: How a loss may hold a value; called, it gives the mean of predictions and value.
LOSSES = {
    "closure": closure,
    "closure in a closure": closure_in_closure,
    "closure over a container": closure_over_container,
    "default argument": default_argument,
    "keyword default": keyword_default,
    "function attribute": function_attribute,
    "partial": lambda value: functools.partial(mean_loss, value),
    "partial of a closure": lambda value: functools.partial(closure(value)),
    "Loss object": MeanLoss,
    "bound method": lambda value: CallableLoss(value).method,
    "callable object": CallableLoss,
    "wrapped function": lambda value: functools.wraps(mean_loss)(closure(value)),
}

loss_cases = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)


Y = np.zeros((1, 2), "float32")


@loss_cases
def test_a_loss_that_does_not_reach_the_model_is_shared(make_loss):
    beta = keras.Variable(0.0)
    model = sequential()
    model.compile("sgd", make_loss(beta))
    copied = copy_model(model)
    assert copied.loss is model.loss
    beta.assign(100.0)
    assert float(copied.loss(Y, Y)) == 100.0


@loss_cases
def test_a_loss_that_reaches_the_model_is_copied(make_loss):
    model = sequential()
    model.compile("sgd", make_loss(model.layers[-1]))
    copied = copy_model(model)
    assert copied.loss is not model.loss
    copied.layers[-1].bias.assign([3.0, 5.0])
    losses = [keras.ops.convert_to_numpy(m.loss(Y, Y)) for m in (model, copied)]
    assert losses == [0.0, 4.0]


@pytest.mark.parametrize("name", ["closure", "Loss object", "bound method"])
@pytest.mark.backends("tensorflow")  # JAX compiles the value of a variable that is not the model's
def test_compiled_steps_follow_a_shared_variable(name):
    beta = keras.Variable(0.0)
    model = sequential()
    model.compile(keras.optimizers.SGD(0.0), LOSSES[name](beta), jit_compile=False)
    copied = copy_model(model)
    before = copied.train_on_batch(images(), targets())
    beta.assign(100.0)
    for each in (copied, model):
        assert each.train_on_batch(images(), targets()) == pytest.approx(before + 100.0, abs=1e-3)
        each.reset_metrics()


@pytest.mark.parametrize("kind", [MeanLoss, CallableLoss])
def test_what_hangs_beside_the_way_to_the_model_is_shared(kind):
    model = sequential()
    loss = kind(model.layers[-1])
    model.compile("sgd", loss)
    copied = copy_model(model)
    assert copied.loss is not loss
    assert copied.loss.value is copied.layers[-1]
    assert copied.loss.log is loss.log


def variables_of_closures(model):
    """Two functions that share a variable; one of them reaches the model."""
    dense, calls = model.layers[-1], 0

    def call():
        nonlocal calls
        calls += 1
        return dense

    model.call_it, model.count = call, lambda: calls
    copied = copy_model(model)
    assert copied.call_it() is copied.layers[-1]
    model.call_it()
    return [m.count() for m in (model, copied)] == [2, 2] and copied.count is model.count


def variables_that_hold_the_model(model):
    current = model.layers[0]

    def advance():
        nonlocal current
        current = model.layers[-1]

    model.advance, model.current = advance, lambda: current
    copied = copy_model(model)
    copied.advance()
    assert model.current() is model.layers[0]
    return copied.current() is copied.layers[-1]


def cache_that_reaches_the_model(model):
    @functools.lru_cache(maxsize=3)
    def last():
        return model.layers[-1]

    model.last = last
    model.last()
    copied = copy_model(model)
    assert model.last() is model.layers[-1]
    assert copied.last.cache_parameters() == {"maxsize": 3, "typed": False}
    return copied.last() is copied.layers[-1] and copied.last() is copied.last()


def cache_that_does_not_reach_the_model(model):
    model.tables = functools.lru_cache(lambda size: np.zeros(size))
    table = model.tables(3)
    return copy_model(model).tables(3) is table


def sentinels(model):
    missing = object()
    model.value, model.is_missing = missing, lambda value: value is missing
    return copy_model(model).is_missing(copy_model(model).value)


def a_hook_that_fills_the_callers_list(model):
    layer, features = model.layers[0], []
    stock_call = layer.call

    def call(x):
        features.append(stock_call(x))
        return features[-1]

    layer.call = call
    copied = copy_model(model)
    copied.layers[0].bias.assign(layer.bias + 3.0)
    copied(images())
    difference = keras.ops.convert_to_numpy(features[0] - stock_call(images()))
    return np.allclose(difference, 3.0, atol=1e-5)


def weak_references(model):
    model.weak = weakref.ref(model.layers[-1])
    copied = copy_model(model)
    return copied.weak() is copied.layers[-1]


def data_that_code_and_model_share(model):
    model.settings = settings = types.SimpleNamespace(weight=1.0)
    model.compile("sgd", lambda y, y_pred: settings.weight * keras.ops.mean(y_pred))
    copied = copy_model(model)
    copied.settings.weight = 5.0
    assert settings.weight == 1.0
    return float(copied.loss(None, np.ones(3, "float32"))) == 5.0


def a_teacher(model):
    teacher = sequential()
    model.compile("sgd", lambda y, y_pred: keras.ops.mean(teacher(y) - y_pred))
    return copy_model(model).loss is model.loss


def a_larger_model(model):
    """Code that refers to a model in which this one is a part takes all of it along."""
    head = layers.Dense(1)
    larger = keras.Sequential([model, head])
    larger.build((None, 8, 8, 3))
    model.adversary = lambda: larger
    copied = copy_model(model)
    assert copied.adversary().layers[0] is copied
    assert copied.adversary().layers[1] is not head
    return copied.adversary()(images()).shape == (4, 1)


def locks_and_files_in_code(model):
    lock, dense = threading.Lock(), model.layers[-1]
    model.guarded = lambda: (lock, dense)
    copied = copy_model(model)
    return copied.guarded() == (lock, copied.layers[-1])


def regularizers_and_schedules(model):
    regularizer, schedule = keras.regularizers.L2(0.1), Decay()
    model.layers[0].kernel.regularizer = regularizer
    model.compile(keras.optimizers.SGD(schedule), "mse")
    copied = copy_model(model)
    assert copied.layers[0].kernel.regularizer is regularizer
    return copied.optimizer._learning_rate is schedule


def metrics_of_the_user(model):
    """Their state is the model's, unless only a loss refers to them."""
    given, held = keras.metrics.MeanSquaredError(), keras.metrics.Sum()
    model.compile("sgd", lambda y, y_pred: held(y_pred), metrics=[given])
    copied = copy_model(model)
    assert copied.loss is model.loss
    return id(given) in parts(model) and id(given) not in parts(copied)


def attributes_of_layers(model):
    """Data that is set on a layer or on the model is state."""
    model.layers[0].cache, model.history_of_mine = {"a": np.zeros(2)}, [1]
    copied = copy_model(model)
    copied.layers[0].cache["a"] += 1
    copied.history_of_mine.append(2)
    return list(model.history_of_mine) == [1] and not model.layers[0].cache["a"].any()


def tables_by_id(model):
    """Of a part of the model, a number that is its `id` is that of the copy's part."""
    model.table = types.SimpleNamespace(names={id(model.layers[0]): "first", 7: "seven"})
    copied = copy_model(model)
    return copied.table.names == {id(copied.layers[0]): "first", 7: "seven"}


OWNED_OR_SHARED = [
    tables_by_id,
    variables_of_closures,
    variables_that_hold_the_model,
    cache_that_reaches_the_model,
    cache_that_does_not_reach_the_model,
    sentinels,
    a_hook_that_fills_the_callers_list,
    weak_references,
    data_that_code_and_model_share,
    a_teacher,
    a_larger_model,
    locks_and_files_in_code,
    regularizers_and_schedules,
    metrics_of_the_user,
    attributes_of_layers,
]


@pytest.mark.parametrize("holds", OWNED_OR_SHARED, ids=lambda holds: holds.__name__)
def test_what_is_owned_and_what_is_shared(holds):
    assert holds(built(sequential))


class Knot:
    """A piece of code that refers to other pieces."""

    def __init__(self):
        self.parts = []

    def __call__(self):
        return self.parts


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("seed", range(20))
def test_exactly_the_code_that_reaches_the_model_is_copied(seed):
    """Random references among pieces of code, with cycles; what reaches is counted anew."""
    rng = np.random.default_rng(seed)
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    knots = [Knot() for _ in range(12)]
    references = rng.random((12, 12)) < 0.12
    refers_to_model = rng.random(12) < 0.1
    for knot, row, refers in zip(knots, references, refers_to_model, strict=True):
        knot.parts += [knots[i] for i in np.flatnonzero(row)]
        knot.parts += [model.layers[-1]] * int(refers)
    reaching = refers_to_model
    for _ in knots:
        reaching = reaching | (references @ reaching)

    model.entries = list(knots)
    copied = copy_model(model)
    counterpart = dict(zip(knots, copied.entries, strict=True))
    counterpart[model.layers[-1]] = copied.layers[-1]
    assert [counterpart[knot] is not knot for knot in knots] == reaching.tolist()
    for knot in knots:
        assert counterpart[knot].parts == [counterpart[part] for part in knot.parts]


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize("reaches", [True, False])
def test_a_compiled_function(reaches):
    if BACKEND == "jax":
        from jax import jit as compiled
    else:
        from tensorflow import function as compiled
    model = sequential()
    bias = model.layers[-1].bias if reaches else keras.Variable([0.0, 0.0])
    model.total = compiled(lambda: keras.ops.sum(bias.value))
    model.total()
    copied = copy_model(model)
    assert (copied.total is model.total) != reaches
    copied.layers[-1].bias.assign([2.0, 3.0])
    assert [float(m.total()) for m in (model, copied)] == [0.0, 5.0 if reaches else 0.0]


@pytest.mark.backends("torch")
@pytest.mark.parametrize("reaches", [True, False])
def test_hooks_of_modules(reaches):
    model, results = sequential(), []
    dense = model.layers[-1]
    dense.register_forward_hook(lambda module, *_: results.append(dense if reaches else module))
    copied = copy_model(model)
    copied(images())
    assert [result is copied.layers[-1] for result in results] == [True]


@pytest.mark.backends("torch")
def test_a_wrapped_module_has_its_own_buffers():
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    wrapper = layers.TorchModuleWrapper(net, output_shape=(None, 2))
    model = keras.Sequential([keras.Input((4,)), wrapper])
    model.compile("sgd", "mse")
    before = net[1].running_mean.clone()
    copied = copy_model(model)
    copied.train_on_batch(np.ones((4, 4), "float32"), targets())
    assert (net[1].running_mean == before).all()
    others = copied.layers[0].module
    assert (others[1].running_mean != before).any()
    for parameter, variable in zip(others.parameters(), copied.trainable_variables, strict=True):
        assert parameter is variable.value


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("distributed", [True, False])
def test_a_distributed_variable_that_a_loss_reads(distributed):
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        beta = keras.Variable(1.0)
        model = sequential()
        model.compile("sgd", closure(beta), run_eagerly=True)
    copied = copy_model(model, distributed=distributed)
    read = copied.loss.__closure__[0].cell_contents
    assert (read is beta) == distributed
    assert keras.ops.convert_to_numpy(read) == 1.0
    assert isinstance(read.value, tf.distribute.DistributedValues) == distributed


@pytest.mark.backends("tensorflow")
def test_copied_code_is_named_in_the_log(caplog):
    model = sequential()
    pieces, results = [model.layers[-1]], []

    def reaches():
        return pieces, results

    model.functions = [reaches, lambda: results]
    model.compile("sgd", MeanLoss(model.layers[-1]))
    with caplog.at_level("INFO"):
        copy_model(model)
    (line,) = [record.getMessage() for record in caplog.records]
    for word in ("stack", "reaches", "list `pieces`", "MeanLoss object"):
        assert word in line
    for word in ("results", "lambda", "build", "\n"):
        assert word not in line


@pytest.mark.backends("tensorflow")
def test_nothing_is_logged_where_nothing_is_worth_it(caplog):
    model = built(small_graph)
    model.compile("adam", closure(keras.Variable(1.0)), metrics=["mae"])
    with caplog.at_level("INFO"):
        copy_model(model)
    assert not caplog.records


def reads_a_global(y, y_pred):
    return keras.ops.mean(global_layer.bias)  # noqa: F821 - the test sets it


@pytest.mark.backends("tensorflow")
def test_a_function_that_reads_the_model_from_a_global_is_named(caplog, monkeypatch):
    model = sequential()
    monkeypatch.setitem(globals(), "global_layer", model.layers[-1])
    model.compile("sgd", reads_a_global)
    copied = copy_model(model)
    assert copied.loss is reads_a_global
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for word in ("`global_layer`", "reads_a_global", "in_place=True"):
        assert word in record.getMessage()


# Compile state


class Decay(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self):
        self.factors = {"first": 0.01, "later": 0.001}

    def __call__(self, step):
        return keras.ops.where(step < 2, self.factors["first"], self.factors["later"])

    def get_config(self):
        return {}


def without_decay():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def later_rate():
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.learning_rate = 0.02
    return optimizer


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True, clipnorm=1.0),
    "SGD": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01, centered=True),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "EMA": lambda: keras.optimizers.SGD(0.01, use_ema=True, ema_overwrite_frequency=3),
    "accumulation": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=3),
    "unregistered schedule": lambda: keras.optimizers.SGD(Decay(), momentum=0.9),
    "callable rate": lambda: keras.optimizers.SGD(lambda: 0.05),
    "rate set later": later_rate,
    "no decay for biases": without_decay,
}


def assert_goes_on_alike(model, copied, steps=2):
    for step in range(steps):
        x, y = images(seed=step + 10), targets()
        logs = [m.train_on_batch(x, y, return_dict=True) for m in (model, copied)]
        assert logs[0] == logs[1]
    assert_equal_arrays(values(copied), values(model))


def slots(optimizer):
    """Which of an optimizer's variables each of its lists holds."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    places = {id(variable): place for place, variable in enumerate(optimizer.variables)}
    return {
        name: [places.get(id(part), "no slot") for part in value]
        for name, value in vars(optimizer).items()
        if isinstance(value, list) and any(isinstance(part, keras.Variable) for part in value)
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_has_slots_of_its_own(optimizer):
    model = built(sequential)
    model.compile(optimizer(), "mse")
    model.optimizer.build(model.trainable_variables)
    copied = copy_model(model)
    assert slots(copied.optimizer) == slots(model.optimizer)
    common = parts(copied.optimizer).keys() & parts(model.optimizer).keys()
    assert not any(isinstance(parts(model)[key], keras.Variable) for key in common)


TRAINED = OPTIMIZERS if CALLS_ARE_CHEAP else ("Adam", "loss scale", "accumulation")


@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_on_alike(name):
    optimizer, model = OPTIMIZERS[name], built(sequential)
    # Eagerly: what is compared is state, and compiling takes a second a model.
    model.compile(optimizer(), "mse", metrics=["mae"], run_eagerly=True)
    for seed in range(2):
        model.train_on_batch(images(seed=seed), targets())
    copied = copy_model(model)
    assert copied.optimizer.get_config() == model.optimizer.get_config()
    assert [v.path for v in copied.optimizer.variables] == [
        v.path for v in model.optimizer.variables
    ]
    before = values(model)
    assert_goes_on_alike(model, copied)
    assert any((a != b).any() for a, b in zip(before, values(model), strict=True))


@pytest.mark.parametrize("name", ["subclassed", "own train step"])
def test_compiled_training_goes_on_alike(name):
    model = built(MODELS[name])
    model.compile(
        "adam", "mse", metrics=["mae"], steps_per_execution=1 if BACKEND == "torch" else 2
    )
    model.fit(images(), targets(), batch_size=1, verbose=0)
    model.predict(images(), verbose=0)
    train_function = model.train_function
    copied = copy_model(model)
    assert model.train_function is train_function
    histories = [
        m.fit(images(), targets(), batch_size=1, shuffle=False, verbose=0).history
        for m in (model, copied)
    ]
    assert histories[0] == histories[1]
    assert_equal_arrays(values(copied), values(model))
    assert_equal_arrays(*([m.predict(images(), verbose=0)] for m in (model, copied)))


def test_copy_and_original_train_apart():
    model = built(sequential)
    model.compile("adam", "mse")
    model.train_on_batch(images(), targets())
    copied = copy_model(model)
    before = values(model)
    copied.train_on_batch(images(), targets())
    assert_equal_arrays(values(model), before)


@pytest.mark.backends("tensorflow", "torch")  # JAX's trainer itself refuses to go on
def test_flags_changed_after_the_optimizer_was_built():
    model = built(sequential)
    model.compile(keras.optimizers.Adam(0.1), "mse", run_eagerly=True)
    model.train_on_batch(images(), targets())
    model.layers[0].trainable = False
    copied = copy_model(model)
    assert len(copied.optimizer._trainable_variables) == 4
    assert_goes_on_alike(model, copied)


class OwnCompile(keras.Model):
    def compile(self, optimizer, factor):
        super().compile(optimizer, loss=self.own_loss, run_eagerly=True)
        self.factor = factor

    def own_loss(self, y, y_pred):
        return self.factor * keras.ops.mean((y - y_pred) ** 2)


def test_own_compile_with_a_loss_bound_to_the_model():
    inputs = image_input()
    model = OwnCompile(inputs, layers.Dense(2)(layers.Flatten()(inputs)))
    model.compile(keras.optimizers.SGD(0.1), factor=2.0)
    copied = copy_model(model)
    assert copied.loss.__self__ is copied
    assert_goes_on_alike(model, copied)


def test_compile_configuration_and_metric_state():
    class Count(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="count")
            self.total = self.add_variable((), "zeros", name="total")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.total.assign_add(1.0)

        def result(self):
            return self.total + 0.0

    inputs = image_input()
    x = layers.Flatten()(inputs)
    model = keras.Model(inputs, {"a": layers.Dense(2, name="a")(x), "b": layers.Dense(2)(x)})
    model.compile(
        "sgd",
        loss={"a": "mse", "b": lambda y, y_pred: keras.ops.mean(keras.ops.abs(y - y_pred))},
        loss_weights={"a": 0.5, "b": 2.0},
        metrics={"a": [Count(), lambda y, y_pred: keras.ops.max(y_pred)]},
        weighted_metrics={"b": ["mae"]},
        run_eagerly=True,
        auto_scale_loss=False,
    )
    y = {"a": targets(), "b": targets()}
    model.train_on_batch(images(), y)
    copied = copy_model(model)
    assert (copied.run_eagerly, copied.jit_compile) == (True, False)
    assert copied.get_metrics_result() == model.get_metrics_result()
    assert copied.get_metrics_result()["a_count"] == 1.0
    logs = [m.train_on_batch(images(), y, return_dict=True) for m in (model, copied)]
    assert logs[0] == logs[1]


def test_loss_scale_is_not_wrapped_twice():
    model = keras.Sequential([image_input(), layers.Flatten(), layers.Dense(2)])
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_on_batch(images(), targets())
    copied = copy_model(model)
    assert type(copied.optimizer) is keras.optimizers.LossScaleOptimizer
    assert not isinstance(copied.optimizer.inner_optimizer, keras.optimizers.LossScaleOptimizer)
    assert_goes_on_alike(model, copied)


def test_copy_while_fit_runs():
    model = built(sequential)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    copies = []

    class Copy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            copies.append(copy_model(self.model))

    model.fit(images(), targets(), batch_size=1, shuffle=False, verbose=0, callbacks=[Copy()])
    assert_equal_arrays(copies[-1].get_weights(), model.get_weights())
    assert (copies[0].get_weights()[0] != model.get_weights()[0]).any()
    copies[0].fit(images(), targets(), verbose=0)


# Refusals


class HasAssets(layers.Layer):
    """Its assets do not restore its weight."""

    def build(self, input_shape):
        self.weight = self.add_weight(shape=())

    def call(self, x):
        return x

    def save_assets(self, folder):
        pass

    load_assets = save_assets


def with_generator_over_the_model():
    model = sequential()
    names = (layer.name for layer in model.layers)
    model.compile("sgd", lambda y, y_pred: (next(names), keras.ops.mean(y_pred))[1])
    return model


def with_class_that_closes_over_the_model():
    model = sequential()

    class Regularizer:
        def __call__(self, x):
            return keras.ops.sum(model.layers[0].kernel)

    model.layers[-1].kernel.regularizer = Regularizer()
    return model


def with_attribute(value):
    model = small_graph()
    model.get_layer("head").extra = {"value": [value()]}
    return model


REFUSALS = {
    "lock": (functools.partial(with_attribute, threading.Lock), ["`extra`", "Dense", "'head'"]),
    "generator": (functools.partial(with_attribute, lambda: (i for i in "abc")), ["generator"]),
    "file": (functools.partial(with_attribute, lambda: open(__file__)), ["`extra`"]),  # noqa: SIM115
    "closure": (with_generator_over_the_model, ["loss", "'stack'", "generator"]),
    "class": (with_class_that_closes_over_the_model, ["regularizer", "class", "Regularizer"]),
    "objects": (
        functools.partial(with_attribute, lambda: np.array([[], {}], object)),
        ["array of object"],
    ),
    "assets": (
        lambda: keras.Sequential([image_input(), HasAssets(name="mine")]),
        ["assets", "HasAssets", "mine'", "do not restore"],
    ),
}


@pytest.mark.parametrize(("build", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refuses_what_cannot_be_copied(build, words):
    with pytest.raises(ValueError, match="in_place=True") as refusal:
        copy_model(build())
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_refuses_what_is_no_model():
    with pytest.raises(ValueError, match="Expected a `keras.Model`. Received: model="):
        copy_model(layers.Dense(2))


# Particular frameworks and model libraries


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("mode", ["int", "tf_idf", "multi_hot"])
def test_vocabularies(mode):
    import tensorflow as tf

    if mode == "tf_idf" and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
        pytest.skip("older Keras cannot load these weights into a new layer: a refusal")
    text = layers.TextVectorization(output_mode=mode, max_tokens=6)
    text.adapt(["a b c", "c d"])
    given = layers.StringLookup(vocabulary=["u", "v"])
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, [text(inputs), given(inputs)])
    copied = copy_model(model)
    phrases = tf.constant([["a d"], ["u"], ["c"]])
    assert_equal_arrays([y.numpy() for y in copied(phrases)], [y.numpy() for y in model(phrases)])
    vocabularies = [m.layers[1].get_vocabulary() for m in (model, copied)]
    assert vocabularies[0] == vocabularies[1]
    reference = weakref.ref(text)
    del model, text, given, inputs
    gc.collect()
    assert reference() is None


@pytest.mark.backends("tensorflow")
def test_refuses_tables_of_the_runtime():
    import tensorflow as tf

    pairs = tf.lookup.KeyValueTensorInitializer(["a"], [1])
    model = with_attribute(lambda: tf.lookup.StaticHashTable(pairs, 0))
    with pytest.raises(ValueError, match=r"`extra` of Dense 'head'.*resource"):
        copy_model(model)


@pytest.mark.backends("tensorflow")
def test_checkpoints_and_exports(tmp_path):
    import tensorflow as tf

    model = built(small_graph)
    model.compile("adam", "mse")
    model.train_on_batch(images(), targets())
    model.predict(images(), verbose=0)
    checkpoint = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    copied = copy_model(model)
    copied.train_on_batch(images(), targets())
    tf.train.Checkpoint(model=copied).restore(checkpoint).assert_consumed()
    assert_equal_arrays(copied.get_weights(), model.get_weights())
    checkpoint = tf.train.Checkpoint(model=copied).save(tmp_path / "copied")
    tf.train.Checkpoint(model=model).restore(checkpoint).assert_consumed()
    copied.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    assert_equal_arrays([loaded.serve(images()).numpy()], call(model))


@pytest.mark.backends("tensorflow")
def test_distribution_strategies():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = sequential()
        model.compile("adam", "mse")
    model.fit(images(), targets(), verbose=0)
    copied = copy_model(model)
    assert copied.distribute_strategy is model.distribute_strategy
    # In one order: a sum over the batch depends on it.
    histories = [
        m.fit(images(), targets(), shuffle=False, verbose=0).history for m in (model, copied)
    ]
    assert histories[0] == histories[1]


def efficientnet():
    keras_hub = pytest.importorskip("keras_hub")
    return keras_hub.models.EfficientNetBackbone(
        stackwise_width_coefficients=[1.0] * 2,
        stackwise_depth_coefficients=[1.0] * 2,
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 8],
        stackwise_expansion_ratios=[1, 4],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["v1", "unfused"],
        input_shape=(32, 32, 3),
        num_features=16,
    )


def mobilenet():
    keras_hub = pytest.importorskip("keras_hub")
    return keras_hub.models.MobileNetBackbone(
        stackwise_expansion=[[40, 56], [64]],
        stackwise_num_blocks=[2, 1],
        stackwise_num_filters=[[16, 16], [24]],
        stackwise_kernel_size=[[3, 5], [5]],
        stackwise_num_strides=[[2, 1], [1]],
        stackwise_se_ratio=[[None, 0.25], [0.25]],
        stackwise_activation=[["relu", "hard_swish"], ["hard_swish"]],
        stackwise_padding=[[1, 2], [2]],
        output_num_filters=32,
        input_num_filters=16,
        image_shape=(32, 32, 3),
        input_activation="hard_swish",
        output_activation="hard_swish",
        depthwise_filters=16,
        depthwise_stride=1,
        depthwise_residual=False,
        last_layer_filter=16,
        squeeze_and_excite=0.5,
    )


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("build", [model_zoo.nasnet, model_zoo.convnext, efficientnet, mobilenet])
def test_models_of_libraries(build):
    model = build()
    copied = copy_model(model)
    assert described(copied) == described(model)
    assert_equal_arrays(values(copied), values(model))
    if hasattr(model, "pyramid_outputs"):
        assert copied.pyramid_outputs.keys() == model.pyramid_outputs.keys()
        x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype("float32")
        assert_equal_arrays([copied(x).numpy()], [model(x).numpy()])
        assert not parts(model).keys() & parts(copied).keys()
