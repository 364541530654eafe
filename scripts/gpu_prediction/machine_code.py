"""Reads the machine code of XLA's own kernels: launches, PTX, registers and SASS.

XLA dumps PTX and launch grids. `ptxas` makes SASS of PTX and tells registers, and
`nvdisasm` shows the SASS; without them less is known.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import itertools
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping

from gpu_prediction.cards import THREADS_PER_WARP, Card

_LAUNCH = re.compile(
    r"^\s*(\d+): kCustomKernel .*\] (\S+) grid: \[(\d+), (\d+), (\d+)\] "
    r"threads: \[(\d+), (\d+), (\d+)\]",
    re.MULTILINE,
)
_THUNK = re.compile(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)')
_HEADER = re.compile(r"^\.version .*\n\.target .*\n\.address_size .*\n", re.MULTILINE)
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\((.*?)^\}", re.MULTILINE | re.DOTALL)
_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclasses.dataclass(frozen=True)
class Launch:
    """The grid of a kernel.

    Attributes:
        symbol: the function that is launched; kernels that are alike share one.
        blocks: in the grid.
        threads: in a block.
    """

    symbol: str
    blocks: int
    threads: int

    @property
    def warps(self) -> int:
        return self.blocks * -(-self.threads // THREADS_PER_WARP)


@dataclasses.dataclass(frozen=True)
class Routine:
    """The code of a kernel, for one thread.

    Attributes:
        loads: loads from global memory in the PTX: bytes of one → how many.
        registers: None without `ptxas`, as `spilled_bytes`.
        spilled_bytes: what is stored to memory for lack of registers.
        instructions: in the SASS; None without `nvdisasm`. Branches that are not
            taken count too.
        instructions_in_loops: those of them that may run several times.
        loaded: bytes that the SASS loads from global memory.
        loaded_in_loops: those of them in loops, in one turn.
    """

    loads: Mapping[int, int]
    registers: int | None = None
    spilled_bytes: int | None = None
    instructions: int | None = None
    instructions_in_loops: int = 0
    loaded: int = 0
    loaded_in_loops: int = 0

    def instructions_for(self, bytes_read: float) -> float | None:
        """Instructions of a thread that reads so many bytes; None where not known.

        A loop's length is not in the code. It turns at least as often as its loads
        need to bring in what is read.
        """
        if self.instructions is None:
            return None
        turns = 1.0
        if self.loaded_in_loops:
            outside = self.loaded - self.loaded_in_loops
            turns = max(1.0, (bytes_read - outside) / self.loaded_in_loops)
        return self.instructions + (turns - 1) * self.instructions_in_loops


@dataclasses.dataclass(frozen=True)
class Tools:
    """NVIDIA's tools, each None where it is not installed."""

    ptxas: str | None
    nvdisasm: str | None

    @classmethod
    def find(cls) -> Tools:
        """Those of the wheels `nvidia-cuda-nvcc` and `nvidia-cuda-nvdisasm`, or on PATH."""
        return cls(_find_tool("ptxas"), _find_tool("nvdisasm"))

    def missing(self) -> str | None:
        """One line: what is not installed, and what is not known without it."""
        if self.ptxas is None:
            lost = "ptxas (nvidia-cuda-nvcc): registers, spills and instruction-issue times"
        elif self.nvdisasm is None:
            lost = "nvdisasm (nvidia-cuda-nvdisasm): instruction-issue times"
        else:
            return None
        return f"Left out, for lack of {lost}; pip install 'diagconv-tf[predict]' has both"


def _find_tool(name: str) -> str | None:
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    installed = itertools.chain(*(pathlib.Path(f).glob(f"*/bin/{name}") for f in folders))
    return next(map(str, installed), None) or shutil.which(name)


def read_launches(thunks: str, metadata: str) -> dict[str, Launch]:
    """The grid of every kernel that XLA wrote, by the name of its HLO instruction.

    Args:
        thunks: text of the dump `*.thunk_sequence.txt`.
        metadata: text of the dump `*.thunk_metadata.txt`.
    """
    names = {number: name for name, number in _THUNK.findall(metadata)}
    launches = {}
    for number, symbol, *sizes in _LAUNCH.findall(thunks):
        x, y, z, *threads = map(int, sizes)
        name = names.get(str(int(number)), symbol)
        launches[name] = Launch(symbol, x * y * z, threads[0] * threads[1] * threads[2])
    return launches


def read_ptx(text: str) -> dict[str, Routine]:
    """Every kernel of a PTX module, by its symbol: its loads from global memory."""
    return {
        symbol: Routine(
            collections.Counter(
                int(vector or 1) * int(bits) // 8 for vector, bits in _LOAD.findall(body)
            )
        )
        for symbol, body in _ENTRY.findall(text)
    }


def read_routines(texts: Iterable[str], card: Card, tools: Tools) -> dict[str, Routine]:
    """Every kernel of PTX modules, by its symbol, with all that the tools tell.

    Raises:
        RuntimeError: if `ptxas` refuses a module.
    """
    routines: dict[str, Routine] = {}
    with tempfile.TemporaryDirectory() as folder:
        ptx, binary = pathlib.Path(folder, "kernels.ptx"), pathlib.Path(folder, "kernels.cubin")
        for text in join_ptx(texts):
            found = read_ptx(text)
            if found and tools.ptxas is not None:
                ptx.write_text(text)
                found = with_resources(found, _assemble(tools.ptxas, ptx, binary, card))
                if tools.nvdisasm is not None:
                    # Without its analysis of the flow of data, which takes half of the time.
                    found = with_sass(found, _run(tools.nvdisasm, "-c", "-ndf", binary).stdout)
            routines |= found
    return routines


def join_ptx(texts: Iterable[str]) -> list[str]:
    """PTX modules, as one where their targets are the same.

    XLA writes a module for each kernel, and the tools take most of their time to start.
    """
    bodies: dict[str, list[str]] = {}
    for text in texts:
        if match := _HEADER.search(text):
            bodies.setdefault(match[0], []).append(text[match.end() :])
    return [header + _once("".join(some)) for header, some in bodies.items()]


def _once(body: str) -> str:
    """Without what several modules declare alike."""
    declared = set()
    lines = []
    for line in body.splitlines(keepends=True):
        if line.startswith(".extern"):
            if line in declared:
                continue
            declared.add(line)
        lines.append(line)
    return "".join(lines)


def _assemble(ptxas: str, ptx: pathlib.Path, binary: pathlib.Path, card: Card) -> str:
    done = _run(ptxas, "-v", f"-arch={card.architecture}", ptx, "-o", binary)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"ptxas refuses XLA's PTX: {reason[0] if reason else 'no reason given'}")
    return done.stderr


def _run(*command: str | pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def with_resources(routines: Mapping[str, Routine], report: str) -> dict[str, Routine]:
    """`routines` with registers and spills from what `ptxas -v` reports."""
    found = dict(routines)
    for part in report.split("Compiling entry function '")[1:]:
        symbol = part[: part.index("'")]
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        if symbol in found:
            found[symbol] = dataclasses.replace(
                found[symbol],
                registers=int(registers[1]) if registers else None,
                spilled_bytes=int(spilled[1]) if spilled else None,
            )
    return found


def with_sass(routines: Mapping[str, Routine], disassembly: str) -> dict[str, Routine]:
    """`routines` with instructions and loops from what `nvdisasm -c` shows."""
    found = dict(routines)
    for part in disassembly.split("\n.text.")[1:]:
        symbol, _, lines = part.partition(":")
        if symbol in found:
            found[symbol] = _with_instructions(found[symbol], lines.splitlines())
    return found


def _with_instructions(routine: Routine, lines: Iterable[str]) -> Routine:
    loaded: list[int] = []  # For each instruction, the bytes that it loads.
    labels: dict[str, int] = {}
    in_loops: set[int] = set()
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(loaded)
            continue
        match = _SASS.match(line)
        if match is None or match[1] == "NOP":
            continue
        opcode, *suffixes = match[1].split(".")
        width = next((_WIDTHS[suffix] for suffix in suffixes if suffix in _WIDTHS), 4)
        loaded.append(width if opcode == "LDG" else 0)
        target = re.search(r"`\((\.L_x_\d+)\)", match[2]) if opcode == "BRA" else None
        start = labels.get(target[1]) if target else None
        # At the end stands a branch to itself, which never runs.
        if start is not None and start < len(loaded) - 1:
            in_loops |= set(range(start, len(loaded)))
    return dataclasses.replace(
        routine,
        instructions=len(loaded),
        instructions_in_loops=len(in_loops),
        loaded=sum(loaded),
        loaded_in_loops=sum(loaded[index] for index in in_loops),
    )
