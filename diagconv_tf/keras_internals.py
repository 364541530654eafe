"""Every private name of Keras, TensorFlow, JAX and PyTorch that this project uses.

Other packages do not promise to keep these names, documented nowhere. So:

- They stand in this module alone. Importing it looks up none of them.
- A name is looked up when it is needed. One that is gone raises
  `MissingNameError`, which says which package no longer has it, what this
  project needs it for, and what still works.
- A missing name is never read as an answer ("not distributed", "nothing to wait
  for"). Where a name may be absent for a good reason, a second name tells.

`PRIVATE_NAMES` lists them for the contract test (`tests/test_keras_internals.py`),
which `scripts/test_keras_nightly` runs on a pre-release of Keras.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras

_MISSING = object()


class MissingNameError(RuntimeError):
    """A package no longer has a private name that this project needs."""


@dataclasses.dataclass(frozen=True)
class PrivateName:
    """One private name of another package.

    Attributes:
        owner: what holds it: a module (`"keras.src.ops.node"`), a class
            (`"keras.Layer"`), or an instance (`"keras.Variable()"`).
        name: the name.
        purpose: what this project needs it for; completes "in order to …".
        fallback: what still works without it; a sentence without its full stop.
        backends: the Keras backends on which it exists.
    """

    owner: str
    name: str
    purpose: str
    fallback: str
    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"

    @property
    def package(self) -> str:
        """The package that holds it, as it is imported."""
        return self.owner.partition(".")[0]

    def error(self) -> MissingNameError:
        """The error for a package without this name."""
        module = sys.modules.get(self.package)
        version = getattr(module, "__version__", "of unknown version")
        return MissingNameError(
            f"Expected {self.package} to have the private name `{self}`, in order to "
            f"{self.purpose}. Received: {self.package} {version}, which has none. {self.fallback}"
        )

    def of(self, holder: Any) -> Any:
        """The value under this name in `holder`, a class or an instance.

        Raises:
            MissingNameError: if `holder` has no such attribute.
        """
        value = getattr(holder, self.name, _MISSING)
        if value is _MISSING:
            raise self.error()
        return value

    def of_module(self) -> Any:
        """The value under this name in the module `owner`.

        Raises:
            MissingNameError: if the module is gone, or lacks the name.
        """
        try:
            module = importlib.import_module(self.owner)
        except ImportError as error:
            raise self.error() from error
        return self.of(module)


_TF, _JAX, _TORCH = ("tensorflow",), ("jax",), ("torch",)
_COPYING = "copy a model"
_IN_PLACE = "`rewrite`, `restore` and `export` work with in_place=True"
_TRAINING_STEP = "run a model's training step outside `fit`"
_NO_TUNE = "All but `tune` and the benchmarks works"
_AVERAGING = "average the statistics of batch norms"
_NO_AVERAGING = "Training without --ema_momentum works"

# Layers and graphs.
_FLATTEN_LAYERS = PrivateName(
    "keras.Layer",
    "_flatten_layers",
    "find the layers inside a layer",
    "The layers of this package work in models that are built with them",
)
_SEQUENTIAL_GRAPH = PrivateName(
    "keras.Sequential()",
    "_functional",
    "find the graph of a sequential model",
    "Functional models work; for others pass a sample batch",
)
_INBOUND_NODES = PrivateName("keras.Layer()", "_inbound_nodes", _COPYING, _IN_PLACE)
_OUTBOUND_NODES = PrivateName("keras.Layer()", "_outbound_nodes", _COPYING, _IN_PLACE)
_HISTORY = PrivateName("keras.KerasTensor()", "_keras_history", _COPYING, _IN_PLACE)
_HISTORY_CLASS = PrivateName("keras.src.ops.node", "KerasHistory", _COPYING, _IN_PLACE)
_NODE_KEY = PrivateName("keras.src.ops.function", "make_node_key", _COPYING, _IN_PLACE)
_NODES_BY_DEPTH = PrivateName("keras.Function()", "_nodes_by_depth", _COPYING, _IN_PLACE)
_NODES = PrivateName("keras.Function()", "_nodes", _COPYING, _IN_PLACE)

# State that a copy must not take as it is.
_VARIABLE_KEY = PrivateName("keras.optimizers.Optimizer", "_var_key", _COPYING, _IN_PLACE)
_COMPILE_LOSS = PrivateName("keras.src.trainers.compile_utils", "CompileLoss", _COPYING, _IN_PLACE)
_WITH_OTHER_FUNCTION = PrivateName(
    "tensorflow.function()",
    "_clone",
    "copy a model with a `tf.function` that refers to it",
    _IN_PLACE,
    _TF,
)
_LAYER_PATH = PrivateName("keras.Layer()", "_path", _COPYING, _IN_PLACE)
_LOSSES = PrivateName("keras.Layer()", "_losses", _COPYING, _IN_PLACE)
_LOSS_IDS = PrivateName("keras.Layer()", "_loss_ids", _COPYING, _IN_PLACE)
_EVALUATION_ITERATOR = PrivateName("keras.Model()", "_eval_epoch_iterator", _COPYING, _IN_PLACE)
_ITERATOR_CLASS = PrivateName(
    "keras.src.trainers.epoch_iterator", "EpochIterator", _COPYING, _IN_PLACE
)
_OPTIMIZER_STRATEGY = PrivateName(
    "keras.optimizers.Optimizer()", "_distribution_strategy", _COPYING, _IN_PLACE, _TF
)
_DEPENDENCIES = PrivateName(
    "tensorflow.__internal__.tracking.AutoTrackable()",
    "_self_unconditional_checkpoint_dependencies",
    _COPYING,
    _IN_PLACE,
    _TF,
)
_DEPENDENCY_NAMES = PrivateName(
    "tensorflow.__internal__.tracking.AutoTrackable()",
    "_self_unconditional_dependency_names",
    _COPYING,
    _IN_PLACE,
    _TF,
)
_TRACKED_CONTAINER = PrivateName(
    "tensorflow.__internal__.tracking", "TrackableDataStructure", _COPYING, _IN_PLACE, _TF
)
_CONTAINER_CACHE = PrivateName(
    "tensorflow.__internal__.tracking.TrackableDataStructure()",
    "_self_attribute_sentinel",
    _COPYING,
    _IN_PLACE,
    _TF,
)
_CONTAINER_SNAPSHOT = PrivateName(
    "tensorflow.__internal__.tracking.TrackableDataStructure()",
    "_update_snapshot",
    _COPYING,
    _IN_PLACE,
    _TF,
)

# Compilation and training.
_GLOBAL_STATE = PrivateName(
    "keras.src.backend.common.global_state",
    "GLOBAL_STATE_TRACKER",
    "leave no trace of a symbolic call of a model",
    "The layers, and `rewrite` with a lowering, work",
)
_SUPPORTS_JIT = PrivateName(
    "keras.src.trainers.trainer",
    "model_supports_jit",
    "tell whether Keras will compile a model",
    'Without `jit_compile="auto"` everything works',
)
_RESOLVE_JIT = PrivateName(
    "keras.Model",
    "_resolve_auto_jit_compile",
    "tell whether Keras will compile a model that is not compiled yet",
    "With a compiled model everything works",
)
_SYMBOLIC_BUILD = PrivateName("keras.Model", "_symbolic_build", _TRAINING_STEP, _NO_TUNE)
_BUILD_IN_STRATEGY = PrivateName(
    "keras.Model", "_maybe_symbolic_build", _TRAINING_STEP, _NO_TUNE, _TF
)
_JAX_TRAINING_STATE = PrivateName("keras.Model", "_get_jax_state", _TRAINING_STEP, _NO_TUNE, _JAX)
_JAX_STATE = PrivateName(
    "keras.Model()",
    "_jax_state",
    "wait for the end of a training step on JAX",
    "All but `StepTimer` works",
    _JAX,
)
_JAX_STATE_SYNCED = PrivateName(
    "keras.Model()",
    "_jax_state_synced",
    "tell whether a model's variables are up to date on JAX",
    "All but `StepTimer` and copies of models works",
    _JAX,
)
_JAX_STATE_SYNC = PrivateName(
    "keras.Model", "jax_state_sync", "copy a model that is being trained on JAX", _IN_PLACE, _JAX
)
_CALLBACK_MODEL = PrivateName(
    "keras.callbacks.Callback()",
    "_model",
    "reach the model of a callback on JAX without moving its training state",
    "All but `StepTimer` and the recipes works",
    _JAX,
)
_FLUSH_CALLBACKS = PrivateName(
    "keras.callbacks.CallbackList",
    "_flush_futures",
    "wait for the callbacks that Keras runs in threads",
    "Training without checkpoints works",
)
_DATA_ADAPTER = PrivateName(
    "keras.src.trainers.data_adapters.data_adapter",
    "DataAdapter",
    "feed one batch again and again",
    "All data sets but `synthetic` work",
)

# Devices and distribution.
_STRATEGY = PrivateName(
    "keras.Model()",
    "_distribute_strategy",
    "find the tf.distribute strategy of a model",
    "Models without a strategy work on the other backends",
    _TF,
)
_LAYOUT = PrivateName(
    "keras.Variable()",
    "_layout",
    "find how `keras.distribution` shards a variable",
    "The layers of this package work in models that are built with them",
)
_IN_XLA = PrivateName(
    "tensorflow.python.ops.control_flow_util",
    "GraphOrParentsInXlaContext",
    "tell whether XLA will compile what is traced",
    'Stock layers and lowering="native" work',
    _TF,
)
_XLA_REDUCE = PrivateName(
    "tensorflow.compiler.tf2xla.python.xla",
    "variadic_reduce",
    "sum many tensors at once on a GPU",
    'Stock layers and lowering="native" work',
    _TF,
)
_XLA_BARRIER = PrivateName(
    "tensorflow.compiler.tf2xla.python.xla",
    "optimization_barrier",
    "keep results in the precision of their dtype on a GPU",
    'Stock layers and lowering="native" work',
    _TF,
)
_JAX_TRACER = PrivateName(
    "jax.core",
    "Tracer",
    "tell whether JAX is tracing a program that it may shard",
    "Stock layers work",
    _JAX,
)
_DETERMINISM = PrivateName(
    "tensorflow.python.framework.config",
    "is_op_determinism_enabled",
    "tell whether TensorFlow's ops are deterministic",
    "The layers work; `tune` and plans do not",
    _TF,
)
_JAX_COORDINATION = PrivateName(
    "jax._src.distributed",
    "global_state",
    "share a plan among several processes",
    "Training in one process works",
    _JAX,
)
_JAX_COORDINATION_CLIENT = PrivateName(
    "jax._src.distributed.State()",
    "client",
    "share a plan among several processes",
    "Training in one process works",
    _JAX,
)

# State that layers get after they are built, and whether it is used.
_CALL_CONTEXT = PrivateName(
    "keras.Layer",
    "_get_call_context",
    "tell whether a layer is called for inference, which needs no noise",
    "Training without quantized gradients works",
)
#: Where `_get_call_context` keeps the context of the calls of this thread. It is not there
#: outside of all calls, and where `layer.call` is called itself.
_CALL_CONTEXT_KEY = "current_call_ctx"
_TRACKER = PrivateName(
    "keras.Layer()",
    "_tracker",
    "give a built layer averages of its statistics, or a source of noise",
    "Training without --ema_momentum and without quantized gradients works",
)
_UNTRACK_VARIABLE = PrivateName("keras.Layer", "_untrack_variable", _AVERAGING, _NO_AVERAGING)
_TRACK_TORCH_VARIABLES = PrivateName(
    "keras.Layer",
    "_track_variables",
    "tell PyTorch of averages of statistics, or of a source of noise, in a built layer",
    "Training without --ema_momentum and without quantized gradients works",
    _TORCH,
)
_AVERAGED_VARIABLES = PrivateName(
    "keras.optimizers.Optimizer()",
    "_trainable_variables",
    "swap weights and their averages",
    _NO_AVERAGING,
)
_COMPILE_CONFIG = PrivateName(
    "keras.Model()",
    "_compile_config",
    "compile a smaller model as the larger one was compiled",
    "Compaction of models that are not compiled works",
)
_AVERAGES = PrivateName(
    "keras.optimizers.Optimizer()",
    "_model_variables_moving_average",
    "swap weights and their averages",
    _NO_AVERAGING,
)

#: All of them, for the contract test.
PRIVATE_NAMES: tuple[PrivateName, ...] = tuple(
    value for value in list(vars().values()) if isinstance(value, PrivateName)
)

#: Attributes of models that Keras recreates when it needs them, with their initial
#: values: compiled functions, which hold the model's own variables, and what exists
#: only while `fit` runs.
RESET_ATTRIBUTES = {
    "train_function": None,
    "test_function": None,
    "predict_function": None,
    _EVALUATION_ITERATOR.name: None,
    _JAX_STATE.name: None,
    _JAX_STATE_SYNCED.name: True,
}

#: Lists and sets of operations that are empty in a new copy. The losses of the last
#: call may be tensors of a compiled function's graph.
EMPTIED_ATTRIBUTES = tuple(
    name.name for name in (_INBOUND_NODES, _OUTBOUND_NODES, _LOSSES, _LOSS_IDS)
)

#: Attributes of models, optimizers and variables that say how they are sharded; each
#: with a function that returns its value where they are not.
DISTRIBUTION_ATTRIBUTES = {
    _STRATEGY.name: lambda: None,
    _OPTIMIZER_STRATEGY.name: lambda: sys.modules["tensorflow"].distribute.get_strategy(),
    _LAYOUT.name: lambda: None,
}

#: Where TensorFlow lists the attributes that belong into a checkpoint.
DEPENDENCY_ATTRIBUTES = (_DEPENDENCIES.name, _DEPENDENCY_NAMES.name)

#: A cache in TensorFlow's containers, with weak references to other containers.
CONTAINER_CACHE_ATTRIBUTE = _CONTAINER_CACHE.name

#: The attribute of a tensor that says which operation made it.
HISTORY_ATTRIBUTE = _HISTORY.name

# What a copy must find on every object of a class. Without it the copy would take
# what the original owns, and say nothing.
_COPIED_NAMES = (
    (keras.Operation, (_INBOUND_NODES, _OUTBOUND_NODES)),
    (keras.Layer, (_LOSSES, _LOSS_IDS)),
    (keras.Function, (_NODES_BY_DEPTH, _NODES)),
    (keras.Variable, (_LAYOUT,)),
    (keras.optimizers.Optimizer, (_OPTIMIZER_STRATEGY, _VARIABLE_KEY)),
    (keras.Model, (_STRATEGY, _DEPENDENCIES, _DEPENDENCY_NAMES, _JAX_STATE_SYNCED)),
)


def check_copyable(original: Any) -> None:
    """Refuses to copy an object of Keras whose private names are not the known ones.

    Args:
        original: an object that is copied attribute by attribute: a layer, a variable, a
            container that TensorFlow wrapped, ….

    Raises:
        MissingNameError: if it lacks a name that a copy must treat apart.
    """
    backend = keras.backend.backend()
    for kind, names in _COPIED_NAMES:
        if isinstance(original, kind):
            for name in names:
                if backend in name.backends:
                    name.of(original)
    if isinstance(original, keras.Function):
        for tensor in original.outputs:
            history(tensor)
    if isinstance(original, keras.Model):
        iterators = _ITERATOR_CLASS.of_module()
        # The name exists only while Keras evaluates, so its absence alone says nothing.
        for name, value in vars(original).items():
            if isinstance(value, iterators) and name not in RESET_ATTRIBUTES:
                raise _EVALUATION_ITERATOR.error()
    if is_tensorflow_container(original):
        _CONTAINER_CACHE.of(original)


def flatten_layers(
    layer: keras.Layer, include_self: bool = True, recursive: bool = True
) -> Iterator[keras.Layer]:
    """The layers inside `layer`, at any depth or, with `recursive=False`, its own."""
    return _FLATTEN_LAYERS.of(layer)(include_self=include_self, recursive=recursive)


def declares_inputs(model: keras.Sequential) -> bool:
    """Whether a sequential model knows the shapes of its inputs."""
    return _SEQUENTIAL_GRAPH.of(model) is not None


def graph(layer: keras.Operation) -> keras.Function | None:
    """The graph of a functional or sequential model; None where there is none."""
    if isinstance(layer, keras.Sequential):
        return _SEQUENTIAL_GRAPH.of(layer)
    return layer if isinstance(layer, keras.Function) else None


def inbound_nodes(operation: keras.Operation) -> list[Any]:
    """The nodes, of all graphs, that are calls of `operation`."""
    return _INBOUND_NODES.of(operation)


def outbound_nodes(operation: keras.Operation) -> list[Any]:
    """The nodes, of all graphs, that take an output of `operation`."""
    return _OUTBOUND_NODES.of(operation)


def history(tensor: keras.KerasTensor) -> tuple[Any, int, int]:
    """`(operation, index of its node, index among its outputs)` of a symbolic tensor."""
    return _HISTORY.of(tensor)


def set_history(tensor: keras.KerasTensor, operation: Any, node: int, output: int) -> None:
    """Sets the `history` of a symbolic tensor."""
    setattr(tensor, _HISTORY.name, _HISTORY_CLASS.of_module()(operation, node, output))


def nodes_by_depth(function: keras.Function) -> dict[int, list[Any]]:
    """The nodes of a functional graph, by their distance from its outputs."""
    return _NODES_BY_DEPTH.of(function)


def set_node_keys(function: keras.Function, nodes: list[Any]) -> None:
    """Tells a functional graph which nodes are its own."""
    node_key = _NODE_KEY.of_module()
    _NODES.of(function)
    vars(function)[_NODES.name] = {
        node_key(node.operation, inbound_nodes(node.operation).index(node)) for node in nodes
    }


def variable_key(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> Any:
    """The key under which an optimizer keeps what belongs to `variable`."""
    return _VARIABLE_KEY.of(optimizer)(variable)


def set_layer_path(layer: keras.Layer, path: str) -> None:
    """Sets `layer.path`."""
    _LAYER_PATH.of(layer)
    vars(layer)[_LAYER_PATH.name] = path


def compile_loss_class() -> type:
    """The class of the object in which a model keeps the losses that `compile` was given."""
    return _COMPILE_LOSS.of_module()


def global_state() -> dict[str, Any]:
    """What Keras keeps for this thread: counters of names, the global seed generator, scopes."""
    return vars(_GLOBAL_STATE.of_module())


def is_inference() -> bool:
    """Whether the present call of a layer, or one around it, was given `training=False`."""
    _CALL_CONTEXT.of(keras.Layer)
    context = global_state().get(_CALL_CONTEXT_KEY)
    return context is not None and context.training is False


def with_other_function(compiled: Any, function: Callable) -> Any:
    """An untraced `tf.function` of another Python function with the options of `compiled`."""
    return _WITH_OTHER_FUNCTION.of(compiled)(function)


def supports_jit(model: keras.Model) -> bool:
    """Whether Keras compiles `model` where `jit_compile=True` asks for it."""
    return _SUPPORTS_JIT.of_module()(model)


def resolve_jit_compile(model: keras.Model) -> bool:
    """What `jit_compile="auto"` will mean for a model that is not compiled yet."""
    return bool(_RESOLVE_JIT.of(model)())


def build_for_training(model: keras.Model, data_batch: Any) -> None:
    """Creates the variables of optimizer and metrics, as `fit` does before its first step.

    Args:
        model: a compiled model.
        data_batch: `(x, y, sample_weight)`; only shapes and dtypes are read.
    """
    # TensorFlow's trainer enters the scope of the model's strategy first.
    on_tensorflow = keras.backend.backend() == "tensorflow"
    build = _BUILD_IN_STRATEGY if on_tensorflow else _SYMBOLIC_BUILD
    build.of(model)(data_batch=data_batch)


def build_symbolically(model: keras.Model, data_batch: Any) -> None:
    """`build_for_training` for a caller inside the scope of the model's strategy."""
    _SYMBOLIC_BUILD.of(model)(data_batch=data_batch)


def take_training_state(model: keras.Model) -> Any:
    """The state that a training function of JAX takes and donates.

    Returns:
        Arrays: trainable, non-trainable, optimizer and metrics variables. The model's
        variables share them, and are lost with the first step.
    """
    return _JAX_TRAINING_STATE.of(model)(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )


def training_state(model: keras.Model) -> dict[str, list[Any]] | None:
    """The newest arrays of a model that is trained on JAX; None on the other backends.

    While `fit` runs on JAX, its state moves from step to step and the model's variables
    lag behind it. Here neither is moved. Where the variables are up to date, the arrays
    are theirs.

    Returns:
        Arrays by `"trainable_variables"`, `"non_trainable_variables"`,
        `"optimizer_variables"` and `"metrics_variables"`.

    Raises:
        MissingNameError: if the variables are out of date, and Keras keeps the state
            elsewhere than it used to.
    """
    if keras.backend.backend() != "jax":
        return None
    if not _JAX_STATE_SYNCED.of(model):
        return _JAX_STATE.of(model)
    optimizer = getattr(model, "optimizer", None)
    variables = {
        "trainable_variables": model.trainable_variables,
        "non_trainable_variables": model.non_trainable_variables,
        "optimizer_variables": optimizer.variables if optimizer is not None else [],
        "metrics_variables": model.metrics_variables,
    }
    return {name: [variable.value for variable in group] for name, group in variables.items()}


def sync_training_state(model: keras.Model) -> None:
    """Brings the variables of a model that is being trained up to date; only JAX needs it."""
    if keras.backend.backend() == "jax":
        _JAX_STATE_SYNC.of(model)()


def callback_model(callback: keras.callbacks.Callback) -> keras.Model:
    """`callback.model`, which on JAX would call `sync_training_state` each time."""
    return _CALLBACK_MODEL.of(callback) if keras.backend.backend() == "jax" else callback.model


def flush_callbacks(callbacks: keras.callbacks.CallbackList) -> None:
    """Waits for the callbacks that Keras runs in threads."""
    _FLUSH_CALLBACKS.of(callbacks)()


def strategy(model: keras.Model) -> Any:
    """The `tf.distribute.Strategy` in whose scope `model` was created, or None."""
    return _STRATEGY.of(model)


def layout(variable: keras.Variable) -> keras.distribution.TensorLayout | None:
    """How `keras.distribution` shards a variable; None where it does not."""
    found = _LAYOUT.of(variable)
    return found if isinstance(found, keras.distribution.TensorLayout) else None


def is_sharded_by_keras(variable: keras.Variable) -> bool:
    """Whether a `keras.distribution` was set when `variable` was created."""
    return _LAYOUT.of(variable) is not None


def is_tensorflow_container(value: Any) -> bool:
    """Whether `value` is a list or dict that TensorFlow wrapped to track its items."""
    if "tensorflow" not in sys.modules:
        return False
    # By its type, since the proxies among them show the class of what they wrap.
    return issubclass(type(value), _TRACKED_CONTAINER.of_module())


def update_container_snapshot(container: Any) -> None:
    """Tells a dict that TensorFlow wrapped that its content was changed on purpose."""
    _CONTAINER_SNAPSHOT.of(container)()


def is_traced_for_xla(graph: Any) -> bool:
    """Whether XLA will compile the TensorFlow graph that is being traced."""
    return bool(_IN_XLA.of_module()(graph))


def xla_variadic_reduce() -> Callable[..., list[Any]]:
    """TensorFlow's wrapper of XLA's reduction of several tensors by one function."""
    return _XLA_REDUCE.of_module()


def xla_optimization_barrier() -> Callable[..., list[Any]]:
    """TensorFlow's wrapper of XLA's barrier: what is before it is not merged with what is after."""
    return _XLA_BARRIER.of_module()


def is_traced_by_jax(value: Any) -> bool:
    """Whether `value` stands for an array in a program that JAX is tracing."""
    return isinstance(value, _JAX_TRACER.of_module())


def is_tensorflow_deterministic() -> bool:
    """Whether `tf.config.experimental.enable_op_determinism` was called."""
    return _DETERMINISM.of_module()()


def jax_coordination_client() -> Any:
    """The client of the key-value store that the processes of one JAX training share."""
    return _JAX_COORDINATION_CLIENT.of(_JAX_COORDINATION.of_module())


def data_adapter_class() -> type:
    """The base class of data sets that `fit` takes without converting them."""
    return _DATA_ADAPTER.of_module()


def tracker(layer: keras.Layer) -> Any:
    """The object with `lock` and `unlock` that keeps a layer's variables."""
    return _TRACKER.of(layer)


def untrack_variable(layer: keras.Layer, variable: keras.Variable) -> None:
    """Removes a variable from the lists of its layer."""
    _UNTRACK_VARIABLE.of(layer)(variable)


def track_torch_variables(model: keras.Model) -> None:
    """Lists the present variables of `model` and its layers as their PyTorch parameters.

    PyTorch's parameters of a layer are set when the layer is built.
    """
    for layer in flatten_layers(model):
        if layer.built:
            _TRACK_TORCH_VARIABLES.of(layer)()


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built for, in its order; none before."""
    return list(_AVERAGED_VARIABLES.of(optimizer)) if optimizer.built else []


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments that `compile` was given, but for `auto_scale_loss`."""
    return dict(_COMPILE_CONFIG.of(model).config)


def averaged_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of a trainable variable and its moving average; only those that have one."""
    pairs = zip(_AVERAGED_VARIABLES.of(optimizer), _AVERAGES.of(optimizer), strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]
