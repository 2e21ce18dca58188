"""Processes that end with the one that started them, also when that one is killed and can tell nobody."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_VARIABLE = "MEGATRON_OGPSA_PARENT"
"""Process id of who has started a rank, in the rank's environment."""

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


def end_with_starter() -> None:
    """In a rank: end with the agent, or the rank of a job, that has started it. Under plain torchrun that is torchrun."""
    if parent := os.environ.get(PARENT_VARIABLE):
        end_with_parent(int(parent))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
