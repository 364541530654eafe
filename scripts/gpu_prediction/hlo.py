"""Reads what XLA will launch from the text of an optimised HLO module.

After XLA's last pass, every instruction of the entry computation that is not free is
one launch: a fusion is a kernel that XLA writes, a custom call one of a library.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    "c128": 16,
}

#: They launch nothing.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}

#: What moves elements, or changes their dtype, and computes nothing.
_MOVES = _FREE | {
    "broadcast",
    "concatenate",
    "convert",
    "copy",
    "dynamic-slice",
    "dynamic-update-slice",
    "gather",
    "iota",
    "pad",
    "reshape",
    "reverse",
    "slice",
    "transpose",
}

#: They read as much of their first operand as they give.
_PARTS = {"dynamic-slice", "gather", "slice"}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(?=,|\s*$)(.*)$"
)
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or several of the same in a loop.

    Attributes:
        name: of its HLO instruction.
        kind: `"kLoop"`, `"kInput"` and so on for a fusion, the target of a custom
            call, else the opcode.
        bytes_read: of its operands, each once; of a sliced one the slices.
        bytes_written: of its results, without a library's workspace.
        flops: multiplications and additions of a convolution or matrix product, 0 in
            other kernels.
        moves_only: whether it computes nothing but moves, or casts, its operands.
        times: how often a step launches it.
    """

    name: str
    kind: str
    bytes_read: int
    bytes_written: int
    flops: int = 0
    moves_only: bool = False
    times: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that one launch moves."""
        return self.bytes_read + self.bytes_written

    @property
    def library(self) -> str | None:
        """`"cudnn"` or `"gemm"`; None for a kernel that XLA writes."""
        if self.kind.startswith("__cudnn"):
            return "cudnn"
        if self.kind.startswith("__cublas") or "gemm" in self.kind:
            return "gemm"
        return None

    @property
    def is_written_by_xla(self) -> bool:
        """Whether it has code that can be read; a plain copy is the driver's."""
        return self.library is None and self.kind != "copy"


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # What stands in the parentheses.
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match and match[1]


_Computation = Sequence[_Instruction]


def read_kernels(text: str) -> list[Kernel]:
    """All launches of the entry computation, in the order of the schedule.

    A loop of unknown length counts as one turn; of a conditional, the branch that
    moves most.

    Args:
        text: `compiled.as_text()` of a module that is compiled for a GPU.

    Raises:
        ValueError: if there is no entry computation.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError(f"Expected the text of an HLO module. Received: {text[:60]!r}")
    return list(_launches(computations, computations[entry]))


def array_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape's text, e.g. `"(f32[2,3]{1,0}, u8[0]{0})"`: 24."""
    return sum(
        _BYTES.get(dtype, 0) * math.prod(_sizes(sizes)) for dtype, sizes in _ARRAY.findall(shape)
    )


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _parse(text: str) -> tuple[Mapping[str, _Computation], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, shape, opcode, inside, attributes = match.groups()
            operands = tuple(_OPERAND.findall(inside))
            current.append(
                _Instruction(name, shape, opcode, operands, inside, attributes, root is not None)
            )
    return computations, entry


def _launches(
    computations: Mapping[str, _Computation], computation: _Computation, times: int = 1
) -> Iterator[Kernel]:
    shapes = {instruction.name: instruction.shape for instruction in computation}
    for instruction in computation:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        if opcode == "while":
            turns = int(instruction.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1)
            for role in ("condition", "body"):
                called = computations[instruction.attribute(rf"\b{role}=%?([\w.\-]+)") or ""]
                yield from _launches(computations, called, times * turns)
        elif opcode == "conditional":
            branches = [
                list(_launches(computations, computations[name], times))
                for name in _branches(instruction)
            ]
            yield from max(branches, key=lambda some: sum(k.bytes * k.times for k in some))
        elif opcode == "call" or (opcode.endswith("-start") and "calls=" in instruction.attributes):
            called = instruction.attribute(r"\b(?:to_apply|calls)=%?([\w.\-]+)") or ""
            yield from _launches(computations, computations[called], times)
        else:
            yield _kernel(instruction, shapes, computations, times)


def _branches(conditional: _Instruction) -> list[str]:
    listed = conditional.attribute(r"branch_computations=\{([^}]*)\}")
    if listed is not None:
        return [name.strip().removeprefix("%") for name in listed.split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", conditional.attributes)


def _kernel(
    instruction: _Instruction,
    shapes: Mapping[str, str],
    computations: Mapping[str, _Computation],
    times: int,
) -> Kernel:
    operands = [shapes.get(name, "") for name in instruction.operands]
    body = computations.get(instruction.attribute(r"\bcalls=%?([\w.\-]+)") or "", ())
    kind = (
        instruction.attribute(r'custom_call_target="([^"]+)"')
        or instruction.attribute(r'"kind":"(__\w+)"')
        or instruction.attribute(r"\bkind=(\w+)")
        or instruction.opcode
    )
    opcodes = {inner.opcode for inner in body} or {instruction.opcode}
    return Kernel(
        name=instruction.name,
        kind=kind,
        bytes_read=_bytes_read(body, operands) if body else sum(map(array_bytes, operands)),
        bytes_written=_bytes_written(instruction, body),
        flops=_flops(instruction, kind, operands, body),
        moves_only=opcodes <= _MOVES,
        times=times,
    )


# Bytes


def _bytes_read(body: _Computation, operands: Sequence[str]) -> int:
    """Bytes that a fusion reads: of an operand that is only sliced, the slices."""
    total = 0
    for parameter in body:
        if parameter.opcode != "parameter":
            continue
        whole = array_bytes(operands[int(parameter.text)])
        # What only gives the parameter another shape is the parameter.
        same = {parameter.name}
        for inner in body:
            if inner.opcode == "bitcast" and inner.operands[0] in same:
                same.add(inner.name)
        users = [i for i in body if same & set(i.operands) and i.name not in same]
        total += min(whole, sum(_bytes_used(user, same, whole) for user in users) if users else 0)
    return total


def _bytes_used(user: _Instruction, operand: set[str], whole: int) -> int:
    first_only = user.operands[0] in operand and not operand & set(user.operands[1:])
    if user.opcode in _PARTS and first_only:
        return array_bytes(user.shape)
    if user.opcode == "dynamic-update-slice" and user.is_root and first_only:
        return 0  # Updated in place.
    return whole


def _bytes_written(instruction: _Instruction, body: _Computation) -> int:
    root = next((inner for inner in body if inner.is_root), None)
    if root is not None and root.opcode == "dynamic-update-slice":
        update = next(inner for inner in body if inner.name == root.operands[1])
        return array_bytes(update.shape)
    if "custom_call_target" in instruction.attributes and instruction.shape.startswith("("):
        # The last result of cuDNN's and cuBLAS's calls is a workspace of bytes.
        return sum(
            array_bytes(f"{dtype}[{sizes}]")
            for dtype, sizes in _ARRAY.findall(instruction.shape)
            if dtype not in ("u8", "s8")
        )
    return array_bytes(instruction.shape)


# Arithmetic of convolutions and matrix products


def _flops(
    instruction: _Instruction, kind: str, operands: Sequence[str], body: _Computation
) -> int:
    if kind.startswith("__cudnn$conv"):
        return _convolution_flops(instruction, kind, operands)
    if kind.startswith("__cublas"):
        return _product_flops(instruction, operands)
    shapes = {inner.name: inner.shape for inner in body}
    return sum(
        _product_flops(inner, [shapes.get(name, "") for name in inner.operands])
        for inner in body
        if inner.opcode == "dot"
    )


def _convolution_flops(call: _Instruction, kind: str, operands: Sequence[str]) -> int:
    """Two for each output of the forward convolution and tap of its kernel that it reads."""
    result = _ARRAY.search(call.shape)
    first, second, *_ = [_ARRAY.search(operand) for operand in operands]
    labels = call.attribute(r"dim_labels=\w+_(\w+)->")
    if kind.startswith("__cudnn$convBackwardFilter"):
        outputs, weights = second, result
    elif kind.startswith("__cudnn$convBackwardInput"):
        outputs, weights = first, second
    else:
        outputs, weights = result, second
    if labels is None or outputs is None or weights is None:
        return 0
    weight_sizes = _sizes(weights[2])
    taps = math.prod(weight_sizes) // weight_sizes[labels.index("o")]
    return 2 * math.prod(_sizes(outputs[2])) * taps


def _product_flops(product: _Instruction, operands: Sequence[str]) -> int:
    """`2 * batch * M * N * K`; the three sizes multiply to `batch³ * (M * N * K)²`."""
    arrays = [_ARRAY.search(shape) for shape in (*operands[:2], product.shape)]
    if len(arrays) < 3 or None in arrays:
        return 0
    sizes = [_sizes(array[2]) for array in arrays if array]
    listed = product.attribute(r"lhs_batch_dim(?:ension)?s\"?[=:][\[{]([^\]}]*)[\]}]") or ""
    batch = math.prod(sizes[0][int(axis)] for axis in re.findall(r"\d+", listed))
    return 2 * math.isqrt(math.prod(map(math.prod, sizes)) // batch)
