"""Several devices and processes: what they compute together is what one computes alone."""

import dataclasses
import itertools
import json
import types

import keras
import numpy as np
import pytest

from diagconv_tf import Conditions, ConvSpec, Plan
from diagconv_tf import distribution as distributions
from diagconv_tf.distribution import Replicas
from diagconv_tf.layers import kernel_channels_axis
from diagconv_tf.lowerings import why_not_sharded
from diagconv_tf.measurements import Workload
from diagconv_tf.tuning import keys
from tests import forked
from tests.addresses import held_address
from tests.numerics import BACKEND

SPEC = ConvSpec(batch=4, height=6, width=5, groups=16, padding="same")

#: Problem, lowering, and whether two devices can compute each its own channels.
KEPT = {
    "shifted": (SPEC, "shifted", True),
    "shifted, rows as one axis": (SPEC.replace(groups=64), "shifted", True),
    "native": (SPEC, "native", True),
    "native, multiplier": (SPEC.replace(output_channels_per_group=2), "native", True),
    "blocks end where devices' channels do": (SPEC, "diagonal:8", True),
    "blocks end elsewhere": (SPEC, "diagonal:6", True),
    "one block": (SPEC, "dense", True),
    "grouped, divides a device's channels": (SPEC, "diagonal_grouped:4", True),
    "grouped, wider than a device's channels": (SPEC, "diagonal_grouped:16", False),
    "channels first": (SPEC.replace(data_format="channels_first"), "diagonal:8", True),
    "groups that devices do not divide": (
        SPEC.replace(groups=3, input_channels_per_group=4, output_channels_per_group=4),
        "native",
        False,
    ),
}
#: Of these XLA's partitioner would gather the batch (but of diagonal blocks).
DIVIDED_BATCHES = {
    name: KEPT[name][:2]
    for name in (
        "shifted",
        "shifted, rows as one axis",
        "native, multiplier",
        "blocks end elsewhere",
        "grouped, wider than a device's channels",
        "groups that devices do not divide",
    )
}
EXCHANGES_IMAGES = {"all-gather", "all-to-all", "collective-permute"}


def _result(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-6000:]
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    cases = [(dataclasses.asdict(s), low, (1, 2)) for s, low, _ in KEPT.values()]
    cases += [(dataclasses.asdict(s), low, (2, 1)) for s, low in DIVIDED_BATCHES.values()]
    cases += [(dataclasses.asdict(SPEC), low, (2, 2)) for low in ("shifted", "diagonal:6")]
    return _result(forked.start("tests.on_devices", json.dumps(cases)))


def on_devices(*backends):
    """Marks tests of what was `found`: in one worker, so that it is found once."""

    def mark(test):
        for each in (
            pytest.mark.slow,
            pytest.mark.xdist_group("devices"),
            pytest.mark.backends(*backends),
        ):
            test = each(test)
        return test

    return mark


#: Only JAX divides channels.
HOW = ["data", "channels"] if BACKEND == "jax" else ["data"]


def _variants(found):
    names = [name.removesuffix(" kinds") for name in found if name.endswith(" kinds")]
    return [name for name in names if name not in ("stock", "undistributed")]


@on_devices("tensorflow", "jax")
@pytest.mark.parametrize("how", HOW)
def test_losses_are_those_of_one_device(found, how):
    # The rewritten ones go on where stock has left off: the second half.
    stock = found[how]["stock"]
    np.testing.assert_allclose(stock, found["one device"], rtol=1e-8)
    for name in _variants(found[how]):
        np.testing.assert_allclose(
            found[how][name], found[how]["undistributed"], rtol=1e-8, err_msg=name
        )


@on_devices("tensorflow", "jax")
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_distributed_model_is_exported_as_on_one_device(found, where):
    exported = found["export"][where]
    assert exported["error"] < 1e-12
    assert exported["still current"] == (where == "inside")
    kinds = found["export"]["kinds"]  # Of the model's own variables, afterwards.
    if BACKEND == "tensorflow":
        assert exported["ops"] == 2
        assert any(kind.endswith("of 2") for kind in kinds)
    else:
        assert any("model" in kind for kind in kinds)


@on_devices("tensorflow", "jax")
@pytest.mark.parametrize("how", HOW)
def test_variables_stay_distributed(found, how):
    kinds = found[how]["stock kinds"]
    assert all(kind.endswith(" 2") for kind in kinds)
    for name in _variants(found[how]):
        assert found[how][f"{name} kinds"] == kinds, name
    assert (
        found[how]["undistributed kinds"]
        == {
            "tensorflow": ["ResourceVariable of 1"],
            "jax": ["None on 1"],
        }[BACKEND]
    )


@on_devices("jax")
def test_a_layout_map_of_the_stock_model_divides_channels(found):
    assert any("'model'" in kind for kind in found["channels"]["stock kinds"])
    np.testing.assert_allclose(found["both"], found["one device"], rtol=1e-8)


@on_devices("jax")
def test_a_step_exchanges_no_images(found):
    assert found["step collectives"] == ["all-reduce"]


@on_devices("jax")
@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_the_sharding_of_channels(found, name):
    kept = KEPT[name][2]
    case = found["table"][list(KEPT).index(name)]
    assert (case["why_not"] == []) == kept
    assert EXCHANGES_IMAGES.isdisjoint(case["collectives"]) == kept, case["collectives"]
    assert case["error"] < 2e-6


@on_devices("jax")
@pytest.mark.parametrize("name", DIVIDED_BATCHES)
def test_batches_are_never_gathered(found, name):
    case = found["table"][len(KEPT) + list(DIVIDED_BATCHES).index(name)]
    assert case["collectives"] == ["all-reduce"]  # Of the kernel gradient.
    assert case["error"] < 2e-6


@on_devices("jax")
def test_batch_and_channels_at_once(found):
    cases = found["table"][len(KEPT) + len(DIVIDED_BATCHES) :]
    assert len(cases) == 2
    for case in cases:
        assert case["collectives"] == ["all-reduce"]
        assert case["error"] < 2e-6


@on_devices("jax")
def test_rewrite_says_what_gathers(found):
    (line,) = found["warning"]
    assert "Gather the channels" in line
    assert "diagonal_grouped:8 needs" in line
    assert "depthwise" in line
    assert found["no warning"] == []


@on_devices("tensorflow", "jax")
def test_tune_measures_one_replica_alone(found):
    found = found["tune"]
    (bench,) = found["bench"]
    assert bench["batch"] == 4
    assert not bench["current"]
    assert found["still current"]
    assert (
        bench["kinds"]
        == {
            "tensorflow": ["ResourceVariable of 1"],
            "jax": ["None on 1"],
        }[BACKEND]
    )
    assert found["untouched"]
    assert found["replicas outside"] == 2
    assert not any("other conditions" in line for line in found["warning outside"])
    plan = found["plan"]
    assert plan["batch_size"] == 8
    assert plan["batches"] == [4]
    assert plan["replicas"] == 2
    assert plan["compiled"] == bench["compiled"] == (BACKEND == "jax")
    assert "stock" in plan["steps"]
    assert "that 2 replicas divide (near: 8, 10)" in found["refusal"]


@on_devices("tensorflow")
def test_what_a_strategy_cannot_do_is_refused(found):
    assert "without XLA" in found["refuses XLA"]
    assert "keras#20585" in found["refuses workers"]


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_processes_get_the_plan_of_the_first():
    address = held_address()
    first, second = processes = [forked.start("tests.on_processes", address, i) for i in range(2)]
    try:
        first, second = _result(first), _result(second)
    finally:
        for process in processes:
            process.kill()
    assert first["plan"] == second["plan"]
    assert Plan.from_json(first["plan"]).conditions.num_replicas == 2
    assert len(first["devices"]) == 1
    assert second["devices"] == []
    assert first["error"] == "StoppedError: the clock has stopped"
    assert "RuntimeError: Process 0 failed" in second["error"]
    assert "StoppedError: the clock has stopped" in second["error"]
    for result in (first, second):
        assert result["fully replicated"]
        assert result["on devices"] == [2]
        assert result["parts"] == {
            "divided": True,
            "same shardings": True,
            "devices": [1],
            "same shapes": True,
            "own values": True,
        }


class _Store:
    def __init__(self):
        self.texts = {}

    def put(self, key, text):
        assert key not in self.texts
        self.texts[key] = text

    def get(self, key, seconds):
        return self.texts[key]


def test_each_call_has_its_own_key(monkeypatch):
    store = _Store()
    backend = types.SimpleNamespace(process_store=lambda: store)
    monkeypatch.setattr(distributions.backends, "current", lambda: backend)

    def call(process, numbers, make):
        monkeypatch.setattr(distributions, "_numbers", numbers)
        return distributions.from_first_process(make, process)

    def never():
        raise AssertionError("only the first process makes it")

    def stopped():
        raise KeyboardInterrupt

    first, second = itertools.count(), itertools.count()
    assert call(0, first, lambda: "a") == call(1, second, never) == "a"
    assert call(0, first, lambda: "b") == call(1, second, never) == "b"
    with pytest.raises(KeyboardInterrupt):
        call(0, first, stopped)
    with pytest.raises(RuntimeError, match="Process 0 failed.*KeyboardInterrupt"):
        call(1, second, never)


def test_replicas_share_a_batch():
    assert Replicas(4).per_replica_batch(64) == 16
    assert Replicas().per_replica_batch(7) == 7
    with pytest.raises(ValueError, match=r"4 replicas divide \(near: 4\). Received: batch_size=3"):
        Replicas(4).per_replica_batch(3)
    assert distributions.replicas_of() == Replicas()
    assert distributions.strategy_of() is None
    assert distributions.batch_axis() is None


def test_a_strategy_of_several_workers_is_refused_in_one_line():
    class CollectiveAllReduceStrategy:
        pass

    class Experimental(CollectiveAllReduceStrategy):
        pass

    distributions.refuse_multi_worker(None)
    for strategy in (CollectiveAllReduceStrategy(), Experimental()):
        with pytest.raises(ValueError, match="keras#20585") as info:
            distributions.refuse_multi_worker(strategy)
        assert "\n" not in str(info.value)
        assert "keras.distribution" in str(info.value)


def test_nothing_is_current_inside_undistributed():
    def raises():
        raise LookupError("inside")

    assert distributions.undistributed(lambda: 3) == 3
    with pytest.raises(LookupError, match="inside"):
        distributions.undistributed(raises)


def test_conditions_say_replicas():
    one, two = Conditions.current(False), Conditions.current(False, num_replicas=2)
    assert one.num_replicas == 1
    assert one.differences(two) == ["num_replicas 1 → 2"]
    plan = Plan(two, {SPEC: "shifted"}, batch_size=8)
    assert "batch of 8, 2 replicas" in str(plan)
    assert "replicas" not in str(Plan(one, {SPEC: "shifted"}, batch_size=8))
    assert Plan.from_json(plan.to_json()) == plan


def test_plans_from_before_there_were_replicas_load():
    fields = json.loads(Plan(Conditions.current(), {SPEC: "shifted"}).to_json())
    del fields["conditions"]["num_replicas"]
    assert Plan.from_json(json.dumps(fields)).conditions.num_replicas == 1


def test_a_share_is_measured_once_whoever_has_the_rest():
    workload = Workload(SPEC, "depthwise_conv", ())
    one, two = Conditions.current(True), Conditions.current(True, num_replicas=2)
    first, second = (keys.of_workload(workload, ["shifted"], where) for where in (one, two))
    assert first == second


@pytest.mark.parametrize("name", KEPT)
def test_why_not_sharded(name):
    spec, lowering, kept = KEPT[name]
    assert (why_not_sharded(spec, lowering, 2) == []) == kept


def test_why_not_sharded_gives_reasons():
    assert why_not_sharded(SPEC, "shifted", 3) == ["16 groups are not divided by 3 devices"]
    (reason,) = why_not_sharded(SPEC, "diagonal_grouped:16", 2)
    assert "that 16 divides; received 8" in reason


def test_a_layer_without_a_layout_has_no_axis():
    for layer in (
        keras.layers.DepthwiseConv2D(3),
        keras.layers.SeparableConv2D(4, 3),
        keras.layers.Conv2D(8, 3, groups=4),
    ):
        layer.build((None, 8, 8, 4))
        assert kernel_channels_axis(layer) is None
