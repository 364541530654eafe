"""Run as a script: compiles passes for an H100, and prints as JSON what came out.

Standard input: names → attributes of workloads. Compiling for a GPU is set up before
JAX is imported, so that this is a process of its own; test_predict_gpu.py says what
the findings must be.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

from gpu_prediction import process

DUMP = process.prepare()

from gpu_prediction import programs  # noqa: E402 - they import JAX.
from gpu_prediction.cards import CARDS  # noqa: E402
from gpu_prediction.compiler import Compiler  # noqa: E402
from gpu_prediction.machine_code import Tools  # noqa: E402
from gpu_prediction.rows import PassRow, fill_pass  # noqa: E402

from diagconv_tf import Conditions, ConvSpec  # noqa: E402
from diagconv_tf.auto import choose  # noqa: E402
from diagconv_tf.lowerings import parse  # noqa: E402
from diagconv_tf.spec import PASSES, STOCK  # noqa: E402


def default_lowering(spec):
    """What `choose` picks on a GPU."""
    return choose(spec, Conditions("jax", "gpu", CARDS["h100"].name, True, ())).lowering


def find(specs):
    # No tools: the laws are about what XLA makes, and machine code takes most of the time.
    compiler = Compiler(CARDS["h100"], DUMP, Tools(None, None))
    found = {}
    for name, spec in specs.items():
        for lowering in dict.fromkeys(("shifted", default_lowering(spec))):
            for pass_name in PASSES:
                choice = None if lowering == STOCK else parse(lowering)
                program = programs.compile_pass(compiler, spec, choice, pass_name, 1.0)
                row = PassRow(
                    "h100", name, {}, 64, pass_name, "", "", lowering, 0, spec.least_bytes()
                )
                row = fill_pass(row, program)
                facts = {
                    "heavy": row.heavy_kernels,
                    "bytes_over_least": row.bytes_over_least,
                    "loads": row.loads,
                    "copies": row.copies,
                }
                found[f"{lowering}, {pass_name}, {name}"] = facts
                if lowering == default_lowering(spec):
                    found[f"default, {pass_name}, {name}"] = facts
    return found


if __name__ == "__main__":
    specs = {name: ConvSpec.from_dict(fields) for name, fields in json.load(sys.stdin).items()}
    print("\n" + json.dumps(find(specs)))
