"""Every private name of Keras, TensorFlow, JAX and PyTorch that this project uses.

Other packages do not promise to keep these names. So they stand here alone, each
is looked up when it is needed, and one that is gone raises `MissingNameError`,
which says which package no longer has it and what still works. `PRIVATE_NAMES`
lists them for the contract test (`tests/test_keras_internals.py`), which
`scripts/test_keras_nightly` runs on a pre-release of Keras.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
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
        purpose: what this project needs it for.
        fallback: what still works without it.
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
        """What is raised when the package has no such name."""
        module = sys.modules.get(self.package)
        version = getattr(module, "__version__", "of unknown version")
        return MissingNameError(
            f"Expected {self.package} to have `{self}`, a private name, to {self.purpose}. "
            f"Received: {self.package} {version}, which has none. {self.fallback}"
        )

    def of(self, holder: Any) -> Any:
        """The value under this name in `holder`.

        Raises:
            MissingNameError: if it holds none.
        """
        value = getattr(holder, self.name, _MISSING)
        if value is _MISSING:
            raise self.error()
        return value

    def of_module(self) -> Any:
        """The value under this name in the module `owner`.

        Raises:
            MissingNameError: if there is no such module, or it has no such name.
        """
        try:
            module = importlib.import_module(self.owner)
        except ImportError as error:
            raise self.error() from error
        return self.of(module)


_COPYING = "copy a model"
_IN_PLACE = "`rewrite`, `restore` and `export` work with in_place=True"
_TRAINING_STEP = "run a model's training step outside `fit`"
_NO_TUNE = "All but `tune` and the benchmarks works"

_FLATTEN_LAYERS = PrivateName(
    "keras.Layer",
    "_flatten_layers",
    "find the layers inside a layer",
    "The layers of this package work in models that are built with them",
)
_SEQUENTIAL_GRAPH = PrivateName(
    "keras.Sequential",
    "_functional",
    "tell whether a sequential model has declared its inputs",
    "Functional models work; for others pass a sample batch",
)
_INBOUND_NODES = PrivateName("keras.Layer()", "_inbound_nodes", _COPYING, _IN_PLACE)
_OUTBOUND_NODES = PrivateName("keras.Layer()", "_outbound_nodes", _COPYING, _IN_PLACE)
_HISTORY = PrivateName("keras.KerasTensor()", "_keras_history", _COPYING, _IN_PLACE)
_HISTORY_CLASS = PrivateName("keras.src.ops.node", "KerasHistory", _COPYING, _IN_PLACE)
_NODE_KEY = PrivateName("keras.src.ops.function", "make_node_key", _COPYING, _IN_PLACE)
_NODES_BY_DEPTH = PrivateName("keras.Function()", "_nodes_by_depth", _COPYING, _IN_PLACE)
_NODES = PrivateName("keras.Function()", "_nodes", _COPYING, _IN_PLACE)
_VARIABLE_KEY = PrivateName("keras.optimizers.Optimizer", "_var_key", _COPYING, _IN_PLACE)
_LAYER_PATH = PrivateName("keras.Layer()", "_path", _COPYING, _IN_PLACE)
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
_JAX_TRAINING_STATE = PrivateName(
    "keras.Model", "_get_jax_state", _TRAINING_STEP, _NO_TUNE, backends=("jax",)
)
_JAX_STATE = PrivateName(
    "keras.Model()",
    "_jax_state",
    "wait for the end of a training step on JAX",
    "All but `StepTimer` works",
    backends=("jax",),
)
_STRATEGY = PrivateName(
    "keras.Model()",
    "_distribute_strategy",
    "find the tf.distribute strategy of a model",
    "Models without a strategy work on the other backends",
    backends=("tensorflow",),
)
_LAYOUT = PrivateName(
    "keras.Variable()",
    "_layout",
    "find how `keras.distribution` shards a variable",
    "The other backends work",
)
_TRACKED_CONTAINER = PrivateName(
    "tensorflow.__internal__.tracking",
    "TrackableDataStructure",
    _COPYING,
    _IN_PLACE,
    backends=("tensorflow",),
)
_IN_XLA = PrivateName(
    "tensorflow.python.ops.control_flow_util",
    "GraphOrParentsInXlaContext",
    "tell whether XLA will compile what is traced",
    'Stock layers and lowering="native" work',
    backends=("tensorflow",),
)
_DETERMINISM = PrivateName(
    "tensorflow.python.framework.config",
    "is_op_determinism_enabled",
    "tell whether TensorFlow's ops are deterministic",
    "The layers work; `tune` and plans do not",
    backends=("tensorflow",),
)
_TORCH_DEVICE = PrivateName(
    "keras.src.backend.torch.core",
    "get_device",
    "find the device on which Keras computes",
    "The layers work; `tune` and plans do not",
    backends=("torch",),
)
_JAX_COORDINATION = PrivateName(
    "jax._src.distributed",
    "global_state",
    "share a plan among several processes",
    "Training in one process works",
    backends=("jax",),
)
_DATA_ADAPTER = PrivateName(
    "keras.src.trainers.data_adapters.data_adapter",
    "DataAdapter",
    "feed one batch again and again",
    "All data sets but `synthetic` work",
)
_TRACKER = PrivateName(
    "keras.Layer()",
    "_tracker",
    "average the statistics of batch norms",
    "Training without --ema_momentum works",
)
_TRACK_TORCH_VARIABLES = PrivateName(
    "keras.Layer",
    "_track_variables",
    "average the statistics of batch norms",
    "Training without --ema_momentum works",
    backends=("torch",),
)
_UNTRACK_VARIABLE = PrivateName(
    "keras.Layer",
    "_untrack_variable",
    "average the statistics of batch norms",
    "Training without --ema_momentum works",
)
_AVERAGED_VARIABLES = PrivateName(
    "keras.optimizers.Optimizer()",
    "_trainable_variables",
    "swap weights and their averages",
    "Training without --ema_momentum works",
)
_AVERAGES = PrivateName(
    "keras.optimizers.Optimizer()",
    "_model_variables_moving_average",
    "swap weights and their averages",
    "Training without --ema_momentum works",
)

#: All of them, for the contract test.
PRIVATE_NAMES: tuple[PrivateName, ...] = tuple(
    value for value in list(vars().values()) if isinstance(value, PrivateName)
)

#: Attributes of models that Keras makes anew when it needs them, with what they
#: start as: functions compiled for the model's own variables, and what exists only
#: while `fit` runs.
RESET_ATTRIBUTES = {
    "train_function": None,
    "test_function": None,
    "predict_function": None,
    "_eval_epoch_iterator": None,
    "_jax_state": None,
    "_jax_state_synced": True,
}

#: Lists and sets of operations that start empty in a copy. The losses of the last
#: call may be tensors of a compiled function's graph.
EMPTIED_ATTRIBUTES = ("_inbound_nodes", "_outbound_nodes", "_losses", "_loss_ids")

#: Attributes of models, optimizers and variables that say how they are sharded, and
#: what makes their values where they are not.
DISTRIBUTION_ATTRIBUTES = {
    "_distribute_strategy": lambda: None,
    "_distribution_strategy": lambda: sys.modules["tensorflow"].distribute.get_strategy(),
    "_layout": lambda: None,
}

#: Where TensorFlow lists the attributes that belong into a checkpoint.
DEPENDENCY_ATTRIBUTES = (
    "_self_unconditional_checkpoint_dependencies",
    "_self_unconditional_dependency_names",
)

#: A cache in TensorFlow's containers, with weak references to other containers.
CONTAINER_CACHE_ATTRIBUTE = "_self_attribute_sentinel"

#: The attribute of a tensor that says which operation made it.
HISTORY_ATTRIBUTE = "_keras_history"


def flatten_layers(
    layer: keras.Layer, include_self: bool = True, recursive: bool = True
) -> Iterator[keras.Layer]:
    """The layers inside `layer`, at any depth or, with `recursive=False`, its own."""
    return _FLATTEN_LAYERS.of(layer)(include_self=include_self, recursive=recursive)


def declares_inputs(model: keras.Sequential) -> bool:
    """Whether a sequential model knows the shapes of its inputs."""
    return _SEQUENTIAL_GRAPH.of(model) is not None


def inbound_nodes(operation: keras.Operation) -> list[Any]:
    """The nodes of all graphs in which `operation` was called."""
    return _INBOUND_NODES.of(operation)


def outbound_nodes(operation: keras.Operation) -> list[Any]:
    """The nodes of all graphs that take an output of `operation`."""
    return _OUTBOUND_NODES.of(operation)


def history(tensor: keras.KerasTensor) -> tuple[Any, int, int]:
    """`(operation, index of its node, index among its outputs)` of a symbolic tensor."""
    return _HISTORY.of(tensor)


def set_history(tensor: keras.KerasTensor, operation: Any, node: int, output: int) -> None:
    """Sets what `history` returns."""
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


def supports_jit(model: keras.Model) -> bool:
    """Whether Keras compiles `model` where `jit_compile=True` asks for it."""
    return _SUPPORTS_JIT.of_module()(model)


def resolve_jit_compile(model: keras.Model) -> bool:
    """What `jit_compile="auto"` will mean for a model that is not compiled yet."""
    return bool(_RESOLVE_JIT.of(model)())


def build_for_training(model: keras.Model, data_batch: Any) -> None:
    """Makes the variables of optimizer and metrics, as `fit` does before its first step.

    Args:
        model: a compiled model.
        data_batch: `(x, y, sample_weight)`; only shapes and dtypes are read.
    """
    # TensorFlow's trainer wraps it, to enter the scope of the model's strategy.
    build = getattr(model, "_maybe_symbolic_build", None) or _SYMBOLIC_BUILD.of(model)
    build(data_batch=data_batch)


def build_symbolically(model: keras.Model, data_batch: Any) -> None:
    """`build_for_training` where the caller is in the scope of the model's strategy."""
    _SYMBOLIC_BUILD.of(model)(data_batch=data_batch)


def take_training_state(model: keras.Model) -> Any:
    """The state that a training function of JAX takes; the model's variables are given away."""
    return _JAX_TRAINING_STATE.of(model)(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )


def running_state(model: keras.Model) -> dict[str, Any] | None:
    """The state of a `fit` that is running on JAX; None elsewhere, and before its first step."""
    if keras.backend.backend() != "jax":
        return None
    # Keras sets the attribute in the first step, and reads it the same way.
    state = getattr(model, _JAX_STATE.name, None)
    if state is None and not hasattr(model, "jax_state_sync"):
        raise _JAX_STATE.error()
    return state


def strategy(model: keras.Model) -> Any:
    """The `tf.distribute.Strategy` that `model` was made under, or None."""
    return _STRATEGY.of(model)


def layout(variable: keras.Variable) -> keras.distribution.TensorLayout | None:
    """How `keras.distribution` shards a variable; None where it does not."""
    found = _LAYOUT.of(variable)
    return found if isinstance(found, keras.distribution.TensorLayout) else None


def is_sharded_by_keras(variable: keras.Variable) -> bool:
    """Whether a `keras.distribution` was current when `variable` was made."""
    return _LAYOUT.of(variable) is not None


def is_tensorflow_container(value: Any) -> bool:
    """Whether `value` is a list or dict that TensorFlow wrapped to track its items."""
    if "tensorflow" not in sys.modules:
        return False
    # By its type, since the proxies among them show the class of what they wrap.
    return issubclass(type(value), _TRACKED_CONTAINER.of_module())


def update_container_snapshot(container: Any) -> None:
    """Tells one of TensorFlow's dicts that its content was changed on purpose."""
    container._update_snapshot()


def is_traced_for_xla(graph: Any) -> bool:
    """Whether XLA will compile the TensorFlow graph that is being traced."""
    return bool(_IN_XLA.of_module()(graph))


def is_tensorflow_deterministic() -> bool:
    """Whether `tf.config.experimental.enable_op_determinism` was called."""
    return _DETERMINISM.of_module()()


def torch_device() -> str:
    """The device on which Keras computes with PyTorch."""
    return _TORCH_DEVICE.of_module()()


def jax_coordination_client() -> Any:
    """The client of the key-value store that the processes of one JAX training share."""
    return _JAX_COORDINATION.of_module().client


def data_adapter_class() -> type:
    """The class that `fit` takes as it is."""
    return _DATA_ADAPTER.of_module()


def tracker(layer: keras.Layer) -> Any:
    """What keeps a layer's variables, with `lock` and `unlock`."""
    return _TRACKER.of(layer)


def untrack_variable(layer: keras.Layer, variable: keras.Variable) -> None:
    """Takes a variable out of a layer's lists."""
    _UNTRACK_VARIABLE.of(layer)(variable)


def track_torch_variables(model: keras.Model) -> None:
    """Makes PyTorch's parameters of `model` those of its layers' variables as they are now."""
    for layer in flatten_layers(model):
        if hasattr(layer, "_torch_params"):
            _TRACK_TORCH_VARIABLES.of(layer)()


def averaged_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of a trainable variable and its moving average; without those that have none."""
    pairs = zip(_AVERAGED_VARIABLES.of(optimizer), _AVERAGES.of(optimizer), strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]
