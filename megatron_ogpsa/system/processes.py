"""What a rank's process knows of its start: who has started it and ends it, and which attempt of the job it belongs to."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

from megatron_ogpsa.errors import UserError

PARENT_VARIABLE = "MEGATRON_OGPSA_PARENT"
"""Process id of who has started a rank, in the rank's environment."""

ATTEMPT_VARIABLE = "MEGATRON_OGPSA_ATTEMPT"
"""What :func:`attempt_in_store` is for the job, in a process that one of its ranks has started."""

# Opened here: a lock that another thread holds at a fork is never free in the child.
_LIBC = ctypes.CDLL(None, use_errno=True)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to end this process when its parent dies, which may be by SIGKILL. It holds over exec.

    The kernel looks at the thread that started this process: it must be one that lives as long as the parent does.

    Args:
        parent: the process id that the parent has told; it may have died before this call.
        by: the signal; one that can be caught lets this process end what it has started itself.
    """
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, by)
    if os.getppid() != parent:
        os.kill(os.getpid(), by)


def end_with_starter() -> None:
    """In a rank: end with the agent, or the rank of a job, that has started it. Under plain torchrun that is torchrun."""
    if parent := os.environ.get(PARENT_VARIABLE):
        end_with_parent(int(parent))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def attempt_in_store() -> str:
    """Which start of the ranks this is, the same on all of them: part of every key in the job's store.

    The agents' count of restarts belongs to the key only where torchrun's agents keep one store over all starts. Elsewhere
    rank 0 holds the store, so that each start has a new one, and the counts may disagree: an agent that was lost and has come
    anew has counted fewer.
    """
    if given := os.environ.get(ATTEMPT_VARIABLE):
        return given
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if keeps_store else "0"


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or an agent like it, has started this process as a rank.

    Raises:
        UserError: the variables are a pod's, which some operators of Kubernetes set for every container.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return False
    if "LOCAL_RANK" not in environment:
        raise UserError(
            f"RANK {environment['RANK']} and WORLD_SIZE {environment['WORLD_SIZE']} are set without LOCAL_RANK, so that they "
            "count nodes and not ranks: give them as NODE_RANK and NNODES, with MASTER_ADDR, and unset RANK and WORLD_SIZE"
        )
    return True


def require_common_count() -> None:
    """In a rank, before it asks the job's store for anything: check that :func:`attempt_in_store` will be the same on all.

    Agents of several nodes that keep one store count what they have restarted themselves: that the nodes of others have gone
    or come again does not count, so that after one failure their counts differ.

    Raises:
        UserError: it may not be, after a restart.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and nodes > 1 and restarts > 0:
        raise UserError(
            f"--max-restarts {restarts}: torchrun's agents on {nodes} nodes keep one store but count restarts each for "
            "itself, so that ranks which are started again would not find each other: use --rdzv-backend c10d "
            "--rdzv-endpoint HOST:PORT with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exported on all nodes, or "
            "launch/train_nodes.sh"
        )
