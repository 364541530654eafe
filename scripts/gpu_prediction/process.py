"""What has to be set before JAX is imported."""

from __future__ import annotations

import atexit
import os
import pathlib
import shutil
import tempfile


def prepare() -> pathlib.Path:
    """Makes this process one that compiles for a GPU and uses none; returns XLA's dump folder.

    Call it before anything imports Keras or JAX. The folder goes when the process ends.
    """
    folder = tempfile.mkdtemp(prefix="predict_gpu_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["KERAS_BACKEND"] = "jax"
    # Else JAX looks for a GPU, and for the CUDA libraries that compiling does not need.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
    os.environ["XLA_FLAGS"] = flags.strip()
    return pathlib.Path(folder)
