"""What `diagconv` answers before it imports a framework, and what stays off the screen."""

import json
import os
import re
import subprocess
import sys

import keras
import pytest
from keras import layers

from diagconv_cli.arguments import parser
from diagconv_tf import cli
from diagconv_tf.lowerings import parse
from diagconv_tf.tuning.cache import ENVIRONMENT_VARIABLE

one_backend = pytest.mark.backends("tensorflow")

HEAVY = ("absl", "diagconv_tf", "jax", "keras", "numpy", "rich", "tensorflow", "torch")

#: command line → exit code
LIGHT = {
    "": 2,
    "--help": 0,
    "--version": 0,
    "nonsense": 2,
    "inspect": 2,
    "inspect --help": 0,
    "inspect none.keras": 1,
    "inspect model.txt": 1,
    "inspect model.keras --batch_size=0": 2,
    "rewrite model.keras": 2,
    "rewrite --help": 0,
    "rewrite model.keras a.keras --lowering=diagonal:0": 2,
    "rewrite model.keras a.keras --lowering={": 2,
    "rewrite model.keras a.keras --plan=a --lowering=dense": 2,
    "rewrite none.keras a.keras": 1,
    "restore none.h5 a.keras": 1,
    "tune --help": 0,
    "tune model.keras --batch_size=2": 2,
    "tune none.keras --batch_size=2 --out=a.json": 1,
    "tune model.keras --batch_size=2 --out=a.json --budget_seconds=x": 2,
    "cache": 2,
    "export model.keras a --format=coreml": 2,
}

RUN_LIGHT = """
import json, sys, diagconv_cli
found = {}
for line in json.loads(sys.argv[1]):
    try:
        code = diagconv_cli.main(line.split())
    except SystemExit as exit:
        code = exit.code
    found[line] = [code, sorted({name.partition(".")[0] for name in sys.modules})]
print("\\n" + json.dumps(found))
"""


def python(*arguments, cwd=None, **environment):
    """Runs a fresh Python without a log level of TensorFlow."""
    kept = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**kept, "PYTHONPATH": root, **environment},
        check=True,
    )


@one_backend
def test_help_version_and_wrong_usage_import_no_framework(tmp_path):
    (tmp_path / "model.txt").write_text("not a model")
    (tmp_path / "model.keras").write_text("not a model")
    done = python("-c", RUN_LIGHT, json.dumps(list(LIGHT)), cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {line: code for line, (code, _) in found.items()} == LIGHT
    heavy = {line: set(HEAVY) & set(modules) for line, (_, modules) in found.items()}
    assert not any(heavy.values()), heavy
    assert "diagconv_tf 0." in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["model.keras", "model.txt"]


@one_backend
def test_python_runs_it_as_a_module():
    assert python("-m", "diagconv_cli", "--help").stdout.startswith("usage: diagconv ")


def _is_parsed(lowering):
    try:
        parse(lowering)
    except ValueError:
        return False
    return True


@one_backend
@pytest.mark.parametrize(
    "text",
    [
        *("native", "shifted", "fused", "dense", "diagonal", "diagonal:1", "diagonal:32"),
        *("diagonal_grouped:8", "diagonal_grouped", "diagonal:0", "diagonal:-1", "diagonal:08"),
        *("", "Native", "native ", "shifted:3", "fused:3", "dense:2", "stock", "nothing"),
        *("[]", "{", "{}"),
        '{"forward": "native", "input_gradient": "dense", "kernel_gradient": "shifted"}',
        '{"forward": "native", "input_gradient": "dense", "kernel_gradient": "nothing"}',
        '{"forward": "native", "input_gradient": "dense", "kernel_gradient": 3}',
        '{"forward": "native"}',
    ],
)
def test_the_command_line_takes_the_lowerings_that_layers_take(text, capsys):
    try:
        lowering = json.loads(text) if text.startswith("{") else text
    except ValueError:
        lowering = None
    arguments = ["rewrite", "a.keras", "b.keras", f"--lowering={text}"]
    if _is_parsed(lowering):
        assert parser().parse_args(arguments).lowering == lowering
    else:
        with pytest.raises(SystemExit):
            parser().parse_args(arguments)
        assert f"Received: {text}" in capsys.readouterr().err


@one_backend
def test_the_parser_and_the_commands_agree(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(cli._COMMANDS) == sorted(listed)
    for name in cli._COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            parser().parse_args([name, "--help"])
        assert f"examples:\n  diagconv {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser().parse_args(["tune", "--help"])
    assert ENVIRONMENT_VARIABLE in capsys.readouterr().out


#: What a library writes past `sys.stderr` while it is loaded: line → whether it is shown.
WRITTEN = {
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR": False,
    "I0000 00:00:1795616318.522882   16443 cudart_stub.cc:31] Could not find cuda drivers": False,
    "2024-01-02 03:04:05.678901: I tensorflow/core/util/port.cc:153] oneDNN custom": False,
    "To enable the following instructions: AVX2 FMA, in other operations, rebuild": False,
    "I am from another library": True,
    "Illegal instruction": True,
}


@one_backend
@pytest.mark.parametrize("level", [None, "0"])
def test_only_lines_of_tensorflows_log_are_dropped(tmp_path, level):
    lines = list(WRITTEN)
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        f"import os\nfor line in {lines!r}: os.write(2, line.encode() + b'\\n')\n"
    )
    code = (
        "from diagconv_cli.quiet import silence_tensorflow_log as f; f(); import sys; "
        f"sys.path.insert(0, {str(tmp_path)!r}); import tensorflow; "
        "print('afterwards', file=sys.stderr)"
    )
    environment = {} if level is None else {"TF_CPP_MIN_LOG_LEVEL": level}
    shown = python("-c", code, **environment).stderr.splitlines()
    wanted = [line for line in lines if WRITTEN[line] or level is not None]
    assert shown == [*wanted, "afterwards"]


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_no_line_about_drivers_reaches_the_screen(tmp_path):
    # With JAX, Keras imports TensorFlow when it serializes a model.
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, layers.DepthwiseConv2D(3)(inputs))
    model.save(tmp_path / "model.keras")
    done = python("-m", "diagconv_cli", "inspect", str(tmp_path / "model.keras"))
    assert "depthwise_conv2d" in done.stdout
    assert done.stderr == ""


WITHOUT_TENSORFLOW = """
import importlib.machinery, sys
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *arguments: (
    None if name == "tensorflow" else find_spec(name, *arguments)
)
import keras, numpy as np
import diagconv_tf
inputs = keras.Input((8, 8, 4))
x = keras.layers.DepthwiseConv2D(3, padding="same")(inputs)
model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
model.compile("sgd", "mse")
x, y = np.ones((2, 8, 8, 4), "float32"), np.ones((2, 4), "float32")
expected = model.predict(x, verbose=0)
assert len(diagconv_tf.inspect_model(model).rows) == 1
fast = diagconv_tf.rewrite(model, "diagonal:2")
np.testing.assert_allclose(fast.predict(x, verbose=0), expected, rtol=1e-5)
fast.fit(x, y, verbose=0, callbacks=[diagconv_tf.StepTimer()])
fast.save(sys.argv[1])
loaded = diagconv_tf.restore(keras.models.load_model(sys.argv[1]))
np.testing.assert_allclose(loaded.predict(x, verbose=0), fast.predict(x, verbose=0), rtol=1e-5)
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.backends("jax", "torch")
def test_the_package_works_where_tensorflow_is_not_installed(tmp_path):
    python("-c", WITHOUT_TENSORFLOW, str(tmp_path / "model.keras"), cwd=tmp_path)
