"""The processes of the collectives' check: all ranks started on this machine, or one by each rank of a torchrun job."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import IO, Any, Protocol

from megatron_ogpsa.doctor.collectives import watch
from megatron_ogpsa.doctor.findings import Finding
from megatron_ogpsa.doctor.steps import PATIENCE, Layout, Probe
from megatron_ogpsa.system.processes import attempt_in_store

PROBE_MODULE = "megatron_ogpsa.doctor.probe"

_END = "end"
_POLL_SECONDS = 0.05


class Connections(Protocol):
    """Where ranks come from."""

    def findings(self, layout: Layout) -> Iterator[Finding]:
        """Let the ranks of ``layout`` talk to each other."""

    def end(self, exit_code: int) -> None:
        """There is nothing more to try; ranks that wait are to end with this code."""


class LocalRanks:
    """All ranks are processes of this one."""

    def __init__(self, *, timeout: float) -> None:
        """``timeout``: seconds for an all-reduce."""
        self._timeout = timeout
        self._rounds = 0

    def findings(self, layout: Layout) -> Iterator[Finding]:
        """See :class:`Connections`."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        self._rounds += 1
        probe = Probe(
            host="localhost", port=store.port, prefix=f"round/{self._rounds}", parent=os.getpid(), layout=layout
        )
        with _processes(probe, {rank: rank for rank in range(layout.world)}, store) as look_after:
            yield from watch(_reports(store, probe), layout, timeout=self._timeout, look_after_processes=look_after)

    def end(self, exit_code: int) -> None:
        """Nobody waits."""


class JobRanks:
    """Each rank of a torchrun job starts one; the first rank watches them, and tells the others what is to be done."""

    def __init__(self, *, timeout: float) -> None:
        """Meets the other ranks at MASTER_ADDR and MASTER_PORT; every rank must make the call."""
        from torch.distributed.rendezvous import rendezvous

        self._store, self.rank, self.world = next(rendezvous("env://", timeout=timedelta(minutes=30)))
        self._timeout = timeout
        self._attempt = f"doctor/{attempt_in_store()}"
        self._rounds = 0

    def findings(self, layout: Layout) -> Iterator[Finding]:
        """See :class:`Connections`; on the first rank."""
        self._rounds += 1
        probe = self._probe(layout)
        self._store.set(f"{self._attempt}/round/{self._rounds}", probe.as_json())
        with _processes(probe, {self.rank: _local_rank()}, self._store) as look_after:
            reports = _reports(self._store, probe)
            yield from watch(reports, layout, timeout=self._timeout, look_after_processes=look_after)
        self._store.set(f"{self._attempt}/round/{self._rounds}/over", "")

    def end(self, exit_code: int) -> None:
        """See :class:`Connections`; on the first rank, which leaves after the others have been told."""
        self._store.set(f"{self._attempt}/round/{self._rounds + 1}", f"{_END} {exit_code}")
        for rank in range(1, self.world):
            self._store.wait([f"{self._attempt}/left/{rank}"], timedelta(minutes=1))

    def follow(self) -> int:
        """On the other ranks: start what the first one asks for; returns the exit code that it tells."""
        while True:
            self._rounds += 1
            task = self._store.get(f"{self._attempt}/round/{self._rounds}").decode()
            if task.startswith(_END):
                self._store.set(f"{self._attempt}/left/{self.rank}", "")
                return int(task.removeprefix(_END))
            probe = self._probe(Probe.from_json(task).layout)
            with _processes(probe, {self.rank: _local_rank()}, self._store) as look_after:
                while not self._store.check([f"{self._attempt}/round/{self._rounds}/over"]):
                    look_after()
                    time.sleep(_POLL_SECONDS)

    def _probe(self, layout: Layout) -> Probe:
        return Probe(
            host=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            prefix=f"{self._attempt}/{self._rounds}",
            parent=os.getpid(),
            layout=layout,
        )


def _reports(store: Any, probe: Probe) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"{probe.prefix}/reports", store)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _processes(probe: Probe, ranks: Mapping[int, int], store: Any) -> Iterator[Callable[[], None]]:
    """Start a process for each rank, and kill what is left of them at the end: a stopped one takes no other signal.

    Args:
        ranks: rank → local rank.

    Yields:
        A function that notes processes which have failed in the store.
    """
    reports = _reports(store, probe)
    with ExitStack() as stack:
        started: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for rank, local_rank in ranks.items():
            output = stack.enter_context(tempfile.TemporaryFile())
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(probe.layout.world)}
            process = subprocess.Popen(
                [sys.executable, "-m", PROBE_MODULE, probe.as_json()],
                env=os.environ | own | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started[rank] = process, output

        def look_after() -> None:
            for rank, (process, output) in started.items():
                if process.poll() and not reports.check([f"failed/{rank}"]):
                    reports.set(f"failed/{rank}", _ending(process.returncode, output))

        yield look_after


def _ending(exit_code: int, output: IO[bytes]) -> str:
    """How a process ended that could not tell it itself, with the last line that it wrote."""
    output.seek(0)
    lines = output.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return f"ended with {how}: {last[:300]}"
