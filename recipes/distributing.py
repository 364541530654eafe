"""On which devices a recipe trains: one, all of this machine, or those of many.

`--distribution=data_parallel` gives every device a part of each batch, and adds
up the gradients: TensorFlow's `MirroredStrategy`, or Keras's `DataParallel` on
JAX, which also goes over several processes (`recipes/processes.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from diagconv_tf import keras_internals
from diagconv_tf.distribution import Replicas
from recipes.config import Config
from recipes.processes import Processes


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How batches are shared, among which processes.

    Attributes:
        replicas: who shares a batch, and which process this is.
        processes: for what they have to tell each other.
        strategy: TensorFlow's strategy or Keras's distribution; None on one
            device.
    """

    replicas: Replicas = Replicas()  # noqa: RUF009 - frozen.
    processes: Processes = dataclasses.field(default_factory=Processes)
    strategy: Any = None

    @classmethod
    def start(cls, config: Config, processes: Processes | None = None) -> Distribution:
        """Finds the devices; before any of them is used.

        Raises:
            ValueError: If the backend cannot distribute, or the devices do not
                divide the batch.
        """
        processes = processes or Processes()
        divide_cpu(config.cpu_devices)
        if config.distribution == "none":
            if processes.num_processes > 1:
                raise ValueError(
                    "Expected --distribution=data_parallel for several processes. Received: none"
                )
            return cls()
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            if config.jit_compile == "true":
                raise ValueError(
                    "Expected --jit_compile=auto or false with --distribution=data_parallel: "
                    "TensorFlow cannot compile a step of several replicas with XLA. Received: true"
                )
            kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
            devices = [device.name for device in tf.config.list_logical_devices(kind)]
            strategy: Any = tf.distribute.MirroredStrategy(devices)
        elif backend == "jax":
            devices = keras.distribution.list_devices()
            # Each process reads its own images: see `recipes.data.pipeline`.
            strategy = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        else:
            raise ValueError(
                "Expected the TensorFlow or the JAX backend for --distribution=data_parallel. "
                f"Received: {backend}, for which Keras has no distribution"
            )
        if len(devices) == 1 and processes.num_processes == 1:
            return cls()  # There is nothing to share, and all works as without.
        replicas = Replicas(len(devices), processes.num_processes, processes.process_index)
        replicas.per_replica_batch(config.batch_size)
        return cls(replicas, processes, strategy)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.processes.is_first

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, models are made and trained on all devices."""
        with self.strategy.scope() if self.strategy is not None else contextlib.nullcontext():
            yield

    def check(self, config: Config) -> None:
        """Refuses settings of a variant that these devices cannot train with.

        Raises:
            ValueError: If gradients are to be accumulated under a strategy of TensorFlow.
        """
        if self._is_mirrored and config.gradient_accumulation > 1:
            raise ValueError(
                "Expected --gradient_accumulation=1, and no treatment of larger batches, with "
                "--distribution=data_parallel: Keras's optimizers cannot accumulate under a "
                "strategy of TensorFlow; the JAX backend can. Received: "
                f"{config.gradient_accumulation}"
            )

    @property
    def _is_mirrored(self) -> bool:
        return self.strategy is not None and keras.backend.backend() == "tensorflow"

    def prepare(self, model: keras.Model, config: Config) -> None:
        """Lets batch norms see the whole batch, as on one device.

        JAX computes as on one device anyway; under `MirroredStrategy` each
        replica has statistics of its own, unless a layer is told otherwise. A
        layer from a file may have been told elsewhere.
        """
        synchronize_batch_norms(model, self._is_mirrored and config.sync_batch_norm)

    def describe(self, jit_compile: bool | None = None) -> str:
        """Devices and processes, in a few words for the report.

        Args:
            jit_compile: what Keras made of it, for the model.
        """
        if self.strategy is None:
            return "one device"
        count = self.replicas.num_replicas
        text = f"{count} device{'s' if count > 1 else ''}"
        if self.processes.num_processes > 1:
            text += f" of {self.processes.num_processes} processes"
        text += f" ({type(self.strategy).__name__})"
        if keras.backend.backend() == "tensorflow" and not jit_compile:
            text += ", without XLA, which Keras switches off there"
        return text


def synchronize_batch_norms(model: keras.Model, synchronized: bool) -> None:
    """Sets what batch norms do under TensorFlow's strategies.

    Files of models are to have False: on other backends Keras loads no other.
    """
    for layer in keras_internals.flatten_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = synchronized


def divide_cpu(count: int) -> None:
    """Makes devices of the CPU's cores, to try a distribution without GPUs.

    Args:
        count: of devices; 1 leaves the CPU as it is.

    Raises:
        ValueError: If the backend cannot, or has begun to compute.
    """
    if count == 1:
        return
    backend = keras.backend.backend()
    try:
        if backend == "tensorflow":
            import tensorflow as tf

            (cpu,) = tf.config.list_physical_devices("CPU")
            part = tf.config.LogicalDeviceConfiguration()
            tf.config.set_logical_device_configuration(cpu, [part] * count)
        elif backend == "jax":
            import jax

            jax.config.update("jax_num_cpu_devices", count)
        else:
            raise RuntimeError(f"{backend} has no such devices")
    except RuntimeError as error:
        raise ValueError(
            f"Expected --cpu_devices on a backend that has not begun to compute: {error}"
        ) from error
