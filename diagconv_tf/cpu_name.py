"""What this machine's CPU is called."""

from __future__ import annotations

import contextlib
import pathlib
import platform

_CPUINFO = pathlib.Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The maker's name of the CPU; without one, what tells it from others best."""
    fields: dict[str, str] = {}
    # Linux leaves `platform.processor()` empty, or says the architecture there.
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    name = platform.processor() or platform.machine()
    if "CPU part" in fields:  # On ARM, numbers in place of the name.
        name += f" {fields.get('CPU implementer', '')} {fields['CPU part']}"
    return name
