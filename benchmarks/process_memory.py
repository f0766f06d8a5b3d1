"""Resident memory of a process at the start of a measurement of its peak (Linux)."""

from __future__ import annotations

import ctypes
from pathlib import Path

from benchmarks.costs import resident


def memory_now() -> float:
    """Return this process's resident memory in bytes, and let its peak start from there.

    The peak since then is ``resident("VmHWM")``.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier work has freed
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")
