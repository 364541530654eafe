"""Run as a script, `ADDRESS PROCESS`, by two processes: `tune` and copies on JAX; prints JSON."""

import contextlib
import json
import os
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # Nothing has to be quick.

import keras

ADDRESS, PROCESS = sys.argv[1], int(sys.argv[2])
keras.distribution.initialize(ADDRESS, 2, PROCESS)

import numpy as np  # noqa: E402

from diagconv_tf import distribution, rewrite, tune  # noqa: E402
from diagconv_tf.copying import copy_model  # noqa: E402
from diagconv_tf.distribution import undistributed  # noqa: E402
from diagconv_tf.tuning import tuner  # noqa: E402
from tests.on_devices import model_parallel, network  # noqa: E402


class StoppedError(Exception):
    pass


def failing_clock():
    raise StoppedError("the clock has stopped")


def main():
    found = {"devices": []}

    class Bench(tuner.Contest):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            values = [v.value for v in self.model.variables]
            found["devices"] += sorted({str(d) for v in values for d in v.sharding.device_set})
            # Longer than the others wait at a time.
            time.sleep(1.0)

    tuner.Contest = Bench
    distribution._WAIT_SECONDS = 0.3
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = network()
    plan = tune(model, 8, budget_seconds=1e-3, cache_dir=tempfile.mkdtemp())
    found["plan"] = plan.to_json()
    try:
        tune(model, 8, clock=failing_clock, budget_seconds=1e-3, cache_dir=tempfile.mkdtemp())
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    copied = rewrite(model, "shifted")
    found["fully replicated"] = all(v.value.is_fully_replicated for v in copied.variables)
    found["on devices"] = sorted({len(v.value.sharding.device_set) for v in copied.variables})
    found["parts"] = parts()
    return found


def parts():
    """Copies of a model whose channels two processes share."""
    keras.distribution.set_distribution(model_parallel((1, 2)))
    model = network()
    (kernel,) = (v for v in model.variables if v.path.endswith("depthwise/kernel"))
    copied = rewrite(model, "shifted")
    alone = undistributed(lambda: copy_model(model, distributed=False))
    (alone_kernel,) = (v for v in alone.variables if v.path == kernel.path)
    own = np.asarray(kernel.value.addressable_data(0))
    return {
        "divided": not kernel.value.is_fully_addressable,
        "same shardings": all(
            a.value.sharding == b.value.sharding
            for a, b in zip(copied.variables, model.variables, strict=True)
        ),
        "devices": sorted({len(v.value.sharding.device_set) for v in alone.variables}),
        "same shapes": all(
            a.shape == b.shape for a, b in zip(alone.variables, model.variables, strict=True)
        ),
        "own values": bool(np.isin(own, np.asarray(alone_kernel.value)).all()),
    }


with contextlib.redirect_stdout(sys.stderr):
    results = main()
print(json.dumps(results))
