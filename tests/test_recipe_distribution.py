"""Recipes on several devices and in several processes: the same numbers as on one."""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import time
import zipfile

import keras
import numpy as np
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver

from diagconv_tf import Plan
from diagconv_tf.distribution import Replicas
from recipes import data, models, processes, train
from recipes.config import Config
from recipes.data.image_data import ImageData
from recipes.data.sources import PixelExamples
from recipes.distributing import Distribution
from recipes.interruption import TrainingInterrupted
from recipes.processes import Processes
from recipes.train import RecipeError
from tests import forked, tiny_config

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_config.py"
BACKEND = keras.backend.backend()
# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("tensorflow")

# --- Shares of a batch ---------------------------------------------------------

SHARES = [Replicas(2, 2), Replicas(4, 2), Replicas(4, 4), Replicas(2, 1), Replicas(4, 1)]


def numbered(count):
    """Images of 4x4 that tell their number."""
    pixels = (
        np.zeros((count, 4, 4, 3), "uint8") + np.arange(count, dtype="uint8")[:, None, None, None]
    )
    examples = PixelExamples(pixels, np.arange(count) % 3)
    return ImageData("numbered", examples, examples, ("a", "b", "c"), 4)


def parts(make, share):
    """For every process, its batches."""
    return [
        list(make(dataclasses.replace(share, process_index=process)).as_numpy_iterator())
        for process in range(share.num_processes)
    ]


@one_backend
@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("first_step", [0, 3])
def test_processes_read_the_parts_of_the_same_batches(share, first_step):
    def make(replicas):
        return data.training_dataset(
            numbered(21),
            8,
            seed=3,
            epochs=3,
            augmentation="crop_flip",
            first_step=first_step,
            replicas=replicas,
        )

    whole = list(make(Replicas()).as_numpy_iterator())
    shares = parts(make, share)
    assert len(whole) == 6 - first_step
    for place in (0, 1):
        expected = np.stack([batch[place] for batch in whole])
        found = [np.stack([batch[place] for batch in own]) for own in shares]
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    assert {len(batch[1]) for own in shares for batch in own} == {8 // share.num_processes}


@one_backend
@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("count", [16, 17, 21, 3])
def test_every_test_image_counts_once(share, count):
    shares = parts(lambda r: data.evaluation_dataset(numbered(count), 8, replicas=r), share)
    devices = share.num_replicas // share.num_processes
    seen = []
    for batches in zip(*shares, strict=True):
        (size,) = {len(batch[1]) for batch in batches}
        assert size % devices == 0
        images = np.concatenate([batch[0][:, 0, 0, 0] for batch in batches])
        weights = np.concatenate([batch[2] for batch in batches])
        seen += list(np.rint((images + 1) * 127.5)[weights == 1].astype(int))
        assert set(weights) <= {0, 1}
    assert seen == list(range(count))


@one_backend
def test_a_batch_that_replicas_do_not_divide_is_refused():
    message = r"Expected a global batch size that 4 replicas divide \(near: 4, 8\).*batch_size=6"
    with pytest.raises(ValueError, match=message):
        data.training_dataset(numbered(20), 6, seed=0, epochs=1, replicas=Replicas(4))


# --- Devices of one machine ----------------------------------------------------


def settings(folder, **changes):
    values = {"epochs": 2, "output_dir": str(folder), "overwrite": True, **changes}
    return dataclasses.replace(tiny_config.get_config(), **values)


def command(folder, *arguments):
    return [
        f"--config={TINY}",
        f"--output_dir={folder}",
        "--distribution=data_parallel",
        *arguments,
    ]


def start(arguments):
    return forked.start("recipes.train", *arguments)


def losses(folder):
    """Variant → losses of its steps."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            found.setdefault(event["variant"], []).append(event["loss"])
    return found


@pytest.fixture
def quick_xla(monkeypatch):
    """Started processes compile quickly: nothing that they compute takes long."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", flags)


@pytest.fixture
def tiny(monkeypatch):
    """The tiny network in place of MobileNetV1; afterwards no longer."""
    monkeypatch.setattr(models, "mobilenet_v1", models.mobilenet_v1)


FIRST_STEPS = 10


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A run on one device: its losses, and its report."""
    folder = tmp_path_factory.mktemp("runs")
    # Of which others see the beginning, but for the processes of JAX.
    steps = None if BACKEND == "jax" else FIRST_STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "mobilenet_v1", models.mobilenet_v1)
        changes = {"name": "one", "epochs": 16, "max_steps": steps}
        report = train.run_recipe(settings(folder, **changes), verbose=0)
    return losses(folder / "one"), report


def compared_with_one_device(test):
    """Marks tests with `one_device`: in one worker, so that it is run once."""
    return pytest.mark.slow(pytest.mark.xdist_group("one device")(test))


@compared_with_one_device
@pytest.mark.backends("tensorflow", "jax")
def test_two_devices_train_as_one(one_device, tmp_path, quick_xla):
    """With batch norms, whose statistics are those of the whole batch."""
    expected, one = one_device
    # Of one variant: what stock layers do on two devices is Keras's own.
    line = command(tmp_path, "--epochs=16", f"--max_steps={FIRST_STEPS}", "--cpu_devices=2")
    (code,), (output,) = finish([start(line)])
    assert code == 0, output
    found = losses(tmp_path / "tiny")
    assert set(expected) == set(found) == {"shifted"}
    assert len(found["shifted"]) == FIRST_STEPS
    np.testing.assert_allclose(found["shifted"], expected["shifted"][:FIRST_STEPS], rtol=1e-4)
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    if len(expected["shifted"]) == FIRST_STEPS:
        assert report["restored_accuracy"] == pytest.approx(one.restored_accuracy, abs=2 / 360)
    assert report["restored_accuracy"] == report["variants"][-1]["test_accuracy"]
    devices = report["environment"]["devices"]
    with zipfile.ZipFile(tmp_path / "tiny" / "model.keras") as file:
        # Or it could be loaded on TensorFlow only.
        assert b'"synchronized": true' not in file.read("config.json")
    if BACKEND == "tensorflow":
        assert devices.startswith("2 devices (MirroredStrategy), without XLA")
        assert (tmp_path / "tiny" / "saved_model").is_dir()
    else:
        assert devices == "2 devices (DataParallel)"
    # As fast as the images of all devices together.
    names = [row["variant"] for row in report["variants"]]
    assert names == ["Keras's default", "shifted"]
    for row in report["variants"]:
        assert row["images_per_second"] == pytest.approx(240 / row["step_median_seconds"])
    trained = report["variants"][1]["in_training"]
    assert trained["batch_size"] == 240
    rate = trained["batch_size"] / trained["step_median_seconds"]
    assert trained["images_per_second"] == pytest.approx(rate, rel=0.5)


@pytest.mark.backends("torch")
def test_a_backend_without_distribution_is_refused():
    with pytest.raises(ValueError, match="Expected the TensorFlow or the JAX backend.*torch"):
        Distribution.start(Config(distribution="data_parallel"))


@pytest.mark.backends("tensorflow")
def test_strategies_and_xla_are_refused_together():
    with pytest.raises(ValueError, match="--jit_compile=auto or false"):
        Distribution.start(Config(distribution="data_parallel", jit_compile="true"))


@pytest.mark.backends("tensorflow")
def test_strategies_and_accumulation_are_refused_together(monkeypatch):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    several = Distribution(Replicas(2), strategy=strategy)
    several.check(Config())
    with pytest.raises(ValueError, match="--gradient_accumulation=1.*Received: 4"):
        several.check(Config(gradient_accumulation=4))
    Distribution().check(Config(gradient_accumulation=4))
    # A treatment that accumulates is found before any image is read.
    monkeypatch.setattr(Distribution, "start", lambda config, others: several)
    with pytest.raises(RecipeError, match="--gradient_accumulation=1.*Received: 8"):
        train.run_recipe(Config(compare=("stock", "bigsr"), dataset="folder:missing"))


@pytest.mark.backends("tensorflow", "jax")
def test_one_device_needs_no_distribution(monkeypatch):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("CPU")
        monkeypatch.setattr(
            tf.config, "list_logical_devices", lambda kind: devices[:1] if kind == "CPU" else []
        )
    else:
        devices = keras.distribution.list_devices()
        monkeypatch.setattr(keras.distribution, "list_devices", lambda: devices[:1])
    found = Distribution.start(Config(distribution="data_parallel", dataset="synthetic"))
    assert found.strategy is None
    assert found.replicas == Replicas()
    assert found.describe() == "one device"


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("before", [True, False])
def test_batch_norms_are_synchronized_under_a_strategy_alone(before):
    inputs = keras.Input((4, 4, 3))
    norm = keras.layers.BatchNormalization(synchronized=before)
    model = keras.Model(inputs, keras.Sequential([norm])(inputs))
    mirrored = Distribution(strategy=object())
    for distribution, wanted, expected in (
        (mirrored, True, True),
        (mirrored, False, False),
        (Distribution(), True, False),
    ):
        distribution.prepare(model, Config(sync_batch_norm=wanted))
        assert norm.synchronized is expected
    mirrored.prepare(model, Config())
    # What is saved can be loaded on every backend.
    assert '"synchronized": true' not in train.without_training_state(model).to_json()


@one_backend
def test_processes_need_a_distribution():
    with pytest.raises(ValueError, match="--distribution=data_parallel for several processes"):
        Distribution.start(Config(), Processes(1, 2))


# --- Several processes ---------------------------------------------------------

LINE = ("--job_addresses=c:3", "--num_processes=4", "--process_id=1")
WRONG_GROUPS = {
    "no process": (LINE[:2], "together. Received: no --process_id"),
    "no address": (LINE[1:], "together. Received: no --job_addresses"),
    "no port": (("--job_addresses=c", *LINE[1:]), "HOST:PORT of the first process. Received: c"),
    "no such process": ((*LINE[:2], "--process_id=4"), "a process from 0 to 3. Received: 4"),
}


def parsed(*arguments):
    flag_values = flags.FlagValues()
    processes.define_flags(flag_values)
    flag_values(["train", *arguments])
    return flag_values


@one_backend
@pytest.mark.parametrize(("arguments", "message"), WRONG_GROUPS.values(), ids=WRONG_GROUPS)
def test_wrong_groups_are_refused(arguments, message):
    with pytest.raises(flags.Error, match=re.escape(message)):
        parsed(*arguments)


@one_backend
def test_alone_there_is_nothing_to_join():
    alone = Processes.join(parsed())
    assert (alone.process_index, alone.num_processes, alone.is_first) == (0, 1, True)


@pytest.mark.backends("jax")
def test_groups_from_flags_and_variables(monkeypatch):
    """What JAX is told. A flag counts more than a variable; of addresses the first counts."""
    import jax

    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: told.append((a, k)))
    for name, value in (("JOB_ADDRESSES", "a:1,b:2"), ("NUM_PROCESSES", 2), ("PROCESS_ID", 0)):
        monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", str(value))
    joined = Processes.join(parsed("--process_id=1", "--join_timeout=9"))
    assert (joined.process_index, joined.num_processes, joined.is_first) == (1, 2, False)
    Processes.join(parsed(*LINE, "--heartbeat_timeout=7"))
    waits = ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    assert told == [
        (("a:1", 2, 1), dict(zip(waits, (9, 100, 100), strict=True))),
        (("c:3", 4, 1), dict(zip(waits, (300, 7, 7), strict=True))),
    ]


@pytest.mark.backends("tensorflow", "torch")
def test_other_backends_say_how_several_machines_work():
    expected = "KERAS_BACKEND=jax" + (".*keras#20585" if BACKEND == "tensorflow" else "")
    with pytest.raises(ValueError, match=expected):
        Processes.join(parsed(*LINE))


@pytest.mark.backends("jax")
def test_steps_are_counted_through_all_variants(monkeypatch):
    from jax.experimental import multihost_utils

    asked = []
    ask = lambda step: asked.append(step) or step == 5  # noqa: E731
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", ask)
    together = Processes(0, 2)
    for steps in (range(1, 4), range(501, 503)):  # The second one goes on from step 500.
        with together.interruption() as interruption:
            found = [interruption.asked(step) for step in steps]
            assert interruption.asked() == found[-1]
    assert asked == [1, 2, 3, 4, 5]
    assert found == [False, True]


INTERRUPTED = TrainingInterrupted("SIGTERM", 5, None)


@one_backend
@pytest.mark.parametrize(
    ("end", "waits"),
    [(None, True), (INTERRUPTED, True), (RecipeError("of this one"), False)],
    ids=["finished", "interrupted", "failed"],
)
def test_who_ends_in_order_waits_for_the_first(end, waits, monkeypatch):
    """It may be writing for longer than JAX waits at an exit; an error is told at once."""
    asked = []
    others = Processes(1, 2)
    monkeypatch.setattr(Processes, "from_first", lambda self, text: asked.append(text))
    monkeypatch.setattr(Processes, "join", lambda: others)

    def run(*_, **__):
        if end is not None:
            raise end

    monkeypatch.setattr(train, "run_recipe", run)
    with flagsaver.flagsaver(), contextlib.ExitStack() as stack:
        if end is not None:
            stack.enter_context(pytest.raises(SystemExit))
        train.main(train.parse_flags(["train"]))
    assert len(asked) == waits


@contextlib.contextmanager
def group_of_two(*arguments, own=((), ())):
    """Two processes with `arguments`, and each with its `own`; none is left afterwards."""
    with forked.reserved_address() as address:
        place = f"--job_addresses={address}", "--num_processes=2"
        group = [
            start([*arguments, *own[number], *place, f"--process_id={number}"]) for number in (0, 1)
        ]
        try:
            yield group
        finally:
            for running in group:
                running.kill()


def finish(group, timeout=240):
    outputs = ["".join(running.communicate(timeout)) for running in group]
    return [running.returncode for running in group], outputs


def wait_for(condition, group, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        if any(running.poll() is not None for running in group):
            pytest.fail("\n".join(finish(group)[1]))
        time.sleep(0.02)


def last_line(output):
    return re.findall("^error: .*", output, re.MULTILINE)[-1]


@compared_with_one_device
@pytest.mark.backends("jax")
def test_processes_end_together_go_on_and_train_as_one(one_device, tmp_path, quick_xla):
    """Terminated, and then to the end: the losses of one device."""
    line = command(tmp_path, "--epochs=16", "--resume")
    folder = tmp_path / "tiny"
    with group_of_two(*line) as group:
        wait_for(lambda: any(folder.glob("checkpoints/shifted/step-*.npz")), group)
        group[1].send_signal(signal.SIGTERM)
        codes, outputs = finish(group)
    assert codes == [75, 75], outputs
    lines = [last_line(output) for output in outputs]
    steps = [re.search(r"Interrupted by SIGTERM after step (\d+)\.", line)[1] for line in lines]
    assert steps[0] == steps[1]

    with group_of_two(*line) as group:
        codes, outputs = finish(group)
    assert codes == [0, 0], outputs
    expected, one = one_device
    np.testing.assert_allclose(losses(folder)["shifted"], expected["shifted"], rtol=1e-3)
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["devices"] == "2 devices of 2 processes (DataParallel)"
    assert report["restored_accuracy"] == pytest.approx(one.restored_accuracy, abs=2 / 360)
    # One of them writes and prints.
    assert "Results:" in outputs[0]
    assert "Results:" not in outputs[1]


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    with group_of_two(*command(tmp_path, "--heartbeat_timeout=2")) as group:
        wait_for((tmp_path / "tiny" / "config.json").exists, group)
        group[1].kill()
        codes, outputs = finish(group, timeout=60)  # JAX would wait 100 seconds if not told.
    assert codes == [-signal.SIGABRT, -signal.SIGKILL], outputs


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_an_error_of_one_process_ends_both(tmp_path):
    """Its line comes first; the other one waits for what never comes."""
    no_folder = tmp_path / "file"
    no_folder.touch()
    with group_of_two(*command(no_folder, "--heartbeat_timeout=2")) as group:
        codes, outputs = finish(group, timeout=60)
    assert codes == [-signal.SIGABRT] * 2, outputs
    assert "Expected `output_dir` to be a folder" in last_line(outputs[0])
    assert "output_dir" not in outputs[1]


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_processes_that_disagree_end_in_one_line(tmp_path):
    with group_of_two(*command(tmp_path), own=((), ("--seed=1",))) as group:
        codes, outputs = finish(group)
    assert codes == [1, 1], outputs
    for output in outputs:
        assert "Expected the same settings in all processes. " in last_line(output)
        assert "in process 1" in last_line(output)


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_a_process_that_never_comes(tmp_path):
    with forked.reserved_address() as address:
        group = f"--job_addresses={address}", "--num_processes=2", "--process_id=0"
        codes, (output,) = finish([start(command(tmp_path, *group, "--join_timeout=1"))], 60)
    assert codes == [-signal.SIGABRT]
    assert f"waits up to 1 seconds for all 2 to meet at {address}" in output


class StoppedError(Exception):
    pass


def agreed(config, monkeypatch):
    """What the processes of a run have to agree on, up to the first training."""
    found = {}

    def stop(*_, **__):
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Processes, "agree", lambda self, *pair: found.update([pair]))
        patch.setattr(train, "fit_from", stop)
        train.run_recipe(config, verbose=0)
    return found


def write_images(folder, names=("a/1.png", "a/2.png", "b/1.png", "b/2.png")):
    for name in names:
        for part in ("train", "test"):
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (40, 40)).save(path)
    return f"folder:{folder}"


@one_backend
def test_processes_with_other_images_are_refused(tiny, tmp_path, monkeypatch):
    def images(name, *names):
        dataset = write_images(tmp_path / "images" / name, *names)
        return agreed(
            settings(tmp_path, name=name, dataset=dataset, batch_size=2, epochs=1), monkeypatch
        )["images"]

    expected = images("one")
    assert images("elsewhere") == expected
    for name, names in {
        "files": ("a/1.png", "a/3.png", "b/1.png", "b/2.png"),
        "labels": ("a/1.png", "b/2.png", "b/1.png", "b/3.png"),
        "classes": ("a/1.png", "a/2.png", "c/1.png", "c/2.png"),
    }.items():
        assert images(name, names) != expected


@one_backend
def test_processes_with_other_start_weights_are_refused(tiny, tmp_path, monkeypatch):
    path = tmp_path / "mine.keras"
    model = tiny_config.network((32, 32, 3), 9)

    def weights():
        model.save(path)
        found = agreed(settings(tmp_path, model=str(path), name="a"), monkeypatch)
        return found[f"weights in {path}"]

    expected = weights()
    assert weights() == expected  # The file has another date.
    weight = model.trainable_variables[0]
    weight.assign(weight + 1)
    assert weights() != expected


@one_backend
def test_processes_with_different_plans_are_refused(tiny, tmp_path, monkeypatch):
    """The same words, but on each machine another file."""
    path = tmp_path / "plan.json"

    def lowerings(lowering):
        plan = Plan.of_model(tiny_config.network((32, 32, 3), 10))
        (layer,) = plan.overrides
        dataclasses.replace(plan, overrides={layer: lowering}).save(path, overwrite=True)
        config = settings(tmp_path, name="a", compare=(str(path),))
        return agreed(config, monkeypatch)["lowering or plan"]

    assert lowerings("native") == lowerings("native") != lowerings("shifted")
