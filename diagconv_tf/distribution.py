"""Among how many devices and processes a model is trained, as Keras has it set up.

TensorFlow's strategies belong to a model, which keeps the one that it was made
under. Keras's own distributions (JAX) hold for the whole process.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Among whom the images of a batch are shared, and which process this is.

    Attributes:
        replicas: parts into which a batch is divided, each computed by a copy
            of the model of its own; 1 where nothing is shared.
        processes: processes that train together.
        process: the number of this one, from 0.
    """

    replicas: int = 1
    processes: int = 1
    process: int = 0

    def share(self, batch_size: int) -> int:
        """The images of one replica.

        Args:
            batch_size: images in the batch of all replicas together.

        Raises:
            ValueError: if the replicas do not divide it.
        """
        if batch_size % self.replicas:
            near = batch_size - batch_size % self.replicas
            nearest = ", ".join(str(n) for n in (near, near + self.replicas) if n)
            raise ValueError(
                f"Expected a global batch size that {self.replicas} replicas divide (near: "
                f"{nearest}). Received: batch_size={batch_size}"
            )
        return batch_size // self.replicas


def replicas_of(model: keras.Model | None = None) -> Replicas:
    """Among whom a batch will be shared in training.

    Args:
        model: a model, which may keep a strategy of TensorFlow; None asks for
            the strategy in whose scope the caller is.

    Returns:
        What TensorFlow's strategy says, or the `keras.distribution` that is
        set. A `ModelParallel` has as many replicas as its batch axis is long.

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

        return Replicas(batch_shards(), jax.process_count(), jax.process_index())
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
    own = getattr(model, "_distribute_strategy", None)
    if own is None and tf.distribute.has_strategy():
        own = tf.distribute.get_strategy()
    return own


def batch_shards() -> int:
    """Devices among which the current `keras.distribution` divides a batch; 1 without one."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    # Not `num_model_replicas`: of a mesh of two axes, `DataParallel` counts all devices.
    return mesh.shape[list(mesh.axis_names).index(distribution.batch_dim_name)]


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
