"""The stages one after the other within one torchrun job: each rank of the job starts a process for each stage.

A process of its own gives each stage a Megatron as fresh as a job of its own would have: no global state, no random
state and no accelerator memory of the stage before. Rank 0 looks what is to be done and tells the others through
torchrun's store, so that no two ranks can see the folders differently.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType

from megatron_ogpsa.errors import TransientError, UserError
from megatron_ogpsa.system.ports import free_port
from megatron_ogpsa.system.processes import ATTEMPT_VARIABLE, PARENT_VARIABLE, attempt_in_store
from megatron_ogpsa.watchdog.board import STORE_VARIABLE

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What the agent hands on, of which Megatron's ``--exit-signal`` is one; and Ctrl-C."""

_PATIENCE = timedelta(days=1)
"""Ranks may leave a stage at different times; a rank that fails ends the job at once through torchrun."""


_FAREWELL = timedelta(minutes=10)
"""That rank 0 waits for the others when all is done: its process may hold the store that they still ask."""


class JobRank:
    """One rank of a torchrun job that outlives the stages' processes. Every rank makes each call, within a with statement.

    Rank 0 leaves that after the others, if all is done or a user's mistake was told. After a failure no rank waits: the
    launcher is to see it and end the others, which may hang.
    """

    def __init__(self) -> None:
        """Meets the other ranks at MASTER_ADDR and MASTER_PORT."""
        from torch.distributed.rendezvous import rendezvous

        self._store, self.rank, self._world = next(rendezvous("env://", timeout=_PATIENCE))
        self._attempt = attempt_in_store()
        self._num_told = 0
        self._num_processes = 0
        self._has_failed = False

    def __enter__(self) -> JobRank:
        """Nothing has failed yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave together, unless there was a failure."""
        if isinstance(error, UserError) or (error is None and not self._has_failed):
            self._leave()

    def told_by_first[T](self, look: Callable[[], T]) -> T:
        """What ``look`` returns on rank 0, as JSON, on all ranks.

        Raises:
            UserError: it raised one on rank 0.
        """
        key = f"megatron-ogpsa/{self._attempt}/{self._num_told}"
        self._num_told += 1
        if self.rank == 0:
            try:
                message = {"result": look()}
            except UserError as error:
                self._store.set(key, json.dumps({"error": str(error), "passes": isinstance(error, TransientError)}))
                raise
            self._store.set(key, json.dumps(message))
        answer = json.loads(self._store.get(key))
        if "error" in answer:
            raise (TransientError if answer["passes"] else UserError)(answer["error"])
        result: T = answer["result"]
        return result

    def run_process(self, arguments: Sequence[str], environment: dict[str, str]) -> int:
        """Run ``python ARGUMENTS`` as this rank of a process group of its own; returns its exit code.

        Signals that ask this process to end are handed on. If this process dies, so does the other.
        """
        port = self.told_by_first(free_port)
        own = {
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 of the stage holds a store of its own
            PARENT_VARIABLE: str(os.getpid()),
            ATTEMPT_VARIABLE: self._attempt,
            STORE_VARIABLE: f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",  # that of the job lives longer
        }
        process = subprocess.Popen([sys.executable, *arguments], env=os.environ | environment | own)

        signals: list[int] = []

        def hand_on(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in _HANDED_ON}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._has_failed = code != 0
        if not self._has_failed:  # otherwise nobody asks
            self._num_processes += 1
            self._store.set(self._ended(self.rank), "told" if signals else "")
        return code if code >= 0 else 128 - code

    def is_told(self) -> bool:
        """Whether a signal has come to any rank while the last process ran; waits for its end on all of them."""
        if not self._num_processes:
            return False
        return self.told_by_first(lambda: any(self._store.get(self._ended(rank)) for rank in range(self._world)))

    def _ended(self, rank: int) -> str:
        return f"megatron-ogpsa/{self._attempt}/ended/{self._num_processes}/{rank}"

    def _leave(self) -> None:
        left = f"megatron-ogpsa/{self._attempt}/left"
        with suppress(RuntimeError):  # the store has gone, or a rank has: nobody needs this one any more
            self._store.set(f"{left}/{self.rank}", "")
            if self.rank == 0:
                self._store.wait([f"{left}/{rank}" for rank in range(self._world)], _FAREWELL)
