"""Two ranks of a job, forked from this process, of which the second is late: ``python -m tests.pipeline.ranks JSON``.

What rank 0 finds of the only stage, whose process would fail there, by how many seconds rank 1 is late, and whether that
hangs. Prints how each rank ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ogpsa.cli import train
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import Stage
from megatron_ogpsa.pipeline.ranks import JobRank
from megatron_ogpsa.system.ports import free_port

LIMIT = 30.0
"""Seconds that a rank may take; one that waits for the other in vain would take minutes."""

STAGES = [
    Stage(name, number, Path("out", name), None, ConfigFile(path=Path("none.yaml"), entries=()), (), ())
    for number, name in enumerate(("sft", "dpo"))
]

BEGUN: set[str] = set()

FINDINGS: dict[str, Callable[[Stage], Any]] = {}


def finding(look: Callable[[Stage], Any]) -> Callable[[Stage], Any]:
    FINDINGS[look.__name__] = look
    return look


@finding
def finished(stage: Stage) -> Any:
    return "finished", []


@finding
def new(stage: Stage) -> Any:
    return "new", []


@finding
def finished_once_begun(stage: Stage) -> Any:
    is_begun, _ = stage.name in BEGUN, BEGUN.add(stage.name)
    return "finished" if is_begun else "new", []


@finding
def a_mistake(stage: Stage) -> Any:
    raise UserError("delete the folder")


@finding
def a_bug(stage: Stage) -> Any:
    raise ValueError("a message of its own")


def be_rank(rank: int, case: dict[str, Any]) -> int:
    """The rank, with a command in place of its stage's process."""
    if rank == 1:
        told = JobRank.told_by_first
        if case.get("hangs"):
            JobRank.run_process = lambda *_: time.sleep(600)  # type: ignore[method-assign, assignment]

        def told_late[T](self: JobRank, look: Callable[[], T]) -> T:
            time.sleep(case["late"])
            return told(self, look)

        JobRank.told_by_first = told_late  # type: ignore[method-assign]
    train._state = FINDINGS[case["finds"]]  # type: ignore[assignment]
    sys.executable = case.get("process", "false")
    os.environ["RANK"] = str(rank)
    if rank == 1 and case.get("signal"):
        threading.Thread(target=end_once_handed_on, daemon=True).start()
    try:
        return train._run_as_rank_of_job(STAGES[: case.get("stages", 1)], [])
    except UserError as error:
        return error.exit_code


def end_once_handed_on() -> None:
    """Send this process SIGTERM as soon as its stage's process runs and gets the signal too."""
    while not (Path("running-1").exists() and callable(signal.getsignal(signal.SIGTERM))):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def start(rank: int, case: dict[str, Any]) -> int:
    """Fork a rank; returns its process id."""
    process_id = os.fork()
    if process_id:
        return process_id
    signal.alarm(int(LIMIT))
    code = 1
    try:
        code = be_rank(rank, case)
    except Exception as error:
        print(f"rank {rank} raised {type(error).__name__}", flush=True)
    finally:
        os._exit(code)


def main(request: str) -> None:
    """Run both ranks; one that hangs is killed after the first has ended, as torchrun would."""
    case = json.loads(request)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    ranks = [start(rank, case) for rank in range(2)]
    for rank, process_id in enumerate(ranks):
        if case.get("hangs") and rank == 1:
            os.kill(process_id, signal.SIGKILL)
        _, status = os.waitpid(process_id, 0)
        os.write(1, f"rank {rank}: {os.waitstatus_to_exitcode(status)}\n".encode())  # at once: the other may write too


if __name__ == "__main__":
    main(sys.argv[1])
