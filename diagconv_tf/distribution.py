"""Among how many devices and processes a model is trained, as Keras has it set up.

TensorFlow's strategies belong to a model, which keeps the one that it was made
under. Keras's own distributions (JAX) hold for the whole process.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from diagconv_tf import backends, keras_internals

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Among whom the images of a batch are shared, and which process this is.

    Attributes:
        num_replicas: parts into which a batch is divided, each computed by a copy
            of the model of its own; 1 where nothing is shared.
        num_processes: processes that train together.
        process_index: the number of this one, from 0.
    """

    num_replicas: int = 1
    num_processes: int = 1
    process_index: int = 0

    def per_replica_batch(self, batch_size: int) -> int:
        """The images of one replica.

        Args:
            batch_size: images in the batch of all replicas together.

        Raises:
            ValueError: if the replicas do not divide it.
        """
        if batch_size % self.num_replicas:
            near = batch_size - batch_size % self.num_replicas
            nearest = ", ".join(str(n) for n in (near, near + self.num_replicas) if n)
            raise ValueError(
                f"Expected a global batch size that {self.num_replicas} replicas divide (near: "
                f"{nearest}). Received: batch_size={batch_size}"
            )
        return batch_size // self.num_replicas


def replicas_of(model: keras.Model | None = None) -> Replicas:
    """Among whom a batch will be shared in training.

    Args:
        model: a model, which may keep a strategy of TensorFlow; None asks for
            the strategy in whose scope the caller is.

    Returns:
        What TensorFlow's strategy says, or the `keras.distribution` that is
        set; where none is, what the layouts of the model's variables tell of
        it. A `ModelParallel` has as many replicas as its batch axis is long.

    Raises:
        ValueError: for a strategy of several workers (`refuse_multi_worker`).
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        strategy = strategy_of(model)
        refuse_multi_worker(strategy)
        return Replicas(1 if strategy is None else strategy.num_replicas_in_sync)
    if backend == "jax":
        import jax

        batch = batch_axis() or _batch_axis_of_layouts(model)
        replicas = 1 if batch is None else batch.size
        return Replicas(replicas, jax.process_count(), jax.process_index())
    return Replicas()


def strategy_of(model: keras.Model | None = None) -> Any:
    """The `tf.distribute.Strategy` that a model trains under, or None.

    Args:
        model: a Keras model; None asks for the strategy of the scope.
    """
    # Nobody who has not imported TensorFlow has a strategy.
    tf = sys.modules.get("tensorflow")
    if tf is None or keras.backend.backend() != "tensorflow":
        return None
    own = None if model is None else keras_internals.strategy(model)
    if own is None and tf.distribute.has_strategy():
        own = tf.distribute.get_strategy()
    return own


def is_distributed(model: keras.Model) -> bool:
    """Whether a strategy or distribution is current, or the one that `model` was made under."""
    if strategy_of(model) is not None or keras.distribution.distribution() is not None:
        return True
    return any(map(keras_internals.is_sharded_by_keras, model.variables))


def sharded_variables(model: keras.Model) -> list[str]:
    """Paths of the variables of which this process holds a part only."""

    def is_divided(value: Any) -> bool:
        if keras.backend.backend() != "jax":
            return False
        return not (value.is_fully_addressable or value.is_fully_replicated)

    return [variable.path for variable in model.variables if is_divided(variable.value)]


def undistributed(function: Callable[[], _Result]) -> _Result:
    """What `function` returns or raises where no strategy and no distribution is current."""
    if strategy_of() is not None:
        # A strategy's scope cannot be left from inside, but a new thread is in none.
        # It does not keep Python alive when the user has enough of it.
        future: concurrent.futures.Future = concurrent.futures.Future()
        threading.Thread(target=_fulfil, args=(future, function), daemon=True).start()
        return future.result()
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        return function()
    finally:
        keras.distribution.set_distribution(distribution)


def _fulfil(future: concurrent.futures.Future, function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """An axis of a device mesh, along which an axis of a tensor is divided.

    Attributes:
        name: its name in the mesh.
        size: devices along it.
    """

    name: str
    size: int


def batch_axis() -> MeshAxis | None:
    """Along which the current `keras.distribution` divides batches; None without one.

    Only with the JAX backend does Keras divide anything.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return None
    # Not `num_model_replicas`: of a mesh of two axes, `DataParallel` counts all devices.
    return _mesh_axis(distribution.device_mesh, distribution.batch_dim_name)


def _batch_axis_of_layouts(model: keras.Model | None) -> MeshAxis | None:
    for variable in getattr(model, "variables", ()):
        layout = keras_internals.layout(variable)
        if layout is not None and layout.device_mesh is not None:
            # Keras's own choice, where the user names no other.
            return _mesh_axis(layout.device_mesh, layout.device_mesh.axis_names[0])
    return None


def variable_axis(variable: Any, axis: int) -> MeshAxis | None:
    """Along which the layout of a `keras.Variable` divides its axis `axis`; None where not.

    Anything but a variable has no layout.
    """
    if not isinstance(variable, keras.Variable):
        return None
    layout = keras_internals.layout(variable)
    if layout is None or layout.device_mesh is None:
        return None
    name = layout.axes[axis]
    return None if name is None else _mesh_axis(layout.device_mesh, name)


def _mesh_axis(mesh: keras.distribution.DeviceMesh, name: str) -> MeshAxis:
    return MeshAxis(name, mesh.shape[list(mesh.axis_names).index(name)])


def refuse_multi_worker(strategy: Any) -> None:
    """Refuses the strategy with which Keras 3.15 cannot train.

    Once keras#20585 is repaired, this function and its calls can go.

    Args:
        strategy: a `tf.distribute.Strategy`, or None.

    Raises:
        ValueError: if it is a `MultiWorkerMirroredStrategy`.
    """
    # By its name, so that TensorFlow need not be there; it calls itself by an older one.
    if any(base.__name__ == "CollectiveAllReduceStrategy" for base in type(strategy).__mro__):
        raise ValueError(
            "Expected another strategy. Received: MultiWorkerMirroredStrategy: "
            "`fit` under MultiWorkerMirroredStrategy is broken in Keras 3.15 (keras#20585). "
            "Several machines work with the JAX backend: `keras.distribution.initialize` and "
            "`keras.distribution.DataParallel`"
        )


#: Calls of `from_first_process` are numbered, so that each finds its own result.
_numbers = itertools.count()

#: Seconds of one look at the store. Between two looks a waiting process can be interrupted.
_WAIT_SECONDS = 5.0


def from_first_process(make: Callable[[], str], process_index: int) -> str:
    """What `make` returns on process 0, on every process.

    All processes must call it equally often. It uses the store of JAX's
    coordination service instead of a collective operation: that gives up after
    minutes, and process 0 may measure for longer.

    Args:
        make: called on process 0 only.
        process_index: the number of this process.

    Raises:
        RuntimeError: on the other processes, if `make` raised something; the
            message says what. Process 0 raises it as it is.
    """
    store = backends.current().process_store()
    key = f"diagconv_tf/first_process/{next(_numbers)}"
    if process_index == 0:
        try:
            result = make()
        except BaseException as error:
            store.put(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        store.put(key, json.dumps({"result": result}))
        return result
    while (text := store.get(key, _WAIT_SECONDS)) is None:
        pass
    found = json.loads(text)
    if "error" in found:
        raise RuntimeError(f"Process 0 failed, for which this one waited: {found['error']}")
    return found["result"]
