"""Run as a script: compiles kernels of "fused" for an H100, prints as JSON what came out.

Compilers for GPUs are set up before a framework starts, so that this is a process of its
own; test_fused.py says what the findings must be.
"""

import functools
import json
import math
import os
import pathlib
import re
import sys
import tempfile

from diagconv_tf import ConvSpec
from diagconv_tf.backends import depthwise_tiling as tiling

BACKEND = os.environ["KERAS_BACKEND"]

# One shape for each pass: they share most of their code.
SPECS = {
    "forward": ConvSpec(64, 56, 56, 144, padding="same"),
    "input_gradient": ConvSpec(64, 57, 57, 128, strides=(2, 2)),
    "kernel_gradient": ConvSpec(64, 56, 56, 128, padding="same"),
}

#: An H100 as XLA describes it (NVIDIA H100 Tensor Core GPU Architecture, table 3).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352000000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def facts_of(ptx):
    """What PTX text says of a kernel's instructions."""
    loads = re.findall(r"ld\.global\S*", ptx)
    return {
        "vector_loads": sum(".v4." in load for load in loads),
        "other_loads": sum(".v4." not in load for load in loads),
        "local_memory": len(re.findall(r"(?:ld|st)\.local", ptx)),
        "fused_multiply_adds": len(re.findall(r"fma\.rn\.f32", ptx)),
        "multiplications": len(re.findall(r"mul(?:\.rn)?\.f32", ptx)),
    }


def bytes_of(shapes):
    """Bytes of all the arrays in a shape as HLO writes it."""
    total = 0
    for dtype, sizes in re.findall(r"\b(f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]", shapes):
        width = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}[dtype]
        total += width * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def bytes_of_kernels(hlo):
    """Bytes that each kernel of a program reads and writes: its operands and results."""
    entry = hlo[hlo.index("\nENTRY") :]
    shapes, found = {}, []
    for name, shape, kind, operands in re.findall(
        r"%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", entry
    ):
        shapes[name] = shape
        if kind not in ("parameter", "bitcast", "tuple", "get-tuple-element", "constant"):
            read = sum(bytes_of(shapes[o]) for o in re.findall(r"%([\w.-]+)", operands))
            found.append(bytes_of(shape) + read)
    return found


def find_in_jax(dump):
    import jax
    from jax.experimental import topologies

    from diagconv_tf.lowerings import Fused

    # A program from the cache is not dumped.
    jax.config.update("jax_enable_compilation_cache", False)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=H100
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    fused, found = Fused(), {}
    for name, spec in SPECS.items():
        x, k, g = (
            jax.ShapeDtypeStruct(shape, spec.compute_dtype, sharding=sharding)
            for shape in (spec.input_shape, spec.kernel_shape, spec.output_shape)
        )
        function, *arguments = {
            "forward": (fused.forward, x, k),
            "input_gradient": (
                functools.partial(fused.input_gradient, input_shape=spec.input_shape),
                g,
                k,
            ),
            "kernel_gradient": (fused.kernel_gradient, x, g),
        }[name]
        function = jax.jit(functools.partial(function, spec))
        for path in dump.iterdir():
            path.unlink()
        moved = bytes_of_kernels(function.lower(*arguments).compile().as_text())
        texts = [path.read_text() for path in dump.glob("*.ptx")]
        (ptx,) = [text for text in texts if "depthwise" in text]
        found[name] = {
            **facts_of(ptx),
            "heavy_kernels": sum(size > 0.05 * spec.least_bytes() for size in moved),
            "bytes_over_least": sum(moved) / spec.least_bytes(),
        }
    return found


def find_in_torch():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diagconv_tf.backends import triton_depthwise as kernels

    found = {}
    for name, spec in SPECS.items():
        problem = getattr(tiling, name)(spec, (spec.height, spec.width))
        kernel, types = kernels._correlate_tile, ["*fp32"] * 3
        if name == "kernel_gradient":
            kernel, types = kernels._sum_products, ["*fp32"] * 3 + ["i32"] * 2
        source = ASTSource(
            kernel,
            dict(zip(kernel.arg_names, [*types, "constexpr"], strict=True)),
            constexprs={"problem": problem},
            # As of every tensor that PyTorch allocates.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": problem.tile.warps}
        )
        found[name] = facts_of(compiled.asm["ptx"])
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if BACKEND == "jax":
            # Read when the compiler starts, with the first program.
            os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"
            found = find_in_jax(pathlib.Path(folder))
        else:
            os.environ["TRITON_CACHE_DIR"] = folder
            found = find_in_torch()
    sys.stdout.write("\n" + json.dumps(found) + "\n")
