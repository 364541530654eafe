"""Recipes on several devices and in several processes: the same numbers as on one."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import threading
import time
import zipfile

import keras
import numpy as np
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver

from diagconv_tf.distribution import Replicas
from recipes import data, models, processes, train
from recipes.config import Config
from recipes.data.image_data import ImageData
from recipes.data.sources import PixelExamples
from recipes.distributing import Distribution
from recipes.liveness import Liveness
from recipes.processes import Processes, ProcessGroup
from tests import forked, tiny_config
from tests.addresses import held_address

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


def start(arguments, folder=ROOT):
    return forked.start("recipes.train", *arguments, cwd=folder)


def losses(folder):
    """Variant → losses of its steps."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            found.setdefault(event["variant"], []).append(event["loss"])
    return found


@pytest.fixture
def tiny(monkeypatch):
    """The tiny network in place of MobileNetV1; afterwards no longer."""
    monkeypatch.setattr(models, "mobilenet_v1", models.mobilenet_v1)


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_two_devices_train_as_one(tiny, tmp_path):
    """With batch norms, whose statistics are those of the whole batch."""
    # Of one variant: what stock layers do on two devices is Keras's own.
    running = start(command(tmp_path, "--epochs=2", "--name=two", "--cpu_devices=2"))
    one = train.run_recipe(settings(tmp_path, name="one"), verbose=0)
    codes, outputs = finish([running])
    assert codes == [0], outputs
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert set(expected) == set(found) == {"shifted"}
    assert len(expected["shifted"]) == 10
    np.testing.assert_allclose(found["shifted"], expected["shifted"], rtol=1e-4)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["restored_accuracy"] == pytest.approx(one.restored_accuracy, abs=2 / 360)
    assert report["restored_accuracy"] == report["variants"][-1]["test_accuracy"]
    devices = report["environment"]["devices"]
    with zipfile.ZipFile(tmp_path / "two" / "model.keras") as file:
        # Or it could be loaded on TensorFlow only.
        assert b'"synchronized": true' not in file.read("config.json")
    if BACKEND == "tensorflow":
        assert devices.startswith("2 devices (MirroredStrategy), without XLA")
        assert (tmp_path / "two" / "saved_model").is_dir()
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
def test_strategies_and_accumulation_are_refused_together():
    with pytest.raises(ValueError, match="--gradient_accumulation=1.*Received: 4"):
        Distribution.start(Config(distribution="data_parallel", gradient_accumulation=4))


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

GROUPS = {
    "no port": (("host", 2, 0), "HOST:PORT of the first process. Received: 'host'"),
    "one process": (("host:1", 1, 0), "--num_processes to be at least 2. Received: 1"),
    "no such process": (("host:1", 2, 2), "--process_id from 0 to 1. Received: 2"),
}


@one_backend
@pytest.mark.parametrize(("values", "message"), GROUPS.values(), ids=GROUPS)
def test_wrong_groups_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ProcessGroup(*values)


def parsed(arguments):
    flag_values = flags.FlagValues()
    for name in ("job_addresses", "num_processes", "process_id", "join_timeout"):
        flag_values[name] = flags.FLAGS[name]
    return processes.group_from_flags(flag_values) if flag_values(["train", *arguments]) else None


@pytest.fixture
def no_group(monkeypatch):
    for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"KERAS_DISTRIBUTION_{name}", raising=False)
    yield monkeypatch
    for name in ("job_addresses", "num_processes", "process_id"):
        flags.FLAGS[name].value = None
    flags.FLAGS["join_timeout"].value = 300


@one_backend
def test_groups_from_flags_and_variables(no_group):
    assert parsed([]) is None
    no_group.setenv("KERAS_DISTRIBUTION_JOB_ADDRESSES", "a:1,b:2")
    no_group.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="together. Received: no --process_id"):
        parsed([])
    assert parsed(["--process_id=1"]) == ProcessGroup("a:1", 2, 1)
    line = ["--job_addresses=c:3", "--num_processes=4", "--process_id=0", "--join_timeout=9"]
    assert parsed(line) == ProcessGroup("c:3", 4, 0, 9)
    no_group.setenv("KERAS_DISTRIBUTION_PROCESS_ID", "first")
    flags.FLAGS["process_id"].value = None
    with pytest.raises(ValueError, match="as numbers"):
        parsed([])


@pytest.mark.backends("tensorflow", "torch")
def test_other_backends_say_how_several_machines_work():
    expected = "KERAS_BACKEND=jax" + (".*keras#20585" if BACKEND == "tensorflow" else "")
    with pytest.raises(ValueError, match=expected):
        Processes.join(ProcessGroup("host:1", 2, 0))


@contextlib.contextmanager
def connected(count):
    """Liveness of `count` processes, all in this one; and who noticed whose end."""
    noticed = {number: [] for number in range(count)}
    everyone = [
        Liveness(number, count, lambda lost, of, own=noticed[number]: own.append((lost, of)))
        for number in range(count)
    ]
    port = everyone[0].listen()
    threads = [
        threading.Thread(target=other.connect, args=("127.0.0.1", port, 10.0)) for other in everyone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield everyone, noticed
    for other in everyone:
        other.close()


def eventually(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def break_off(liveness):
    for peer in liveness._peers.values():
        peer.shutdown(socket.SHUT_RDWR)


@one_backend
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_all_notice_the_end_of_one(lost):
    with connected(3) as (everyone, noticed):
        everyone[lost].stop()  # A process that has ended tells nobody of anybody.
        break_off(everyone[lost])
        others = [number for number in range(3) if number != lost]
        eventually(lambda: all(noticed[number] == [(lost, 3)] for number in others))


@one_backend
def test_goodbye_is_no_end():
    with connected(3) as (everyone, noticed):
        for other in everyone:
            other.close()
        for other in everyone:
            break_off(other)
        time.sleep(0.2)
        assert not any(noticed.values())


@one_backend
def test_who_does_not_come_is_waited_for_in_vain():
    first = Liveness(0, 2)
    first.listen()
    with pytest.raises(OSError, match="timed out"):
        first.connect("127.0.0.1", 0, 0.1)


@one_backend
def test_whoever_cannot_connect_names_the_port():
    host, port = held_address().split(":")
    with pytest.raises(OSError, match=f"process 0 to be reached at {host}:{port} as well"):
        Liveness(1, 2).connect(host, int(port), 1.0)


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


@one_backend
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=repr)
def test_whatever_ends_a_process_is_noticed_by_the_others(error, monkeypatch, capsys):
    def ended(code):
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", ended)
    together = Processes(0, 2)
    with connected(2) as (everyone, _):
        together._liveness = everyone[0]
        with pytest.raises(EndedError, match="1"), together.ending_together():
            raise error
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert last_line(written).startswith(f"error: {type(error).__name__}")
    with pytest.raises(type(error)), Processes().ending_together():
        raise error


class EndedError(Exception):
    pass


@one_backend
def test_main_lets_nothing_pass_by(monkeypatch):
    """Errors of all kinds come to `ending_together`."""
    seen = []

    @contextlib.contextmanager
    def ending_together(self):
        try:
            yield
        except BaseException as error:
            seen.append(error)
            raise

    def fail(*_, **__):
        raise RuntimeError("in one process")

    monkeypatch.setattr(Processes, "ending_together", ending_together)
    monkeypatch.setattr(train, "run_recipe", fail)
    with flagsaver.flagsaver(), pytest.raises(RuntimeError):
        train.main(train.parse_flags(["train"]))
    assert [str(error) for error in seen] == ["in one process"]


def start_group(folder, *arguments, machines=(ROOT, ROOT)):
    address = held_address()
    return [
        start(
            command(
                folder,
                f"--job_addresses={address}",
                "--num_processes=2",
                f"--process_id={number}",
                *arguments,
            ),
            machines[number],
        )
        for number in (0, 1)
    ]


def finish(group, timeout=240):
    try:
        outputs = ["".join(running.communicate(timeout)) for running in group]
    finally:
        for running in group:
            running.kill()
    return [running.returncode for running in group], outputs


def wait_for(condition, group, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        if any(running.poll() is not None for running in group):
            pytest.fail("\n".join(finish(group)[1]))
        time.sleep(0.02)


def last_line(output):
    return re.findall("error: .*", output)[-1]


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_processes_that_are_ended_go_on_and_train_as_one(tiny, tmp_path):
    """Terminated, killed, and to the end: the losses of one device."""
    whole = train.run_recipe(
        settings(tmp_path, name="one", epochs=16, compare=("stock", "shifted")), verbose=0
    )
    checkpoints = tmp_path / "tiny" / "checkpoints" / "shifted"

    def saved():
        return {path.name for path in checkpoints.glob("step-*.npz")}

    both = ("--epochs=16", "--compare=stock,shifted")
    group = start_group(tmp_path, *both)
    # Between the variants, or in the first steps of the second one.
    wait_for((tmp_path / "tiny" / "results" / "stock.json").exists, group)
    group[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(group)
    assert codes == [75, 75], outputs
    lines = [last_line(output) for output in outputs]
    steps = [re.search(r"Interrupted by SIGTERM after step (\d+)\.", line)[1] for line in lines]
    assert steps[0] == steps[1]

    group = start_group(tmp_path, *both, "--resume")
    before = saved()
    wait_for(lambda: saved() - before, group)
    group[1].kill()
    codes, outputs = finish(group)
    assert codes == [75, -signal.SIGKILL]
    assert "process 1 of 0 to 1 has ended, and the others with it" in last_line(outputs[0])
    assert "--resume" in last_line(outputs[0])

    codes, outputs = finish(start_group(tmp_path, *both, "--resume"))
    assert codes == [0, 0], outputs
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "tiny")
    np.testing.assert_allclose(found["shifted"], expected["shifted"], rtol=1e-3)
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert report["environment"]["devices"] == "2 devices of 2 processes (DataParallel)"
    assert report["restored_accuracy"] == pytest.approx(whole.restored_accuracy, abs=2 / 360)
    # One of them writes and prints.
    assert "Results:" in outputs[0]
    assert "Results:" not in outputs[1]


class StoppedError(Exception):
    pass


def agreed(config, monkeypatch):
    """What the processes of a run have to agree on, up to the first training."""
    found = {}

    def stop(*_, **__):
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Processes, "agree", lambda self, *pair: found.update([pair]))
        patch.setattr(train, "train_variant", stop)
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


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_a_process_that_never_comes(tmp_path):
    address = held_address()
    alone = [
        start(
            command(
                tmp_path,
                f"--job_addresses={address}",
                "--num_processes=2",
                f"--process_id={number}",
                "--join_timeout=2",
            )
        )
        for number, address in enumerate((address, held_address()))
    ]
    codes, outputs = finish(alone)
    assert codes == [1, 1]
    assert f"other processes to connect to this one, at {address}" in last_line(outputs[0])
    assert "to meet at 127.0.0.1:" in last_line(outputs[1])
    assert all("not all of them in 2 seconds" in last_line(output) for output in outputs)


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_processes_with_different_plans_are_refused(tmp_path):
    from diagconv_tf import Plan

    # The same words, but on each machine another file.
    machines = tmp_path / "a", tmp_path / "b"
    for folder, lowering in zip(machines, ("native", "shifted"), strict=True):
        folder.mkdir()
        plan = Plan.of_model(tiny_config.network((32, 32, 3), 10))
        (path,) = plan.overrides
        dataclasses.replace(plan, overrides={path: lowering}).save(folder / "plan.json")
    group = start_group(tmp_path / "runs", "--compare=plan.json", machines=machines)
    codes, outputs = finish(group)
    assert codes == [1, 1], outputs
    for output in outputs:
        assert "Expected the same lowering or plan in all processes" in last_line(output)
