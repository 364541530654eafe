"""Run as a script: trains on several virtual CPU devices, and prints what it found as JSON.

Virtual devices must be asked for before a framework starts, so that this is a
process of its own; test_distribution.py says what the findings must be.
"""

import contextlib
import json
import logging as stdlib_logging
import os
import re
import sys
import tempfile

BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax" and __name__ == "__main__":
    # Compiling takes most of the time, and nothing is measured.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {quick}"

import keras  # noqa: E402 - JAX reads the variable when it is imported.
import numpy as np  # noqa: E402
from absl import logging  # noqa: E402

from diagconv_tf import export, restore, rewrite, tune  # noqa: E402
from diagconv_tf.copying import copy_model  # noqa: E402
from diagconv_tf.distribution import replicas_of, strategy_of  # noqa: E402
from diagconv_tf.tuning import tuner  # noqa: E402

BATCH = 8
PER_PASS = {"forward": "shifted", "input_gradient": "diagonal:4", "kernel_gradient": "native"}

VARIANTS = {
    "restored copy": restore,
    "shifted copy": lambda model: rewrite(model, "shifted"),
    "native copy made inside": lambda model: rewrite(model, "native"),
    "per pass, in place": lambda model: rewrite(copy_model(model), PER_PASS, in_place=True),
    "diagonal, in place inside": lambda model: rewrite(
        copy_model(model), "diagonal:3", in_place=True
    ),
}


def network(jit_compile="auto"):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((8, 8, 8))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(inputs)
    x = layers.SeparableConv2D(8, 3, depth_multiplier=2, padding="same", name="separable")(x)
    x = layers.ReLU()(x)
    if BACKEND == "jax":  # TensorFlow compiles those of float64 with XLA, which takes long.
        x = layers.Conv2D(8, 3, strides=2, groups=4, padding="same", name="grouped")(x)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=jit_compile)
    return model


def batches():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4 * BATCH, 8, 8, 8)), rng.integers(0, 3, 4 * BATCH)


def losses(model):
    x, y = batches()
    losses = []
    record = keras.callbacks.LambdaCallback(on_batch_end=lambda _, logs: losses.append(logs))
    # `fit` and not `train_on_batch`, which on TensorFlow gives every replica the whole batch.
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[record])
    return [float(each["loss"]) for each in losses]


def on_one_device():
    """Losses at first, and when it goes on with the same batches."""
    model = network()
    return [losses(model), losses(model)]


def all_variables(model):
    return [*model.variables, *model.optimizer.variables]


def kinds(model):
    """For each variable what can be seen of how it is distributed."""
    if BACKEND == "tensorflow":
        return [
            f"{type(v.value).__name__} of {len(getattr(v.value, 'values', [0]))}"
            for v in all_variables(model)
        ]
    return [
        f"{getattr(v.value.sharding, 'spec', None)} on {len(v.value.sharding.device_set)}"
        for v in all_variables(model)
    ]


def variants(scope, found, *names):
    """Rewrites in ways of these names, and trains: losses, and how variables are distributed."""
    with scope():
        model = network()
        found["stock"] = losses(model)
        found["stock kinds"] = kinds(model)
    start = copy_model(model)

    for name in names:
        with scope() if name.endswith("inside") else contextlib.nullcontext():
            rewritten = VARIANTS[name](start)
        with scope():
            found[name] = losses(rewritten)
        found[f"{name} kinds"] = kinds(rewritten)
    apart = copy_model(start, distributed=False)
    found["undistributed kinds"] = sorted(set(kinds(apart)))
    values = [[np.asarray(v) for v in all_variables(each)] for each in (apart, start)]
    found["undistributed values"] = all(map(np.array_equal, *values))


def tuned(scope, found):
    """What is current, and what is trained, when `tune` measures."""
    benches = []

    class Bench(tuner.Contest):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            distribution = keras.distribution.distribution()
            benches.append(
                {
                    "batch": self.batch.x.shape[0],
                    "compiled": bool(self.model.jit_compile),
                    "kinds": sorted(set(kinds(self.model))),
                    "current": strategy_of() is not None or distribution is not None,
                }
            )

    tuner.Contest = Bench
    with scope():
        model = network()
        before = model.get_weights()
        plan = tune(model, BATCH, budget_seconds=1e-3, cache_dir=tempfile.mkdtemp())
        still = strategy_of() is not None or keras.distribution.distribution() is not None
        found["refusal"] = refusal(lambda: tune(model, BATCH + 1))
    found["replicas outside"] = replicas_of(model).num_replicas
    found["warning outside"] = warning_of(lambda: rewrite(model, plan))
    found["bench"] = benches
    found["still current"] = still
    found["untouched"] = (
        all(map(np.array_equal, before, model.get_weights()))
        and losses_of_scope(scope, model) is not None
    )
    found["plan"] = {
        "batch_size": plan.batch_size,
        "replicas": plan.conditions.num_replicas,
        "compiled": plan.conditions.compiled,
        "batches": sorted({spec.batch for spec in plan.lowerings}),
        "steps": sorted(plan.steps),
    }


def exported(scope, found):
    """What a SavedModel of a distributed model computes, exported inside and outside the scope."""
    with scope():
        model = rewrite(network(), "shifted", in_place=True)
    sample = batches()[0][:3]
    expected = copy_model(model, distributed=False)(sample)
    for where in ("inside", "outside"):
        path = os.path.join(tempfile.mkdtemp(), "model")
        with scope() if where == "inside" else contextlib.nullcontext():
            report = export(model, path, sample=sample)
            still = strategy_of() is not None or keras.distribution.distribution() is not None
        outputs = served(path, sample)
        found[where] = {
            "error": float(np.max(np.abs(outputs - np.asarray(expected)))),
            "ops": report.depthwise_found,
            "still current": still,
        }
    found["kinds"] = sorted(set(kinds(model)))


def served(path, sample):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)  # Its function does not keep its variables alive.
    return np.asarray(loaded.serve(tf.constant(sample)))


def losses_of_scope(scope, model):
    with scope():
        return losses(model)


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def on_tensorflow():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    virtual = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, virtual)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = {"one device": on_one_device(), "data": {}, "tune": {}, "export": {}}
    variants(strategy.scope, found["data"], *VARIANTS)
    tuned(strategy.scope, found["tune"])
    exported(strategy.scope, found["export"])
    with strategy.scope():
        compiled = network(jit_compile=True)
    found["refuses XLA"] = refusal(lambda: tune(compiled, BATCH))
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = network()
    found["refuses workers"] = refusal(lambda: tune(model, BATCH))
    return found


def on_jax():
    distribution = keras.distribution
    data = distribution.DataParallel(devices=["cpu:0", "cpu:1"])
    channels = model_parallel((1, 2))
    both = model_parallel((2, 2))
    found = {"one device": on_one_device(), "data": {}, "channels": {}, "tune": {}, "export": {}}
    ways = ("shifted copy", "per pass, in place", "diagonal, in place inside")
    variants(data.scope, found["data"], *ways)
    variants(channels.scope, found["channels"], "shifted copy", "diagonal, in place inside")
    with both.scope():
        found["both"] = losses(rewrite(network(), "shifted"))
    tuned(data.scope, found["tune"])
    exported(channels.scope, found["export"])
    with data.scope():
        model = rewrite(network(), "shifted", in_place=True)
        found["step collectives"] = collectives(compiled_step(model))
    found["table"] = [partition(*case) for case in json.loads(sys.argv[1])]
    with channels.scope():
        found["warning"] = warning_of(lambda: rewrite(network(), "diagonal_grouped:8"))
        found["no warning"] = warning_of(lambda: rewrite(network(), "diagonal_grouped:4"))
    return found


def model_parallel(shape):
    """As written for the stock model: kernels of grouped convolutions by their channels."""
    distribution = keras.distribution
    devices = distribution.list_devices()[: shape[0] * shape[1]]
    mesh = distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layout = distribution.LayoutMap(mesh)
    layout["depthwise/kernel"] = (None, None, "model", None)
    layout["separable/depthwise_kernel"] = (None, None, "model", None)
    layout["grouped/kernel"] = (None, None, None, "model")
    return distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def compiled_step(model):
    """The program of a training step, as XLA partitioned it."""
    import jax
    from keras.src.backend.jax.trainer import _distribute_data

    x, y = batches()
    data = _distribute_data((x[:BATCH], y[:BATCH]))
    model._symbolic_build(data_batch=data)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    return jax.jit(model.train_step).lower(state, data).compile().as_text()


def collectives(program):
    """The operations by which devices exchange tensors, each once."""
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    return sorted(set(re.findall(rf" ({kinds})(?:-start)?\(", program)))


def partition(fields, lowering, mesh_shape):
    """Collectives and errors of one convolution, all passes, divided as `mesh_shape` says."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from diagconv_tf import ConvSpec
    from diagconv_tf.distribution import MeshAxis
    from diagconv_tf.lowerings import convolve, convolve_sharded, parse, why_not_sharded
    from tests.numerics import random_problem

    spec = ConvSpec.from_dict(fields)
    channels = MeshAxis("model", mesh_shape[1]) if mesh_shape[1] > 1 else None

    def passes(convolution):
        def run(x, k, g):
            outputs, pullback = jax.vjp(convolution, x, k)
            return outputs, *pullback(g)

        return run

    def divided(x, k):
        return convolve_sharded(spec, parse(lowering), x, k, channels)

    current = model_parallel(mesh_shape)
    mesh = current.device_mesh.backend_mesh
    axes = ["batch" if mesh_shape[0] > 1 else None, None, None, None]
    axes[spec.channel_axis] = channels and "model"
    of_images = NamedSharding(mesh, PartitionSpec(*axes))
    of_kernel = NamedSharding(mesh, PartitionSpec(None, None, None, channels and "model"))
    arrays = [a.astype("float32") for a in random_problem(spec)]
    wanted = passes(lambda x, k: convolve(spec, parse("native"), x, k))(*arrays)
    with current.scope():
        placed = [
            jax.device_put(array, sharding)
            for array, sharding in zip(arrays, (of_images, of_kernel, of_images), strict=True)
        ]
        shardings = (of_images, of_images, of_kernel)
        program = jax.jit(passes(divided), out_shardings=shardings).lower(*placed).compile()
        values = program(*placed)
    errors = [
        float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))
        for a, b in zip(values, wanted, strict=True)
    ]
    return {
        "collectives": collectives(program.as_text()),
        "error": max(errors),
        "why_not": why_not_sharded(spec, lowering, mesh_shape[1]),
    }


def warning_of(function):
    """The messages of our logger's warnings."""
    lines = []

    class Lines(stdlib_logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Lines(stdlib_logging.WARNING)
    logging.get_absl_logger().addHandler(handler)
    try:
        function()
    finally:
        logging.get_absl_logger().removeHandler(handler)
    return lines


if __name__ == "__main__":
    keras.config.set_floatx("float64")
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    with contextlib.redirect_stdout(sys.stderr):
        results = on_tensorflow() if BACKEND == "tensorflow" else on_jax()
    print(json.dumps(results))
