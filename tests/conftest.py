"""Marks and settings that all tests share."""

import contextlib
import gc
import importlib.util
import logging
import os
import shutil
import tempfile

import hypothesis
import pytest

# Many tests compile the same programs: JAX keeps them for the whole run, and for
# all its processes, which get these variables from the first.
_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# XLA's programs for CPUs are compiled often and run once: LLVM need not optimise them,
# which takes a third of the tests' time. With XLA_FLAGS= (empty) it does, as for users.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# JAX's compiler for GPUs may be installed where there are none (`.[predict]`): JAX would
# look for CUDA, and log a traceback.
with contextlib.suppress(ModuleNotFoundError):
    if importlib.util.find_spec("jax_plugins.xla_cuda13") and not shutil.which("nvidia-smi"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras  # noqa: E402 - JAX reads the variables when it is imported.

# The same examples on every run: CI must not fail by luck. `thorough` draws
# new ones, many more of them; it is run by hand before a release.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items):
    # The slow ones first: what starts last decides how long two workers take.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    backend = keras.backend.backend()
    for item in items:
        marker = item.get_closest_marker("backends")
        if marker and backend not in marker.args:
            reason = f"needs Keras's backend to be one of {marker.args}; it is {backend}"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure():
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Garbage collections within a module visit what it has made itself.

    A process that has imported the frameworks and run a thousand tests holds a million
    objects. Every full collection would read them all, in pages that nothing else touches.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def absl_level():
    """Gives each test absl's logger as a new process has it: programs under test set its level."""
    logger = logging.getLogger("absl")
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def command_in(tmp_path, monkeypatch, capsys):
    """`command_in(folder)` gives `run`, the command with `folder` as working directory.

    `run("inspect model.keras")` gives `(exit code, standard output, standard
    error)`. In the arguments `@` is the folder that the command may write to.
    """
    import diagconv_cli

    def command_in(folder):
        monkeypatch.chdir(folder)

        def run(line):
            try:
                code = diagconv_cli.main(line.replace("@", str(tmp_path)).split())
            except SystemExit as exit:
                code = exit.code
            return code, *capsys.readouterr()

        return run

    return command_in
