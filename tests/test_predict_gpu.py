"""What is read of code for GPUs, and the laws that code for GPUs keeps. Nothing runs on one."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from diagconv_tf import ConvSpec
from diagconv_tf.spec import PASSES

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from gpu_prediction import compiler, hlo, machine_code  # noqa: E402
from gpu_prediction.bounds import BANDWIDTH_SHARE, Program, bound_kernel, why_too_large  # noqa: E402
from gpu_prediction.cards import CARDS, find_card  # noqa: E402
from gpu_prediction.hlo import Kernel, read_kernels  # noqa: E402
from gpu_prediction.machine_code import Launch, Routine, Tools  # noqa: E402

pytestmark = pytest.mark.backends("tensorflow")


# HLO


def module(entry, *computations):
    """The text of a module with an entry computation of some lines."""
    lines = "\n".join(f"  {line}" for line in entry)
    return "\n".join(["HloModule jit_f, is_scheduled=true", "", *computations, "",
                      f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{lines}\n}}\n"])  # fmt: skip


def computation(name, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


X = "%x = f32[8,4]{1,0} parameter(0)"
K = "%k = f32[2,2]{1,0} parameter(1)"
ADD = computation(
    "fused_add",
    "%p.0 = f32[8,4]{1,0} parameter(0)",
    "%p.1 = f32[2,2]{1,0} parameter(1)",
    "%b = f32[8,4]{1,0} broadcast(%p.1), dimensions={}",
    "ROOT %add.1 = f32[8,4]{1,0} add(%p.0, %b)",
)
SLICES = computation(
    "fused_slice",
    "%p = f32[8,4]{1,0} parameter(0)",
    "%same = f32[32]{0} bitcast(%p)",
    "%a = f32[4]{0} slice(%same), slice={[0:4]}",
    "%b = f32[4]{0} slice(%same), slice={[8:12]}",
    "ROOT %sum = f32[4]{0} add(%a, %b)",
)
UPDATE = computation(
    "fused_update",
    "%p = f32[8,4]{1,0} parameter(0)",
    "%u = f32[1,4]{1,0} parameter(1)",
    "%i = s32[] parameter(2)",
    "%zero = s32[] constant(0)",
    "ROOT %new = f32[8,4]{1,0} dynamic-update-slice(%p, %u, %i, %zero)",
)
PAD = computation(
    "fused_pad",
    "%p = bf16[8,4]{1,0} parameter(0)",
    "%zero = bf16[] constant(0)",
    "ROOT %pad = bf16[10,4]{1,0} pad(%p, %zero), padding=1_1x0_0",
)
DOT = computation(
    "gemm_fusion_dot",
    "%a = f32[3,8,4]{2,1,0} parameter(0)",
    "%b = f32[3,4,5]{2,1,0} parameter(1)",
    "ROOT %dot = f32[3,8,5]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
    "rhs_batch_dims={0}, rhs_contracting_dims={1}",
)
CONV = (
    "custom-call(%g, %w), window={size=3x3}, dim_labels=b01f_o01i->b01f, "
    'feature_group_count=16, custom_call_target="__cudnn$'
)

#: name → (module, [(kind, bytes read, bytes written, FLOPs, moves only, times)])
MODULES = {
    "a fusion reads each operand once": (
        module([X, K, "ROOT %f = f32[8,4]{1,0} fusion(%x, %k), kind=kLoop, calls=%fused_add"], ADD),
        [("kLoop", 128 + 16, 128, 0, False, 1)],
    ),
    "of a sliced operand the slices": (
        module([X, "ROOT %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_slice"], SLICES),
        [("kLoop", 32, 16, 0, False, 1)],
    ),
    "an update in place": (
        module(
            [X, "%u = f32[1,4]{1,0} parameter(1)", "%i = s32[] parameter(2)",
             "ROOT %f = f32[8,4]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%fused_update"],
            UPDATE,
        ),
        [("kLoop", 16 + 4, 16, 0, True, 1)],
    ),
    "a pad that is written": (
        module(
            ["%x = bf16[8,4]{1,0} parameter(0)",
             "ROOT %f = bf16[10,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_pad"],
            PAD,
        ),
        [("kLoop", 64, 80, 0, True, 1)],
    ),
    "a copy, and what is free": (
        module(
            [X, "%b = f32[32]{0} bitcast(%x)", "%c = f32[32]{0} copy(%b)",
             "ROOT %t = (f32[32]{0}) tuple(%c)"]
        ),
        [("copy", 128, 128, 0, True, 1)],
    ),
    "several results": (
        module(
            [X, K, "%r = (f32[8]{0}, /*index=1*/f32[8]{0}) fusion(%x, %k), "
             "kind=kInput, calls=%fused_add",
             "ROOT %g = f32[8]{0} get-tuple-element(%r), index=1"],
            ADD,
        ),
        [("kInput", 128 + 16, 64, 0, False, 1)],
    ),
    # 2 * 9 taps * outputs; the workspace of bytes does not count.
    "a depthwise convolution of cuDNN": (
        module(
            ["%g = f32[2,6,6,16]{3,2,1,0} parameter(0)", "%w = f32[16,3,3,1]{3,2,1,0} parameter(1)",
             f'%c = (f32[2,4,4,16]{{3,2,1,0}}, u8[1024]{{0}}) {CONV}convForward"',
             "ROOT %y = f32[2,4,4,16]{3,2,1,0} get-tuple-element(%c), index=0"]
        ),
        [("__cudnn$convForward", 4 * (1152 + 144), 4 * 512, 2 * 9 * 512, False, 1)],
    ),
    "its kernel gradient": (
        module(
            ["%g = f32[2,6,6,16]{3,2,1,0} parameter(0)", "%w = f32[2,4,4,16]{3,2,1,0} parameter(1)",
             f'%c = (f32[16,3,3,1]{{3,2,1,0}}, u8[0]{{0}}) {CONV}convBackwardFilter"']
        ),
        [("__cudnn$convBackwardFilter", 4 * (1152 + 512), 4 * 144, 2 * 9 * 512, False, 1)],
    ),
    "the input gradient of a dense one": (
        module(
            ["%g = f32[2,4,4,16]{3,2,1,0} parameter(0)", "%w = f32[16,3,3,8]{3,2,1,0} parameter(1)",
             f'%c = (f32[2,6,6,8]{{3,2,1,0}}, u8[0]{{0}}) {CONV}convBackwardInput"']
        ),
        [("__cudnn$convBackwardInput", 4 * (512 + 1152), 4 * 576, 2 * 72 * 512, False, 1)],
    ),
    "a product of cuBLAS": (
        module(
            ["%a = f32[8,4]{1,0} parameter(0)", "%b = f32[4,5]{1,0} parameter(1)",
             "%c = (f32[8,5]{1,0}, s8[4194304]{0}) custom-call(%a, %b), "
             'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
             '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
             '"lhs_batch_dimensions":[]}}}']
        ),
        [("__cublas$gemm", 4 * (32 + 20), 4 * 40, 2 * 8 * 4 * 5, False, 1)],
    ),
    "a product of XLA's own, in a batch": (
        module(
            ["%a = f32[3,8,4]{2,1,0} parameter(0)", "%b = f32[3,4,5]{2,1,0} parameter(1)",
             "ROOT %f = f32[3,8,5]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot, "
             'backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}'],
            DOT,
        ),
        [("__triton_gemm", 4 * (96 + 60), 4 * 120, 2 * 3 * 8 * 4 * 5, False, 1)],
    ),
    "a loop": (
        module(
            [X, "%w = f32[8,4]{1,0} while(%x), condition=%until, body=%turn, "
             'backend_config={"known_trip_count":{"n":"7"}}'],
            computation("until", "ROOT %p = pred[] parameter(0)"),
            computation(
                "turn",
                "%p = f32[8,4]{1,0} parameter(0)",
                "ROOT %n = f32[8,4]{1,0} negate(%p)",
            ),
        ),
        [("negate", 128, 128, 0, False, 7)],
    ),
    "the larger branch": (
        module(
            [X, "ROOT %r = f32[8,4]{1,0} conditional(%x, %x, %x), "
             "branch_computations={%small, %large}"],
            computation("small", "ROOT %p = f32[8,4]{1,0} parameter(0)"),
            computation(
                "large", "%p = f32[8,4]{1,0} parameter(0)", "ROOT %e = f32[8,4]{1,0} copy(%p)"
            ),
        ),
        [("copy", 128, 128, 0, True, 1)],
    ),
    "a called computation": (
        module(
            [X, "ROOT %r = f32[8,4]{1,0} call(%x), to_apply=%command_buffer"],
            computation(
                "command_buffer",
                "%p = f32[8,4]{1,0} parameter(0)",
                "ROOT %e = f32[8,4]{1,0} exponential(%p)",
            ),
        ),
        [("exponential", 128, 128, 0, False, 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_kernels_of_a_module(name):
    text, expected = MODULES[name]
    found = [
        (k.kind, k.bytes_read, k.bytes_written, k.flops, k.moves_only, k.times)
        for k in read_kernels(text)
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("kind", "library"),
    [("__cudnn$convForward", "cudnn"), ("__cublas$lt$matmul", "gemm"), ("__triton_gemm", "gemm"),
     ("__triton", None), ("kLoop", None), ("copy", None)],
)  # fmt: skip
def test_whose_kernel_it_is(kind, library):
    assert Kernel("k", kind, 1, 1).library == library


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"Expected the text of an HLO module\. Received: 'abc'"):
        read_kernels("abc")


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [("f32[2,3]{1,0}", 24), ("bf16[5]{0}", 10), ("pred[]", 1), ("(f64[2]{0}, s32[])", 20),
     ("token[]", 0), ("f32[0,4]{1,0}", 0)],
)  # fmt: skip
def test_bytes_of_a_shape(shape, wanted):
    assert hlo.array_bytes(shape) == wanted


#: The least bytes of a pass, by hand: inputs, kernel and outputs, once each.
LEAST_BYTES = [
    (ConvSpec(64, 112, 112, 32, padding="same"), 4 * (2 * 64 * 112 * 112 * 32 + 9 * 32)),
    (
        ConvSpec(64, 57, 57, 128, strides=(2, 2), compute_dtype="bfloat16"),
        2 * (64 * 57 * 57 * 128 + 9 * 128 + 64 * 28 * 28 * 128),
    ),
    (
        ConvSpec(8, 14, 14, 384, kernel_size=(7, 7), padding="same"),
        4 * (2 * 8 * 14 * 14 * 384 + 49 * 384),
    ),
]


@pytest.mark.parametrize(("spec", "wanted"), LEAST_BYTES, ids=lambda v: getattr(v, "size_text", ""))
def test_least_bytes(spec, wanted):
    assert spec.least_bytes() == wanted


# Machine code

THUNKS = """\
001: kCustomKernel [source       | next=002 (1)] loop_add_fusion grid: [256, 2, 1] threads: [128, 1, 2]  shared_memory: 0 bytes
002: kConvolution  [prev=001 (1) | next=003 (1)] kConvolution
003: kCustomKernel [prev=002 (1) | sink        ] loop_add_fusion grid: [3, 1, 1] threads: [100, 1, 1]  shared_memory: 0 bytes
"""  # noqa: E501
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n'
    f"    thunk_id: {number}\n  }}\n}}\n"
    for number, name in enumerate(("fusion.1", "cudnn-conv.2", "fusion.7"), start=1)
)


def test_kernels_that_are_alike_are_launched_with_their_own_grids():
    assert machine_code.read_launches(THUNKS, METADATA) == {
        "fusion.1": Launch("loop_add_fusion", 512, 256),
        "fusion.7": Launch("loop_add_fusion", 3, 100),
    }
    assert Launch("k", 3, 100).warps == 12


PTX = """\
.visible .entry first(
\t.param .u64 .ptr .align 16 first_param_0
)
{
\tld.param.b64 \t%rd1, [first_param_0];
\tld.global.nc.v4.b32 \t{%r1, %r2, %r3, %r4}, [%rd1];
\tld.global.nc.L2::256B.v2.b16 \t{%rs1, %rs2}, [%rd1+16];
\tld.global.nc.b32 \t%r5, [%rd1+32];
\tld.global.b32 \t%r6, [%rd1+36];
\tst.global.v4.b32 \t[%rd1], {%r1, %r2, %r3, %r4};
\tret;
}
.visible .entry second(
)
{
\tld.global.nc.u16 \t%rs1, [%rd1];
\tret;
}
"""


def test_loads_of_ptx_by_width():
    found = machine_code.read_ptx(PTX)
    assert {name: dict(routine.loads) for name, routine in found.items()} == {
        "first": {16: 1, 4: 3},
        "second": {2: 1},
    }


HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"
SHARED = ".extern .shared .align 16 .b8 global_smem[];\n"


def test_modules_for_the_same_target_are_joined():
    first, second = (f".visible .entry {name}(\n)\n{{\n\tret;\n}}\n" for name in "ab")
    comment = "//\n// Generated by LLVM NVPTX Back-End\n//\n\n"
    other = HEADER.replace("sm_90a", "sm_90")
    texts = [comment + HEADER + SHARED + first, HEADER + SHARED + second, other + first, comment]
    assert machine_code.join_ptx(texts) == [HEADER + SHARED + first + second, other + first]


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    64 bytes stack frame, 48 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""


def test_registers_and_spills():
    found = machine_code.with_resources(machine_code.read_ptx(PTX), PTXAS)
    assert {n: (r.registers, r.spilled_bytes) for n, r in found.items()} == {
        "first": (255, 48),
        "second": (16, 0),
    }


SASS = """
//--------------------- .text.first     --------------------------
\t.section\t.text.first,"ax",@progbits
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
.L_x_0:
        /*0020*/                   LDG.E R8, [R2.64] ;
        /*0030*/              @!P0 LDG.E.U16.CONSTANT R9, [R2.64+0x2] ;
        /*0040*/                   ISETP.GE.AND P0, PT, R0, 0x4, PT ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/                   STG.E.128 [R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
        /*0090*/                   NOP;
.L_x_2:
"""


def test_instructions_and_loops():
    routine = machine_code.with_sass(machine_code.read_ptx(PTX), SASS)["first"]
    assert (routine.instructions, routine.instructions_in_loops) == (9, 4)
    assert (routine.loaded, routine.loaded_in_loops) == (16 + 4 + 2, 6)


@pytest.mark.parametrize(
    ("bytes_read", "wanted"), [(0, 9), (22, 9), (28, 9 + 4), (16 + 6 * 100, 9 + 4 * 99)]
)
def test_a_loop_turns_until_all_is_read(bytes_read, wanted):
    routine = machine_code.with_sass(machine_code.read_ptx(PTX), SASS)["first"]
    assert routine.instructions_for(bytes_read) == wanted


def test_unknown_instructions_stay_unknown():
    assert Routine({4: 1}).instructions_for(100) is None


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        (Tools(None, None), ["ptxas", "registers", "instruction-issue", "[predict]"]),
        (Tools("ptxas", None), ["nvdisasm", "instruction-issue", "[predict]"]),
    ],
)
def test_missing_tools_are_named(tools, words):
    for word in words:
        assert word in tools.missing()
    assert "\n" not in tools.missing()
    assert Tools("ptxas", "nvdisasm").missing() is None


# Cards and bounds


def test_cards_are_as_published():
    """Peaks that the makers publish follow from the figures of which they are products."""
    h100, a100, l4, rtx = (CARDS[name] for name in ("h100", "a100", "l4", "rtx4090"))
    for card, published in ((h100, 66.9e12), (a100, 19.5e12), (l4, 30.3e12), (rtx, 82.6e12)):
        assert card.flops_per_second("float32", tf32=False) == pytest.approx(published, rel=0.01)
    assert h100.flops_per_second("bfloat16", tf32=False) == 989.4e12
    assert h100.flops_per_second("float32", tf32=True) == 494.7e12
    assert h100.instructions_per_second == 132 * 4 * 1.98e9
    assert CARDS["h200"].bytes_per_second / h100.bytes_per_second == pytest.approx(1.43, rel=0.01)


@pytest.mark.parametrize("name", CARDS)
def test_only_later_cards_have_features_of_their_own(name):
    card = CARDS[name]
    own = card.compute_capability >= (9, 0)
    assert ("feature_extension" in card.target()) == own
    assert card.architecture.endswith("a") == own
    assert f'name: "{card.name}"' in card.target()
    assert card.target().count("{") == card.target().count("}")


@pytest.mark.parametrize("name", ["h100", "H100", "RTX 4090", "rtx-4090", "rtx_4090"])
def test_cards_by_name(name):
    assert find_card(name).compute_capability in ((9, 0), (8, 9))


def test_an_unknown_card_lists_those_that_are_known():
    wanted = "Expected --cards to be some of h100, h200, a100, l4, rtx4090. Received: mi300"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        find_card("mi300")


H100 = CARDS["h100"]
LAUNCH = Launch("k", 1, 32)
ROUTINE = Routine({4: 1}, 32, 0, instructions=1000)


@pytest.mark.parametrize(
    ("kernel", "launch", "routine", "wanted"),
    [
        # 0.9 * 3.352 GB take a millisecond.
        (Kernel("k", "kLoop", 3_000_000_000, 16_800_000), None, None, 1e-3),
        # 1000 instructions of as many warps as are issued a clock, for 1980 clocks.
        (Kernel("k", "kLoop", 8, 8), Launch("k", 132 * 1980, 128), ROUTINE, 1e-3),
        # A cuDNN call at 494.7 TFLOP/s.
        (Kernel("k", "__cudnn$convForward", 8, 8, flops=494_700_000_000), None, None, 1e-3),
    ],
    ids=["memory", "issue", "arithmetic"],
)
def test_the_bound_of_a_kernel(kernel, launch, routine, wanted):
    assert BANDWIDTH_SHARE == 0.9
    bound = bound_kernel(kernel, launch, routine, H100, 494.7e12)
    assert bound.seconds == pytest.approx(wanted, rel=1e-6)
    assert bound.seconds == max(bound.memory, bound.issue or 0, bound.arithmetic)


def test_heavy_kernels_move_more_than_a_twentieth():
    some = [Kernel("a", "kLoop", 100, 0), Kernel("b", "kLoop", 26, 25), Kernel("c", "kLoop", 50, 0)]
    program = Program([bound_kernel(k, None, None, H100, 1.0) for k in some], 0)
    assert [k.kernel.name for k in program.heavy(1000)] == ["a", "b"]


def test_a_program_that_does_not_fit():
    assert why_too_large(Program([], 24 * 2**30), CARDS["l4"]) is None
    assert why_too_large(Program([], 31 * 10**9), CARDS["l4"]) == (
        "Expected a program that fits into the 25.8 GB of NVIDIA L4. Received: one of 31.0 GB"
    )


def test_rows_sum_over_launches():
    from gpu_prediction.rows import PassRow, StepRow, fill_pass, fill_step

    heavy = Kernel("a", "kLoop", 600, 400, times=3)
    call = Kernel("b", "__cudnn$convForward", 1000, 0, flops=10)
    copy = Kernel("c", "copy", 500, 500, moves_only=True)
    kernels = [
        bound_kernel(
            heavy, Launch("a", 1, 32), Routine({16: 2}, 40, 8, instructions=5), H100, 1e12
        ),
        bound_kernel(call, None, None, H100, 1e12),
        bound_kernel(copy, Launch("c", 1, 32), Routine({4: 1}, 10, 0, instructions=5), H100, 1e12),
    ]
    program = Program(kernels, 77)
    row = fill_pass(
        PassRow("h100", "s", {}, 1, "forward", "default", "", "native", 0, 2500), program
    )
    assert (row.kernels, row.heavy_kernels, row.copies) == (5, 5, 1)
    assert row.calls == {"__cudnn$convForward": 1}
    assert (row.moved_bytes, row.bytes_over_least) == (5000, 2.0)
    assert (row.registers, row.spilled_bytes, row.loads) == (40, 8, {16: 2})
    assert row.program_bytes == 77
    seconds = sum(k.seconds * k.kernel.times for k in kernels)
    assert row.least_seconds == pytest.approx(seconds)

    step = fill_step(StepRow("h100", "M", 224, 1, "default", "stock"), program)
    assert {n: (s.kernels, s.moved_bytes) for n, s in step.shares.items()} == {
        "xla": (4, 4000),
        "cudnn": (1, 1000),
        "gemm": (0, 0),
    }
    assert step.least_seconds == pytest.approx(seconds)
    assert step.spilling_kernels == 1


def test_a_model_is_summed_where_all_its_layers_are_known():
    from gpu_prediction import report
    from gpu_prediction.rows import PassRow

    def row(shape, used_by, **values):
        fields = {"kernels": 2, "moved_bytes": 300, "least_seconds": 1e-6, **values}
        return PassRow(
            "h100",
            shape,
            used_by,
            8,
            "forward",
            "default",
            "channels_last",
            "native",
            0,
            100,
            **fields,
        )

    rows = [row("a", {"A@32": 3, "B@32": 1}), row("b", {"A@32": 1}, moved_bytes=100)]
    (found,) = report.by_model(rows, {"A@32": 4, "B@32": 2})
    assert (found.model, found.layers, found.kernels) == ("A@32", 4, 8)
    assert found.bytes_over_least == (3 * 300 + 100) / 400
    assert found.least_seconds == pytest.approx(4e-6)
    assert report.by_model([*rows, row("c", {"A@32": 1}, error="no")], {"A@32": 5, "B@32": 2}) == []


def test_an_issue_time_is_not_given_where_a_part_is_unknown():
    from gpu_prediction.rows import PassRow, fill_pass

    known = bound_kernel(Kernel("a", "kLoop", 8, 8), LAUNCH, ROUTINE, H100, 1.0)
    unknown = bound_kernel(Kernel("b", "kLoop", 8, 8), None, None, H100, 1.0)
    row = PassRow("h100", "s", {}, 1, "forward", "default", "", "native", 0, 16)
    copy = bound_kernel(Kernel("c", "copy", 8, 8, moves_only=True), None, None, H100, 1.0)
    assert fill_pass(row, Program([known, copy], 0)).issue_seconds == known.issue
    assert fill_pass(row, Program([known, unknown], 0)).issue_seconds is None


# The command

#: Runs the script on several command lines in one process, as if JAX had no plugin.
RUN = """
import json, runpy, sys
from absl import app, flags

found = {}
sys.path.insert(0, "scripts")
sys.argv = ["scripts/predict_gpu.py"]
script = runpy.run_path(sys.argv[0], run_name="predict_gpu")
from gpu_prediction import compiler
compiler._is_installed = lambda module: False
for line in json.loads(sys.stdin.read()):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["predict_gpu", *line.split()])
    try:
        script["main"]([])
    except (app.UsageError, SystemExit) as error:
        found[line] = str(error)

from diagconv_tf import ConvSpec
from gpu_prediction import bounds, cards, programs

def fail(*arguments):
    raise RuntimeError("UNIMPLEMENTED: no such convolution\\nand much more")

l4 = cards.CARDS["l4"]
for name, compile_pass in (
    ("fails", fail),
    ("large", lambda *arguments: bounds.Program([], 31 * 10**9)),
):
    programs.compile_pass = compile_pass
    spec = ConvSpec(2, 8, 8, 4)
    predictor = script["Predictor"]("l4", l4, None, [])
    row = predictor.predict_pass(spec, "shifted", "forward", "default")
    found[name] = [row.shape, row.error]
row = predictor.predict_pass(spec, "diagonal_grouped:3", "forward", "default")
found["refused"] = [row.shape, row.error]
print("\\n" + json.dumps(found))
"""

#: flags → the whole message
MESSAGES = {
    "--cards=h100,mi300": (
        "Expected --cards to be some of h100, h200, a100, l4, rtx4090. Received: mi300"
    ),
    "--out=a.csv": "Expected a file name that ends in .json. Received: a.csv",
    "--precision=int8": (
        "Expected --precision to be some of default, float32, tf32, bfloat16, float16. "
        "Received: int8"
    ),
    "--passes=backward": (
        "Expected --passes to be some of forward, input_gradient, kernel_gradient. "
        "Received: backward"
    ),
    "--layouts=NHWC": (
        "Expected --layouts to be some of channels_last, channels_first. Received: NHWC"
    ),
    "--models=Nonsense": "Expected names of keras.applications. Received: --models=['Nonsense']",
    "--shapes=0x0": re.compile(r"Expected --shapes to be all, main, NAME@SIZE .*Received: 0x0"),
    "--lowerings=winograd": re.compile(r"Expected `lowering` to be .*Received: .*winograd.*"),
    "--shapes=8x8x8_k3_s1": (
        "Expected JAX's CUDA plugin, which compiles without a GPU: "
        "pip install 'diagconv-tf[predict]'. Received: none"
    ),
}


def run_script(code, **arguments):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        **arguments,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def messages():
    return run_script(["-c", RUN], input=json.dumps(list(MESSAGES)))


@pytest.mark.slow
@pytest.mark.xdist_group("messages of predict_gpu")
def test_wrong_input_is_one_clear_line(messages):
    for line, wanted in MESSAGES.items():
        if isinstance(wanted, re.Pattern):
            assert wanted.fullmatch(messages[line]), line
        else:
            assert messages[line] == wanted


@pytest.mark.slow
@pytest.mark.xdist_group("messages of predict_gpu")
def test_what_cannot_be_compiled_is_a_row_with_its_error(messages):
    assert messages["fails"] == [
        "8x8x4_k3_s1_valid",
        "RuntimeError: UNIMPLEMENTED: no such convolution",
    ]
    assert messages["large"][1] == (
        "Expected a program that fits into the 25.8 GB of NVIDIA L4. Received: one of 31.0 GB"
    )
    assert messages["refused"][1].startswith("refused: ")


# Laws of what is compiled. A change that breaks a fusion fails here, not on a GPU.

SPECS = {
    "3x3": ConvSpec(64, 56, 56, 128, padding="same"),
    "3x3 bfloat16": ConvSpec(64, 56, 56, 128, padding="same", compute_dtype="bfloat16"),
    "3x3 stride 2": ConvSpec(64, 57, 57, 128, strides=(2, 2)),
    "7x7": ConvSpec(64, 14, 14, 384, kernel_size=(7, 7), padding="same"),
}


def law(test):
    """Marks a test of `compiled`: one process compiles for all, where it can."""
    reason = compiler.why_not_here()
    for mark in (
        pytest.mark.slow,
        pytest.mark.xdist_group("code for GPUs"),
        pytest.mark.skipif(reason is not None, reason=str(reason)),
    ):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def compiled():
    """`"lowering, pass, name of the workload"` → facts."""
    specs = {name: dataclasses.asdict(spec) for name, spec in SPECS.items()}
    return run_script(["tests/compiled_for_gpu.py"], input=json.dumps(specs))


@law
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("pass_name", ["forward", "input_gradient"])
def test_shifted_reads_and_writes_once(compiled, pass_name, name):
    facts = compiled[f"shifted, {pass_name}, {name}"]
    assert facts["heavy"] == 1
    assert facts["bytes_over_least"] <= 1.05


@law
@pytest.mark.parametrize(
    ("name", "most"),
    [("3x3", 1.7), ("3x3 bfloat16", 2.3), ("3x3 stride 2", 1.7), ("7x7", 3.0)],
)
def test_the_kernel_gradient_of_shifted_reads_few_times(compiled, name, most):
    facts = compiled[f"shifted, kernel_gradient, {name}"]
    assert facts["heavy"] <= 4
    assert facts["bytes_over_least"] <= most


@law
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("pass_name", ["forward", "input_gradient"])
def test_shifted_loads_four_channels_at_once(compiled, pass_name, name):
    """But for some indices. (In the kernel gradient a thread sums a single channel.)"""
    loads = compiled[f"shifted, {pass_name}, {name}"]["loads"]
    element = 2 if "bfloat16" in name else 4
    assert loads.get(str(4 * element), 0) >= max(loads.get(str(element), 0), 1)


@law
@pytest.mark.parametrize(
    ("pass_name", "name"),
    list(itertools.product(PASSES, SPECS)),
)
def test_the_default_copies_nothing(compiled, pass_name, name):
    """No kernel of what `choose` picks does nothing but move an input or a gradient."""
    assert compiled[f"default, {pass_name}, {name}"]["copies"] == 0
