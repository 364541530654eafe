"""`ConvSpec` counts what it says, and refuses what cannot be."""

import dataclasses
import json
import platform

import numpy as np
import pytest

from diagconv_tf import Conditions, ConvSpec, Plan, backends, environment
from diagconv_tf.lowerings.diagonal import Diagonal, from_diagonal, to_diagonal
from diagconv_tf.measurements import Workload
from diagconv_tf.spec import same_padding
from diagconv_tf.tuning import keys
from tests import cases, reference
from tests.numerics import BACKEND

# The third depthwise layer of MobileNetV1 at 224: 3x3, 128 channels, stride 1.
MOBILENET = ConvSpec(1, 56, 56, 128, padding="same")


def test_flops_of_a_mobilenet_layer():
    # 3 * 3 * 56 * 56 * 128 multiply-adds (MobileNets, arXiv 1704.04861, table 1).
    assert MOBILENET.flops() == 2 * 3_612_672
    assert MOBILENET.replace(batch=8).flops() == 8 * 2 * 3_612_672
    assert MOBILENET.replace(output_channels_per_group=2).flops() == 4 * 3_612_672


def test_least_bytes_of_a_mobilenet_layer():
    assert MOBILENET.least_bytes() == 4 * (2 * 56 * 56 * 128 + 9 * 128)
    half = MOBILENET.replace(compute_dtype="bfloat16")
    assert half.least_bytes() * 2 == MOBILENET.least_bytes()


@pytest.mark.parametrize("unknown", ["batch", "height", "width"])
def test_costs_are_unknown_where_a_size_is(unknown):
    spec = MOBILENET.replace(**{unknown: None})
    assert spec.flops() is None
    assert spec.least_bytes() is None


@pytest.mark.parametrize("spec", cases.NAMED.values(), ids=cases.NAMED)
def test_output_shape_is_that_of_the_reference(spec):
    x, k = np.zeros(spec.input_shape), np.zeros(spec.kernel_shape)
    if spec.data_format == "channels_first":
        x = np.moveaxis(x, 1, -1)
    y = reference.conv(
        x,
        k,
        np.zeros,
        groups=spec.groups,
        strides=spec.strides,
        dilation_rate=spec.dilation_rate,
        padding=spec.padding,
    )[0]
    if spec.data_format == "channels_first":
        y = np.moveaxis(y, -1, 1)
    assert spec.output_shape == y.shape


def test_same_padding_puts_the_odd_zero_after():
    assert same_padding(4, 4, 1, 1) == (1, 2)
    assert same_padding(4, 3, 2, 1) == (0, 1)
    assert same_padding(5, 3, 2, 1) == (1, 1)
    assert same_padding(8, 2, 4, 1) == (0, 0)


@pytest.mark.parametrize("block", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["plain", "multiplier", "groups of 2"])
def test_reading_the_diagonal_is_the_transpose_of_writing_it(name, block):
    spec = cases.NAMED[name]
    if spec.groups % block:
        pytest.skip(f"{block} does not divide {spec.groups} groups")
    rng = np.random.default_rng(0)
    compact = rng.normal(size=spec.kernel_shape)
    kh, kw, i, outputs = spec.kernel_shape
    dense = rng.normal(size=(kh, kw, i * block, outputs))
    left = np.vdot(np.asarray(to_diagonal(spec, compact, block)), dense)
    right = np.vdot(compact, np.asarray(from_diagonal(spec, dense, block)))
    np.testing.assert_allclose(left, right, rtol=1e-5)
    assert np.count_nonzero(np.asarray(to_diagonal(spec, compact, block))) == compact.size


@pytest.mark.parametrize(
    ("channels", "groups", "per_group", "expected"),
    [
        (32, 144, 1, [32, 32, 32, 32, 16]),
        (32, 16, 1, [16]),
        (32, 6, 24, [1] * 6),
        (32, 7, 8, [4, 3]),
        (1, 3, 4, [1, 1, 1]),
        (None, 144, 1, [144]),
    ],
)
def test_blocks_hold_whole_groups(channels, groups, per_group, expected):
    spec = ConvSpec(1, 8, 8, groups, per_group)
    assert [block.groups for block in Diagonal(channels).blocks(spec)] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, r"`groups` to be >= 1.*groups=0"),
        ({"kernel_size": (3, 0)}, r"`kernel_size`.*two integers >= 1.*\(3, 0\)"),
        ({"strides": (1, 1, 1)}, "`strides`"),
        ({"padding": "causal"}, "`padding`.*'causal'"),
        ({"data_format": "NHWC"}, "`data_format`.*'NHWC'"),
        ({"compute_dtype": "int8"}, "`compute_dtype`.*'int8'"),
        ({"height": 2}, r"too small.*height of at least 3.*height=2"),
        ({"width": 4, "dilation_rate": (1, 2)}, r"width of at least 5.*width=4"),
    ],
    ids=str,
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"(?s)xpected.*{message}|{message}"):
        ConvSpec(**{"batch": 1, "height": 8, "width": 8, "groups": 4} | changes)


def test_specs_and_conditions_are_values():
    assert dataclasses.replace(MOBILENET) == MOBILENET
    assert hash(MOBILENET) == hash(dataclasses.replace(MOBILENET))
    assert Conditions.current() == Conditions.current()
    assert [Conditions.current(compiled).compiled for compiled in (True, False)] == [True, False]
    assert Conditions.current().compiled is (True if BACKEND == "jax" else None)
    assert dict(Conditions.current().versions)["keras"]


def key(conditions):
    return keys.of_workload(Workload(MOBILENET, "depthwise_conv", ()), ["shifted"], conditions)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: Abacus 9 @ 3 GHz\nmodel name\t: other\n",
            "Abacus 9 @ 3 GHz",
        ),
        ("processor: 0\nCPU implementer: 0x41\nCPU part: 0xd0c\n", "ppc 0x41 0xd0c"),
        ("processor: 0\n", "ppc"),
        (None, "ppc"),
    ],
)
def test_a_cpu_has_its_makers_name(monkeypatch, tmp_path, lines, name):
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "ppc")
    if lines is not None:
        (tmp_path / "cpuinfo").write_text(lines)
    assert environment.cpu_name() == name


def test_two_cpus_are_two_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(backends.current(), "default_device", lambda: ("cpu", ""))
    found = []
    for name in ("Abacus 8", "Abacus 9"):
        (tmp_path / "cpuinfo").write_text(f"model name: {name}\n")
        found.append(Conditions.current())
    assert found[0].differences(found[1]) == ["device_name Abacus 8 → Abacus 9"]
    assert key(found[0]) != key(found[1])


@pytest.mark.backends("jax")
def test_a_device_that_jax_was_told_by_its_platform_has_its_name_too():
    import jax

    here = Conditions.current()
    with jax.default_device(here.device_kind):
        assert Conditions.current() == here


def tensorflow_switches():
    import tensorflow as tf

    switch = tf.config.experimental
    return {
        "tf32": (
            switch.tensor_float_32_execution_enabled,
            switch.enable_tensor_float_32_execution,
            False,
        )
    }


def jax_switches():
    import jax

    name = "jax_default_matmul_precision"
    read = lambda: getattr(jax.config, name)  # noqa: E731
    return {"matmul_precision": (read, lambda value: jax.config.update(name, value), "float32")}


def torch_switches():
    import torch

    def of(owner, name, other):
        return (lambda: getattr(owner, name), lambda value: setattr(owner, name, value), other)

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "cudnn.benchmark": of(cudnn, "benchmark", True),
        "cudnn.tf32": of(cudnn, "allow_tf32", False),
        "matmul.tf32": of(matmul, "allow_tf32", True),
        "matmul.tf32 by precision": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            "high",
        ),
    }


SWITCHES = {"tensorflow": tensorflow_switches, "jax": jax_switches, "torch": torch_switches}[
    BACKEND
]()


@pytest.mark.parametrize("name", SWITCHES)
def test_what_a_gpu_is_switched_to_is_a_condition(monkeypatch, name):
    read, write, other = SWITCHES[name]
    # Of another GPU only the name is known: nothing is computed.
    monkeypatch.setattr(backends.current(), "default_device", lambda: ("gpu", "Abacus"))
    usual, before = Conditions.current(), read()
    cpu = dataclasses.replace(usual, device_kind="cpu", numeric_mode=())
    try:
        write(other)
        switched = Conditions.current()
        monkeypatch.setattr(backends.current(), "default_device", lambda: ("cpu", ""))
        # There nothing of it matters.
        assert Conditions.current().numeric_mode == ()
    finally:
        write(before)
    (difference,) = usual.differences(switched)
    assert difference.startswith(name.split()[0] + " ")
    assert key(usual) != key(switched)
    plan = Plan(switched, {MOBILENET: "shifted"})
    assert Plan.from_json(plan.to_json()) == plan
    # Where one of both does not name it, there is nothing to compare.
    assert switched.differences(cpu) == ["device_kind gpu → cpu"]


def test_plans_from_before_there_were_numeric_modes_load():
    fields = json.loads(Plan(Conditions.current(), {MOBILENET: "shifted"}).to_json())
    del fields["conditions"]["numeric_mode"]
    assert Plan.from_json(json.dumps(fields)).conditions.numeric_mode == ()
