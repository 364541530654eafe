"""Compiles JAX functions for a card that this machine need not have."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpu_prediction import hlo, machine_code
from gpu_prediction.bounds import Program, bound_kernel
from gpu_prediction.cards import Card
from gpu_prediction.machine_code import Tools

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def why_not_here() -> str | None:
    """Why this process cannot compile for GPUs; None where it can."""
    if any(map(_is_installed, _PLUGINS)):
        return None
    return (
        "Expected JAX's CUDA plugin, which compiles without a GPU: "
        "pip install 'diagconv-tf[predict]'. Received: none"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Of `jax_plugins` itself.
        return False


class Compiler:
    """XLA for one card.

    Args:
        card: to compile for.
        dump: where XLA dumps, as `process.prepare` returns it.
        tools: for the machine code.

    Raises:
        RuntimeError: if JAX has no CUDA plugin, or one that does not know the card.
    """

    def __init__(self, card: Card, dump: pathlib.Path, tools: Tools):
        import jax
        from jax.experimental import topologies

        if reason := why_not_here():
            raise RuntimeError(reason)
        # A program from the cache is not dumped.
        jax.config.update("jax_enable_compilation_cache", False)
        self.card = card
        self._dump = dump
        self._tools = tools
        # "cuda", not "gpu": jax-ml/jax#23971.
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=card.target()
        )
        self._sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def argument(self, shape: Sequence[int], dtype: str) -> Any:
        """An argument of a function to compile."""
        import jax

        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._sharding)

    def compile(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        flops_per_second: float,
        donate_argnums: Sequence[int] = (),
    ) -> Program:
        """What XLA makes of `function`, with bounds for every launch.

        Args:
            function: of JAX arrays, or trees of them.
            *arguments: as `argument` returns them, or trees of them.
            flops_per_second: peak of convolutions and matrix products on the card.
            donate_argnums: arguments whose memory the results may take.
        """
        import jax

        shutil.rmtree(self._dump)
        self._dump.mkdir()
        with _on_the_card(self.card):
            lowered = jax.jit(function, donate_argnums=tuple(donate_argnums)).lower(*arguments)
        compiled = lowered.compile()
        launches = machine_code.read_launches(
            self._read("*.thunk_sequence.txt"), self._read("*.thunk_metadata.txt")
        )
        ptx = (path.read_text() for path in sorted(self._dump.glob("*.ptx")))
        routines = machine_code.read_routines(ptx, self.card, self._tools)
        kernels = []
        for kernel in hlo.read_kernels(compiled.as_text()):
            launch = launches.get(kernel.name) if kernel.is_written_by_xla else None
            routine = routines.get(launch.symbol) if launch else None
            kernels.append(bound_kernel(kernel, launch, routine, self.card, flops_per_second))
        memory = compiled.memory_analysis()
        return Program(
            kernels,
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes,
        )

    def _read(self, pattern: str) -> str:
        return "".join(path.read_text() for path in sorted(self._dump.glob(pattern)))


@contextlib.contextmanager
def _on_the_card(card: Card) -> Iterator[None]:
    """Inside, lowerings are traced as for a card, though this process has none."""
    from diagconv_tf import backends

    backend = backends.current()
    here = backend.default_device
    # All else that a lowering asks about the device follows from this.
    backend.default_device = lambda: ("gpu", card.name)
    try:
        yield
    finally:
        backend.default_device = here
