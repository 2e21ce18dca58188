"""Processes that end with the one that started them, also when that one is killed and can tell nobody."""

from __future__ import annotations

import ctypes
import os
import signal

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, which may be by SIGKILL.

    The kernel looks at the thread that started this process: it must be one that lives as long as the parent does.

    Args:
        parent: the process id that the parent has told; it may have died before this call.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
