"""Ranks that import nothing and behave as they are told: ``python -m tests.cluster.ranks BEHAVIOUR``."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_ogpsa.system.processes import end_with_starter
from tests.cluster.ready import ready_file

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
START = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
FAILED_BEFORE = Path("failed")


def wait() -> NoReturn:
    """As in a collective that a rank which has failed will never come to."""
    _write_process_id(ready_file(RANK, START), os.getpid())
    time.sleep(600)
    raise RuntimeError("nobody has ended this rank")


def _write_process_id(path: Path, process_id: int) -> None:
    """Whole or not at all: who sees the file may end this rank at once, and a test reads what is left."""
    written = Path(f"writing-{process_id}")
    written.write_text(str(process_id), encoding="utf-8")
    written.rename(path)


def _wait_for_others() -> None:
    """Of this start: ranks of an earlier one were ready too, and those of this one may not have begun."""
    while not all(ready_file(rank, START).exists() for rank in range(LAST + 1) if rank != RANK):
        time.sleep(0.02)


def last_rank_raises() -> None:
    if RANK == LAST:
        _wait_for_others()
        raise ValueError("a message of its own")
    wait()


def last_rank_raises_once() -> None:
    if FAILED_BEFORE.exists():
        return
    if RANK == LAST:
        _wait_for_others()  # one that began later would take the first time for the second
        FAILED_BEFORE.touch()
        raise ValueError("a message of its own")
    wait()


def last_rank_raises_once_told() -> None:
    while RANK == LAST and not Path("told").exists():
        time.sleep(0.02)
    last_rank_raises_once()


def first_rank_is_misused() -> None:
    if RANK == 0:
        _wait_for_others()
        sys.exit(2)
    wait()


def saves_when_told() -> None:
    def save(number: int, frame: FrameType | None) -> None:
        time.sleep(0.5)
        print(f"rank {RANK} has saved", flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    wait()


def ignores_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait()


def tells_how_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    print(f"rank {RANK} may open {'as many files as it can' if soft == min(hard, 2**20) else soft}")


def _start_child() -> None:
    child = subprocess.Popen(["sleep", "600"])
    _write_process_id(Path("ready-child"), child.pid)


def last_rank_has_a_child_and_is_killed() -> None:
    if RANK == LAST:
        _wait_for_others()
        _start_child()
        os.kill(os.getpid(), signal.SIGKILL)
    saves_when_told()


def first_rank_has_a_child_and_ignores_signals() -> None:
    if RANK == 0:
        _start_child()
    ignores_signals()


BEHAVIOURS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        wait,
        last_rank_raises,
        last_rank_raises_once,
        last_rank_raises_once_told,
        first_rank_is_misused,
        saves_when_told,
        ignores_signals,
        tells_how_many_files,
        last_rank_has_a_child_and_is_killed,
        first_rank_has_a_child_and_ignores_signals,
    )
}

if __name__ == "__main__":
    end_with_starter()
    os.write(1, f"rank {RANK} of {LAST + 1} starts\n".encode())  # at once, so that lines of ranks do not mix
    BEHAVIOURS[sys.argv[1]]()
