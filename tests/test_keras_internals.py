"""Contract with Keras, TensorFlow, JAX and PyTorch about their private names.

Each of `PRIVATE_NAMES` exists in the installed release; and where one does not, the
feature that needs it says so. A new release that drops a name fails here by name.
`scripts/test_keras_nightly` runs this file on a pre-release of Keras.
"""

import ast
import contextlib
import functools
import importlib
import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

from diagconv_tf import StepTimer, backends, copying, distribution, inspect_model, keras_internals
from diagconv_tf.keras_internals import PRIVATE_NAMES, MissingNameError, PrivateName
from diagconv_tf.tuning.contest import TrainingSteps
from recipes import averaging
from recipes.data.synthetic import repeated_batch

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parents[1]
NAMES = {str(name): name for name in PRIVATE_NAMES if BACKEND in name.backends}
X, Y = np.ones((2, 4, 4, 2), "float32"), np.ones((2, 1), "float32")


def make_model() -> keras.Model:
    """A functional model with every kind of object that holds a private name."""
    inputs = keras.Input(X.shape[1:], batch_size=2)
    outputs = keras.layers.DepthwiseConv2D(3)(inputs)
    outputs = keras.layers.BatchNormalization()(outputs)
    outputs = keras.layers.Dense(1)(keras.layers.Flatten()(outputs))
    model = keras.Model(inputs, outputs)
    eagerly = BACKEND != "jax"  # Compiling would take most of the time.
    model.compile(keras.optimizers.SGD(use_ema=True), "mse", run_eagerly=eagerly)
    model.optimizer.build(model.trainable_variables)
    return model


class InEvaluation(keras.callbacks.Callback):
    """Calls `function(model)` in the validation of a `fit`."""

    def __init__(self, function: Callable[[keras.Model], Any]):
        super().__init__()
        self.function = function

    def on_test_batch_end(self, batch, logs=None):
        self.function(self.model)


def in_evaluation(function: Callable[[keras.Model], Any]) -> None:
    model = make_model()
    model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=[InEvaluation(function)])


class AfterStep(keras.callbacks.Callback):
    """Calls `function(model)` after a training step; the model's variables stay as they are."""

    def __init__(self, function: Callable[[keras.Model], Any]):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        self.function(keras_internals.callback_model(self))


class Row(NamedTuple):
    """How the contract is checked for one name.

    Attributes:
        holder: returns the class or the instance that holds the name; of a module None.
        feature: needs the name. It is called with a model and `deleted(holder)`, a context
            without the name.
        deletes: True where the feature itself enters `deleted`, with a holder of its own.
    """

    holder: Callable[[keras.Model], Any] | None
    feature: Callable[[keras.Model, Callable[[Any], Any]], Any]
    deletes: bool = False


def depthwise(model):
    return model.layers[1]


def itself(model):
    return model


def copy(model, deleted):
    copying.copy_model(model)


def container(model):
    import tensorflow as tf

    return tf.__internal__.tracking.wrap({"key": 1})


def run_step(model, deleted):
    TrainingSteps(model, X, Y).run()


def swap_averages(model, deleted):
    callback = averaging.SwapAverages()
    callback.set_model(model)
    callback.on_test_begin()


def stop_averaging(model, deleted):
    averaging.average_statistics(model, 0.9)
    with deleted(depthwise(model)):
        averaging.stop_averaging(model)


def time_steps(model, deleted):
    class Timer(StepTimer):
        def on_train_batch_end(self, batch, logs=None):
            # Keras itself goes on with the name.
            with deleted(keras_internals.callback_model(self)):
                super().on_train_batch_end(batch, logs)

    model.fit(X, Y, verbose=0, callbacks=[Timer()])


def copy_while_evaluating(model, deleted):
    def copy_renamed(model):
        iterator = vars(model)["_eval_epoch_iterator"]
        with deleted(model):
            vars(model)["_evaluation_iterator"] = iterator
            copying.copy_model(model)

    in_evaluation(copy_renamed)


def tensorflow_function(model):
    import tensorflow as tf

    return tf.function(abs)


def clone_function(model, deleted):
    mine = tensorflow_function(model)
    with deleted(mine):
        keras_internals.with_other_function(mine, len)


def trace_for_xla(model, deleted):
    import tensorflow as tf

    tf.function(lambda x: backends.current().compiled_for(x), autograph=False)(tf.ones(()))


def use_xla(model, deleted):
    import tensorflow as tf

    backend = backends.current()
    sums = functools.partial(backend.sums_in_one_loop, axes=(0,))
    tensors = [tf.ones(2), tf.ones(2)]
    tf.function(lambda tensors: sums(backend.keep_apart(tensors)), autograph=False)(tensors)


def sequential(model):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


def inspect_sequential(model, deleted):
    model = sequential(model)
    with deleted(model):
        inspect_model(model)


def optimizer(model):
    return model.optimizer


def callback(model):
    callback = keras.callbacks.Callback()
    callback.set_model(model)
    return callback


def callback_model(model, deleted):
    mine = callback(model)
    with deleted(mine):
        keras_internals.callback_model(mine)


def of_container(function):
    def feature(model, deleted):
        mine = container(model)
        with deleted(mine):
            function(mine)

    return feature


def jax_state(model):
    return importlib.import_module("jax._src.distributed").global_state


ROWS: dict[str, Row] = {
    "keras.Layer._flatten_layers": Row(depthwise, lambda m, _: inspect_model(m)),
    "keras.Sequential()._functional": Row(sequential, inspect_sequential, deletes=True),
    "keras.Layer()._inbound_nodes": Row(depthwise, copy),
    "keras.Layer()._outbound_nodes": Row(depthwise, copy),
    "keras.KerasTensor()._keras_history": Row(lambda model: model.outputs[0], copy),
    "keras.src.ops.node.KerasHistory": Row(None, copy),
    "keras.src.ops.function.make_node_key": Row(None, copy),
    "keras.Function()._nodes_by_depth": Row(itself, copy),
    "keras.Function()._nodes": Row(itself, copy),
    "keras.optimizers.Optimizer._var_key": Row(optimizer, copy),
    "keras.src.trainers.compile_utils.CompileLoss": Row(None, copy),
    "tensorflow.function()._clone": Row(tensorflow_function, clone_function, deletes=True),
    "keras.Layer()._path": Row(
        depthwise, lambda m, _: keras_internals.set_layer_path(depthwise(m), "path")
    ),
    "keras.Layer()._losses": Row(depthwise, copy),
    "keras.Layer()._loss_ids": Row(depthwise, copy),
    "keras.Model()._eval_epoch_iterator": Row(None, copy_while_evaluating, deletes=True),
    "keras.src.trainers.epoch_iterator.EpochIterator": Row(None, copy),
    "keras.optimizers.Optimizer()._distribution_strategy": Row(optimizer, copy),
    "tensorflow.__internal__.tracking.AutoTrackable()"
    "._self_unconditional_checkpoint_dependencies": Row(itself, copy),
    "tensorflow.__internal__.tracking.AutoTrackable()._self_unconditional_dependency_names": Row(
        itself, copy
    ),
    "tensorflow.__internal__.tracking.TrackableDataStructure": Row(None, copy),
    "tensorflow.__internal__.tracking.TrackableDataStructure()._self_attribute_sentinel": Row(
        container, of_container(keras_internals.check_copyable), deletes=True
    ),
    "tensorflow.__internal__.tracking.TrackableDataStructure()._update_snapshot": Row(
        container, of_container(keras_internals.update_container_snapshot), deletes=True
    ),
    "keras.src.backend.common.global_state.GLOBAL_STATE_TRACKER": Row(
        None, lambda m, _: inspect_model(m)
    ),
    "keras.src.trainers.trainer.model_supports_jit": Row(
        None, lambda m, _: keras_internals.supports_jit(m)
    ),
    "keras.Model._resolve_auto_jit_compile": Row(
        itself, lambda m, _: keras_internals.resolve_jit_compile(m)
    ),
    "keras.Model._symbolic_build": Row(
        itself, lambda m, _: keras_internals.build_symbolically(m, (X, Y, None))
    ),
    "keras.Model._maybe_symbolic_build": Row(itself, run_step),
    "keras.Model._get_jax_state": Row(itself, run_step),
    "keras.Model()._jax_state": Row(None, time_steps, deletes=True),
    "keras.Model()._jax_state_synced": Row(itself, time_steps, deletes=True),
    "keras.Model.jax_state_sync": Row(itself, copy),
    "keras.callbacks.Callback()._model": Row(callback, callback_model, deletes=True),
    "keras.callbacks.CallbackList._flush_futures": Row(
        lambda _: keras.callbacks.CallbackList(),
        lambda *_: keras_internals.flush_callbacks(keras.callbacks.CallbackList()),
    ),
    "keras.src.trainers.data_adapters.data_adapter.DataAdapter": Row(
        None, lambda *_: repeated_batch((X, Y))
    ),
    "keras.Model()._distribute_strategy": Row(itself, lambda m, _: distribution.replicas_of(m)),
    "keras.Variable()._layout": Row(
        lambda model: model.variables[0], lambda m, _: distribution.is_distributed(m)
    ),
    "tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext": Row(None, trace_for_xla),
    "tensorflow.compiler.tf2xla.python.xla.variadic_reduce": Row(None, use_xla),
    "tensorflow.compiler.tf2xla.python.xla.optimization_barrier": Row(None, use_xla),
    "tensorflow.python.framework.config.is_op_determinism_enabled": Row(
        None, lambda *_: keras_internals.is_tensorflow_deterministic()
    ),
    "jax.core.Tracer": Row(None, lambda *_: backends.current().is_partitioned(X)),
    "jax._src.distributed.global_state": Row(None, lambda *_: backends.current().process_store()),
    "jax._src.distributed.State().client": Row(
        jax_state, lambda *_: backends.current().process_store()
    ),
    "keras.Layer._get_call_context": Row(depthwise, lambda *_: keras_internals.is_inference()),
    "keras.Layer()._tracker": Row(
        lambda model: model.layers[2], lambda m, _: averaging.average_statistics(m, 0.9)
    ),
    "keras.Layer._untrack_variable": Row(depthwise, stop_averaging, deletes=True),
    "keras.Layer._track_variables": Row(depthwise, stop_averaging, deletes=True),
    "keras.Model()._compile_config": Row(itself, lambda m, _: keras_internals.compile_arguments(m)),
    "keras.optimizers.Optimizer()._trainable_variables": Row(optimizer, swap_averages),
    "keras.optimizers.Optimizer()._model_variables_moving_average": Row(optimizer, swap_averages),
}


@contextlib.contextmanager
def deleted_from(holder: Any, name: str) -> Iterator[None]:
    """`holder`, or the classes that it has the name from, without the name."""
    with pytest.MonkeyPatch.context() as patch:
        # Past `__delattr__`, which keeps books. PyTorch keeps layers in `_modules`.
        own = getattr(holder, "__dict__", {})
        parts = [] if isinstance(holder, type) else [own, own.get("_modules", {})]
        part = next((part for part in parts if name in part), None)
        if part is not None:
            patch.delitem(part, name)
        elif isinstance(holder, types.ModuleType):
            patch.delattr(holder, name)
        else:
            kind = holder if isinstance(holder, type) else type(holder)
            for base in kind.__mro__:
                if name in vars(base):
                    patch.delattr(base, name)
        yield


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_every_name_has_a_row():
    assert {str(name) for name in PRIVATE_NAMES} == ROWS.keys()


@pytest.mark.parametrize("text", NAMES)
def test_the_installed_release_has_the_name(text, model):
    name, row = NAMES[text], ROWS[text]
    if not name.owner.endswith("()") and row.holder is None:
        name.of_module()
    elif row.holder is not None:
        name.of(row.holder(model))
    else:
        found = []
        look = lambda model: found.append(hasattr(model, name.name))  # noqa: E731
        model = make_model()
        model.fit(
            X, Y, validation_data=(X, Y), verbose=0, callbacks=[AfterStep(look), InEvaluation(look)]
        )
        assert any(found)


@pytest.mark.parametrize("text", NAMES)
def test_a_feature_without_its_name_says_so(text, model):
    name, row = NAMES[text], ROWS[text]
    if row.deletes:
        # A model of its own: the feature fails in the middle.
        model, context = make_model(), contextlib.nullcontext()
    elif row.holder is None:
        context = deleted_from(importlib.import_module(name.owner), name.name)
    else:
        context = deleted_from(row.holder(model), name.name)
    with pytest.raises(MissingNameError) as raised, context:
        row.feature(model, lambda holder: deleted_from(holder, name.name))
    message = str(raised.value)
    package = sys.modules[name.package]
    assert f"{name.package} {package.__version__}" in message
    assert all(part in message for part in (text, name.purpose, name.fallback))
    assert "\n" not in message


@pytest.mark.parametrize("text", [text for text in NAMES if "()" not in text])
def test_a_module_that_is_gone_is_like_a_name_that_is_gone(text, monkeypatch):
    name = NAMES[text]
    if ROWS[text].holder is None:
        monkeypatch.setitem(sys.modules, name.owner, None)
        with pytest.raises(MissingNameError, match=name.package):
            name.of_module()


WITHOUT_MODULES = """
import json, sys
import keras
for module in sys.argv[1:]:
    sys.modules[module] = None
import numpy as np
import diagconv_tf
if keras.backend.backend() == "tensorflow":
    import recipes.train
from diagconv_tf.keras_internals import MissingNameError

layer = diagconv_tf.DiagonalwiseDepthwiseConv2D(3, lowering="native")
model = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.DepthwiseConv2D(3)])
features = {
    "layer": lambda: layer(np.ones((1, 4, 4, 2), "float32")),
    "inspect": lambda: diagconv_tf.inspect_model(model),
    "rewrite in place": lambda: diagconv_tf.rewrite(model, "native", in_place=True),
    "rewrite": lambda: diagconv_tf.rewrite(model, "native"),
}
said = {}
for name, feature in features.items():
    try:
        feature()
        said[name] = "works"
    except MissingNameError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_import_works_without_any_private_module():
    modules = {name.owner for name in NAMES.values() if ROWS[str(name)].holder is None}
    modules = {owner for owner in modules if not owner.endswith("()")}
    command = [sys.executable, "-c", WITHOUT_MODULES, *sorted(modules)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert said.pop("layer") == said.pop("rewrite in place") == "works"
    assert "symbolic call" in said["inspect"]
    assert "copy a model" in said["rewrite"]
    assert "in_place=True" in said["rewrite"]


# Where the state of a training is, if not where it used to be.


@pytest.mark.backends("jax")
def test_step_timer_waits_for_the_variables_where_a_callback_has_synced_them():
    seen = []

    class Sync(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            variables = self.model.trainable_variables  # `self.model` syncs.
            values = keras_internals.training_state(self.model)["trainable_variables"]
            seen.extend(a is b.value for a, b in zip(values, variables, strict=True))

    model = make_model()
    model.fit(X, Y, verbose=0, callbacks=[Sync()])
    assert seen == [True] * len(model.trainable_variables)


@pytest.mark.backends("tensorflow", "torch")
def test_training_state_is_apart_on_jax_only(model):
    assert keras_internals.training_state(model) is None


# The names stand in one module.


PRIVATE_MODULES = ("keras.src", "jax._src", "jax.core", "tensorflow.python", "__internal__")
#: Of the standard library.
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit", "_SubParsersAction"}


def private_names_of_others(source: str) -> set[str]:
    """Attributes with a leading underscore that `source` reads and does not define."""
    tree = ast.parse(source)
    used, defined = set(), set(PUBLIC)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                used.add(name)
            case ast.Attribute(attr=name):
                defined.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                defined.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.keyword(arg=str(name)):
                defined.add(name)
    used = {name for name in used - defined if name[0] == "_" and not name.endswith("__")}
    texts = [ast.unparse(node) for node in ast.walk(tree) if _is_reference(node)]
    return used | {module for module in PRIVATE_MODULES if any(module in text for text in texts)}


def _is_reference(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return any(module.endswith(node.attr) for module in PRIVATE_MODULES)
    return isinstance(node, (ast.Import, ast.ImportFrom))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "source",
    ["x._layout", "import keras.src.ops", "from jax._src import core", "jax.core.Tracer",
     "tf.__internal__.tracking.wrap"],
)  # fmt: skip
def test_private_names_are_seen(source):
    assert private_names_of_others(source)


@pytest.mark.backends("tensorflow")
def test_private_names_stand_in_one_module():
    folders = ("diagconv_tf", "recipes", "scripts")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if path.name != "keras_internals.py"
        and (names := private_names_of_others(path.read_text()))
    }
    assert not found


def test_error_says_what_is_missing_and_what_works():
    name = PrivateName("keras.Layer", "_gone", "do a thing", "The rest works")
    with pytest.raises(MissingNameError) as raised:
        name.of(keras.Layer)
    assert str(raised.value) == (
        "Expected keras to have the private name `keras.Layer._gone`, in order to do a thing. "
        f"Received: keras {keras.__version__}, which has none. The rest works"
    )
