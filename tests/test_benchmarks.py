"""The benchmarks run and report all that was asked for. Times are never asserted on."""

import csv
import itertools
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import PIL.Image
import pytest

from tests import forked
from tests.numerics import BACKEND, THOROUGH

# A minute for each backend: one of them by default, all before a release.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BACKEND != "tensorflow" and not THOROUGH,
        reason="runs on TensorFlow, or with HYPOTHESIS_PROFILE=thorough",
    ),
]

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(script, *arguments):
    """`(exit code, standard output, standard error)` of `scripts/script`."""
    if BACKEND == "tensorflow":
        process = forked.start("tests.run_benchmark", script, *arguments)
        output, errors = process.communicate()
        return process.returncode, output, errors
    # A copy of a process that has imported TensorFlow could not be without it.
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_benchmark", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def check_environment(environment, script):
    assert environment["backend"] == BACKEND
    assert environment["versions"]["keras"] == keras.__version__
    assert environment["cpus"] >= 1
    assert script in environment["command"]
    assert environment["date"].startswith("20")
    assert {"device_name", "device_kind", "commit", "flags"} <= set(environment)


def check_measured(row):
    assert row["median"] > 0
    assert row["p10"] <= row["median"] <= row["p90"]
    assert row["count"] >= 1


def check_failed(row, *words):
    assert row["median"] is None
    assert row["count"] == 0
    for word in words:
        assert word in row["error"]


@pytest.fixture(scope="module")
def lowerings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lowerings")
    shape = "7x8x6_k5x3_s2_m2_valid"
    code, output, errors = run(
        "benchmark_lowerings.py",
        f"--shapes={shape}",
        "--batch_size=2",
        "--rounds=2",
        "--rotate_mb=0",
        "--lowerings=diagonal_grouped:4,native,shifted,diagonal:4/shifted/native",
        "--passes=forward,kernel_gradient",
        "--precision=float32,bfloat16",
        "--layouts=channels_last,channels_first",
        f"--out={folder}/out.json",
        f"--pictures={folder}",
    )
    assert code == 0, errors
    return folder, json.loads((folder / "out.json").read_text()), output


def test_every_combination_has_a_row(lowerings):
    _, results, _ = lowerings
    check_environment(results["environment"], "benchmark_lowerings.py")
    found = [
        (row["shape"], row["pass_name"], row["precision"], row["layout"], row["lowering"])
        for row in results["rows"]
    ]
    wanted = itertools.product(
        ("7x8x6_k5x3_s2_m2_valid",),
        ("forward", "kernel_gradient"),
        ("float32", "bfloat16"),
        ("channels_last", "channels_first"),
        ("diagonal_grouped:4", "native", "shifted", "diagonal:4/shifted/native"),
    )
    assert sorted(found) == sorted(wanted)


def test_a_failing_lowering_is_a_row_and_the_others_go_on(lowerings):
    _, results, output = lowerings
    for row in results["rows"]:
        assert row["limit"] > 0
        if row["lowering"] == "diagonal_grouped:4":
            check_failed(row, "refused", "number of input channels that 4 divides")
            continue
        assert row["error"] is None
        check_measured(row)
        assert row["relative_error"] <= {"float32": 1e-5, "bfloat16": 1e-2}[row["precision"]]
        assert row["agrees"] is True
        assert row["operations"] == row["sets"] == 1
        assert row["limit_share"] == pytest.approx(row["limit"] / row["median"])
    assert "refused: diagonal_grouped:4" in output


def test_the_limit_is_that_of_the_measured_ceilings(lowerings):
    _, results, _ = lowerings
    ceilings = results["environment"]["ceilings"]
    rates = ceilings["flops_per_second"]
    assert rates["bfloat16"] >= rates["float32"] > 0
    for row in results["rows"]:
        bounds = {
            "memory": row["least_bytes"] / ceilings["bytes_per_second"],
            "arithmetic": row["flops"] / rates[row["precision"]],
        }
        assert row["limit"] == pytest.approx(max(bounds.values()))
        assert bounds[row["bound"]] == max(bounds.values())


def test_lowerings_are_drawn(lowerings):
    folder, _, _ = lowerings
    pictures = {path.stem.removesuffix("_compiled") for path in folder.glob("*.png")}
    assert pictures == {
        f"{kind}_{precision}_{layout}"
        for kind in ("bars", "roofline")
        for precision in ("float32", "bfloat16")
        for layout in ("channels_last", "channels_first")
    }

    orange = (255, 127, 14)  # matplotlib's second colour, and native the second lowering.
    for path in folder.glob("*.png"):
        pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
        assert np.count_nonzero((pixels == orange).all(axis=-1)) > 100, path.name


def test_several_operations_a_call(tmp_path):
    code, output, errors = run(
        "benchmark_lowerings.py",
        "--shapes=8x8x8_k3_s1,8x8x64_k3_s1_b16",
        "--batch_size=1",
        "--rounds=1",
        "--repeats=2",
        "--rotate_mb=1",
        "--max_parts=8",
        "--passes=input_gradient",
        "--precision=default",
        "--jit_compile=auto,true",
        "--lowerings=native,diagonal:2,diagonal:16,shifted",
        f"--out={tmp_path}/out.json",
    )
    assert code == 0, errors
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    if BACKEND != "jax":  # There both mean the same.
        other = [row for row in rows if row["compiled"]]
        rows = [row for row in rows if not row["compiled"]]
        if BACKEND == "torch":
            for row in other:
                check_failed(row, "Expected jit_compile=false on PyTorch")
    assert [row["shape"] for row in rows] == ["8x8x8_k3_s1"] * 4 + ["8x8x64_k3_s1_b16"] * 4
    assert [row["batch"] for row in rows] == [1] * 4 + [16] * 4
    sets = {}
    for row in rows:
        parts = {
            "native": 1,
            "diagonal:2": row["channels"] // 2,
            "diagonal:16": -(-row["channels"] // 16),
            "shifted": 9,
        }[row["lowering"]]
        if BACKEND != "torch" and parts > 8:
            check_failed(row, "skipped", "--max_parts=8")
            continue
        check_measured(row)
        assert row["agrees"] is True
        assert row["operations"] == 2 * row["sets"]
        assert row["overhead"] > 0
        assert row["past_caches"] == (row["sets"] * row["least_bytes"] >= 2**20)
        sets[row["shape"], row["lowering"]] = row["sets"]
    if BACKEND != "torch":
        # 16 at most, and so many that they and their results take 1 MiB.
        assert sets == {
            ("8x8x8_k3_s1", "native"): 8,
            ("8x8x8_k3_s1", "diagonal:2"): 2,
            ("8x8x8_k3_s1", "diagonal:16"): 8,
            ("8x8x64_k3_s1_b16", "native"): 2,
            ("8x8x64_k3_s1_b16", "diagonal:16"): 2,
        }
    assert {row["past_caches"] for row in rows if row["median"]} == {False, True}


def test_shapes_of_a_model_and_spent_budgets(tmp_path):
    code, output, errors = run(
        "benchmark_lowerings.py",
        "--shapes=mobilenet_v2_cifar@32,mobilenet_v1_cifar@32:3x3:b3:top2",
        "--batch_size=1",
        "--rounds=1",
        "--passes=input_gradient",
        "--lowerings=native",
        "--budget_seconds=0.001",
        f"--out={tmp_path}/out.csv",
    )
    assert code == 0, errors
    first, *lines = (tmp_path / "out.csv").read_text().splitlines()
    check_environment(json.loads(first.removeprefix("# ")), "benchmark_lowerings.py")
    rows = list(csv.DictReader(lines))
    *second, one, two = rows
    uses = [json.loads(row["used_by"])["mobilenet_v2_cifar@32"] for row in second]
    # MobileNetV2 has 17 blocks, each with one depthwise convolution.
    assert sum(uses) == 17
    work = [n * int(row["least_bytes"]) for n, row in zip(uses, second, strict=True)]
    assert work == sorted(work, reverse=True)
    assert [row["shape"] for row in (one, two)] == [
        "4x4x512_k3_s1_b3",
        "33x33x64_k3_s2_valid_b3",
    ]
    assert len({row["shape"] for row in rows}) == len(rows)
    # Measuring the ceilings has taken all the time.
    assert {row["error"] for row in rows} == {"no time left"}


def test_training_steps(tmp_path):
    code, output, errors = run(
        "benchmark_training.py",
        "--models=Tiny",
        "--size=32",
        "--batch_size=2,3",
        "--rounds=2",
        "--steps_per_sample=2",
        "--precision=float32,tf32",
        "--budget_seconds=1",
        "--variants=default,stock,floor,diagonal_grouped:7,tuned",
        f"--plan={write_plan(tmp_path)}",
        f"--out={tmp_path}/out.json",
        f"--pictures={tmp_path}",
    )
    assert code == 0, errors
    results = json.loads((tmp_path / "out.json").read_text())
    check_environment(results["environment"], "benchmark_training.py")
    rows = {(r["precision"], r["batch_size"], r["variant"]): r for r in results["rows"]}
    # Compiled as Keras does by itself, stock is the default.
    variants = ("stock", "floor", "diagonal_grouped:7", "tuned")
    assert set(rows) == set(itertools.product(("float32", "tf32"), (2, 3), variants))
    for (precision, batch_size, variant), row in rows.items():
        if precision == "tf32":
            check_failed(row, "NVIDIA GPU")
        elif batch_size == 3:
            # First steps are always finished, and these have taken all the time.
            check_failed(row, "no time left")
        elif variant == "diagonal_grouped:7":
            check_failed(row, "none can be rewritten")
        else:
            check_measured(row)
            assert row["layers"] == 2
            assert row["rewritten"] == {"stock": 0, "floor": 2, "tuned": 1}[variant]
            assert row["images_per_second"] == pytest.approx(2 / row["median"])
            assert row["over_default"] == row["over_stock"]
            assert row["first_step"] > 0
            assert row["peak_memory"] is None
    losses = [rows["float32", 2, variant]["first_loss"] for variant in ("stock", "tuned")]
    # PyTorch's dropout draws from one generator for all models.
    assert BACKEND == "torch" or losses[0] == pytest.approx(losses[1], rel=1e-4)
    suffix = "_compiled" if BACKEND == "jax" else ""
    assert [path.stem for path in tmp_path.glob("*.png")] == [f"training_float32_2{suffix}"]


def test_minimal_effort(tmp_path):
    code, output, errors = run(
        "benchmark_minimal_effort.py",
        "--units=16,32",
        "--batch_size=4",
        "--rounds=2",
        "--max_step_units=16",
        f"--out={tmp_path}/out.json",
    )
    assert code == 0, errors
    results = json.loads((tmp_path / "out.json").read_text())
    check_environment(results["environment"], "benchmark_minimal_effort.py")
    rows = {(row["pass_name"], row["units"], row["form"]): row for row in results["rows"]}
    forms = ("ordinary", "per example", "unified", "unified, compact", "zeros")
    assert set(rows) == {
        *itertools.product(("backward",), (16, 32), forms),
        *itertools.product(("step",), (16, 32), forms[:3]),
    }
    for (pass_name, units, form), row in rows.items():
        assert row["kept"] == (units if form == "ordinary" else units // 16)
        if pass_name == "step" and units == 32:
            check_failed(row, "at most 16 units")
        else:
            check_measured(row)
            assert row["speed"] > 0
    assert "unified, compact" in output


@pytest.mark.backends("tensorflow")
def test_what_is_compiled_is_compared_with_what_users_have(tmp_path):
    """On a CPU, Keras by itself does not compile."""
    code, _, errors = run(
        "benchmark_training.py",
        "--models=Tiny",
        "--size=32",
        "--batch_size=2",
        "--rounds=2",
        "--jit_compile=true",
        "--variants=default,stock",
        f"--out={tmp_path}/out.json",
    )
    assert code == 0, errors
    default, stock = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (default["variant"], default["over_default"]) == ("default", 1)
    assert stock["over_default"] == pytest.approx(stock["median"] / default["median"])
    assert stock["over_stock"] == 1
    assert default["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-4)


def write_plan(folder):
    from diagconv_tf import Conditions, Plan

    path = folder / "Tiny.json"
    Plan(Conditions.current(), overrides={"dw_1": "shifted"}).save(path)
    # The script fills in the name.
    return folder / "{model}.json"


def test_layers_of_bits(tmp_path):
    code, output, errors = run(
        "benchmark_bits.py",
        "--shapes=5x4x33_k3_f3,40_u3",
        "--bits=1/2,4/4",
        "--batch_size=2",
        "--jit_compile=auto,true" if BACKEND == "tensorflow" else "--jit_compile=auto",
        "--rounds=2",
        f"--out={tmp_path}/out.json",
    )
    assert code == 0, errors
    results = json.loads((tmp_path / "out.json").read_text())
    check_environment(results["environment"], "benchmark_bits.py")
    layers = {"auto": ("default", "1/2", "4/4"), "true": ("default", "float", "1/2", "4/4")}
    found = [(row["shape"], row["jit_compile"], row["layer"]) for row in results["rows"]]
    assert found == [
        (shape, jit_compile, layer)
        for jit_compile in (("auto", "true") if BACKEND == "tensorflow" else ("auto",))
        for shape in ("5x4x33_k3_f3", "40_u3")
        for layer in layers[jit_compile]
    ]
    for row in results["rows"]:
        assert row["error"] is None
        check_measured(row)
        taps, inputs = (9, 33) if "k3" in row["shape"] else (1, 40)
        if "/" in row["layer"]:
            assert row["relative_error"] < 1e-5
            # Two words of 32 channels for each bit; the sums and a scale.
            bits = int(row["layer"][0])
            assert row["kernel_bytes"] == taps * 3 * (2 * bits + 1) * 4 + 4
        else:
            assert row["kernel_bytes"] == taps * inputs * 3 * 4
    assert "4/4" in output


def test_runs_of_several_seeds_are_collected(tmp_path):
    for seed, accuracies in enumerate(((0.5, 0.25), (1.0, 0.875))):
        folder = tmp_path / f"run_{seed}"
        folder.mkdir()
        settings = {"name": folder.name, "seed": seed, "epochs": 3}
        (folder / "config.json").write_text(json.dumps(settings))
        variants = [
            {"variant": name, "test_accuracy": accuracy, "bits": [bits, 32, 32]}
            for name, accuracy, bits in zip(("stock", "r"), accuracies, (32, 1), strict=True)
        ]
        variants[1]["simplified"] = {"units": [[4, seed]]}
        report = {"environment": {"keras": "Keras"}, "variants": variants}
        (folder / "report.json").write_text(json.dumps(report))
    runs = f"--runs={tmp_path}/run_0,{tmp_path}/run_1"
    code, output, errors = run("collect_runs.py", runs, f"--out={tmp_path}/out.json")
    assert code == 0, errors
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["environment"]["seeds"] == [0, 1]
    assert results["environment"]["settings"] == {"epochs": 3}
    first, second = results["rows"]
    assert (first["test_accuracies"], first["mean"]) == ([50.0, 100.0], 75.0)
    assert (second["mean"], second["over_first"]) == (56.25, -18.75)
    assert "simplified" not in first
    assert second["simplified"] == [{"units": [[4, 0]]}, {"units": [[4, 1]]}]
    assert "-18.75" in output
    (tmp_path / "run_1" / "config.json").write_text(json.dumps({**settings, "epochs": 4}))
    code, output, errors = run("collect_runs.py", runs)
    assert code == 1
    assert "differ in their seed, and in nothing else" in output + errors


def test_mistakes_are_refused_at_once():
    code, output, errors = run("benchmark_training.py", "--variants=tuned")
    assert code == 1
    assert "Expected --plan=FILE" in output + errors
