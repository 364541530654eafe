"""What the package needs to be installed, and what it declares."""

import ast
import configparser
import pathlib
import re
import sys

import pytest

pytestmark = pytest.mark.backends("tensorflow")

ROOT = pathlib.Path(__file__).parent.parent

#: distribution → its name in imports, where it is another
IMPORT_NAMES = {"absl-py": "absl", "ai-edge-litert": "ai_edge_litert"}

#: What only one of Keras's backends or a format of `export` needs.
ON_DEMAND = {"ai_edge_litert", "jax", "onnx", "onnxruntime", "tensorflow", "tf2onnx", "torch"}

#: What PyTorch's builds for GPUs bring, and others do not need.
WITH_TORCH = {"triton"}

#: Modules of kernels in `backends` → what they are written in. The others are named so.
KERNELS = {"pallas_depthwise": {"jax"}, "triton_depthwise": {"torch", "triton"}}


def _declared(section, key):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config[section][key].strip().splitlines()
    names = [re.match(r"[\w-]+", line)[0] for line in lines if not line.startswith("#")]
    return {IMPORT_NAMES.get(name, name) for name in names}


def _imported(path, at_module_level=False):
    """The packages that a file imports, but for the standard library's and its own."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"diagconv_tf", "diagconv_cli"}


PACKAGE = sorted((ROOT / "diagconv_tf").rglob("*.py"))


def test_the_core_dependencies_are_what_the_package_imports():
    imported = set().union(*map(_imported, PACKAGE))
    assert imported - ON_DEMAND - WITH_TORCH == _declared("options", "install_requires")


def test_backends_are_imported_where_they_are_used():
    core = _declared("options", "install_requires")
    for path in PACKAGE:
        own = KERNELS.get(path.stem, {path.stem}) if path.parent.name == "backends" else set()
        assert _imported(path, at_module_level=True) <= core | own, path


def test_the_command_line_needs_the_standard_library_only():
    for path in (ROOT / "diagconv_cli").glob("*.py"):
        assert _imported(path) == set(), path


def test_what_is_imported_on_demand_has_an_extra():
    extras = ("tensorflow", "jax", "torch", "onnx", "litert")
    declared = set().union(*(_declared("options.extras_require", name) for name in extras))
    assert declared == ON_DEMAND


def test_the_extra_of_the_scripts_leaves_the_build_of_torch_to_the_user():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (everything,) = config["options.extras_require"]["all"].split()
    assert re.search(r"\btorch\b|\bcuda\b", everything) is None
