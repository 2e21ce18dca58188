"""The highest memory that something takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak of the resident set becomes what is resident now


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Highest memory during ``work``: of the device's allocator on a GPU, this process's resident set on CPU.

    On CPU, what the C library keeps of freed memory goes back to the system first: ``work`` would use it again, and
    seem to take nothing.

    Source: proc(5), ``VmHWM`` and ``clear_refs``; malloc_trim(3).

    Raises:
        OSError: no such files: the system is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    ctypes.CDLL(None).malloc_trim(0)  # glibc's, on which PyTorch's wheels are built
    _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    work()
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
