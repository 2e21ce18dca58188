"""How many files and connections a process may have open: whoever holds a job's store has some for every rank."""

from __future__ import annotations

import resource
from contextlib import suppress

_ENOUGH = 2**20
"""Some systems allow a thousand times more, and some programs then take minutes to close what was never opened."""

_RANK_CONNECTIONS = 3
"""Of a rank to the job's store: its process group's, the watchdog's, and NCCL's own."""

_BESIDE = 512
"""Libraries, data and checkpoints, and the connections to neighbours."""

_at_start: tuple[int, int] | None = None


def raise_limit() -> None:
    """Let this process, and what it starts, open as many files as the system allows; 1024 is a usual limit to begin with."""
    global _at_start
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _at_start = _at_start or (soft, hard)
    wanted = min(_finite(hard), _ENOUGH)
    if _finite(soft) < wanted:
        with suppress(OSError, ValueError):  # the kernel's own limit is lower: doctor counts what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limits_at_start() -> tuple[int, int]:
    """The limit that this process was started with, and up to which it may be raised."""
    soft, hard = _at_start or resource.getrlimit(resource.RLIMIT_NOFILE)
    return _finite(soft), _finite(hard)


def _finite(limit: int) -> int:
    return _ENOUGH if limit == resource.RLIM_INFINITY else limit


def files_of_store_holder(num_ranks: int) -> int:
    """How many the process needs that holds the store of so many ranks: rank 0, or torchrun on the first node."""
    return _RANK_CONNECTIONS * num_ranks + _BESIDE
