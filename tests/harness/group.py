"""The side of a worker group that lives in the pytest process: start ranks, send jobs, collect, kill what hangs."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.harness.preloaded import PreloadedCommand
from tests.harness.rank import STARTUP_SECONDS, RankProcess, Reply, wait_for_any
from tests.harness.report import describe_failure

CLEANUP_SECONDS = 60.0


class JobFailed(AssertionError):
    """A job raised on a rank, lost a rank, or ran past its limit. The message shows each failing rank's traceback."""


class WorkerGroup:
    """``world_size`` processes joined by one gloo process group, started at the first job and reused by the next ones.

    A group in which a job failed is thrown away, because ranks may have stopped at different collectives; the next job
    starts a new one. Everything that a successful job left behind in Megatron's globals is cleaned up by the ranks
    themselves (:mod:`tests.harness.isolation`).
    """

    def __init__(self, world_size: int, preloaded: PreloadedCommand, *, grace: float = 5.0) -> None:
        """``grace``: seconds that the other ranks get to finish or fail as well, once one rank has failed."""
        self.world_size = world_size
        self._preloaded = preloaded
        self._grace = grace
        self._job_numbers = itertools.count()
        self._ranks: list[RankProcess] = []
        self._store: TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: str | Callable[..., Any], /, *, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call ``job(**kwargs)`` on every rank at once; return what the ranks returned, in rank order.

        Args:
            job: ``"package.module:function"``, or a function at the top level of an importable module.
            timeout: seconds from sending the job to the last rank's answer; starting the group does not count.
            kwargs: anything that JSON can carry (and paths). Results may be nested lists, tuples and dicts of tensors,
                numbers, strings and None: what ``torch.load(weights_only=True)`` accepts.

        Raises:
            JobFailed: a rank raised, ended, or was still running at the limit. The group has been stopped then.
        """
        __tracebackhide__ = True
        name = job if isinstance(job, str) else f"{job.__module__}:{job.__qualname__}"
        request = json.dumps({"job": name, "kwargs": kwargs}, default=os.fspath)
        number = next(self._job_numbers)
        try:
            self._start()
            for rank in self._ranks:
                rank.send({"number": number, "results": str(self._result_file(number, rank.index)), "request": request})
            self._expect("done", f"{name}({kwargs})", timeout)
            self._expect("clean", f"cleaning up after {name}({kwargs})", CLEANUP_SECONDS)
            return [self._take_result(number, rank.index) for rank in self._ranks]
        except BaseException:  # a failed job, Ctrl-C or pytest-timeout: in each case ranks may be anywhere
            self.close()
            raise

    def close(self) -> None:
        """Stop the ranks and whatever they have started, wait for their end, and remove their files. Idempotent."""
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def process_ids(self) -> list[int]:
        """The running ranks' process ids, empty before the first job and after a failed one."""
        return [rank.pid for rank in self._ranks]

    def _start(self) -> None:
        __tracebackhide__ = True
        if self._ranks:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="ogpsa-workers-")
        # The store lives here, on a port that the system picks: no port can be taken between choosing and binding it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for index in range(self.world_size):
            folder = Path(self._folder.name)
            self._ranks.append(RankProcess(index, self.world_size, self._store.port, folder, self._preloaded))
        self._expect("ready", f"starting {self.world_size} ranks", STARTUP_SECONDS)

    def _expect(self, kind: str, activity: str, seconds: float) -> None:
        """Wait until each rank has sent its message ``kind``, or raise for those that failed or did not."""
        __tracebackhide__ = True
        started = time.monotonic()
        limit = started + seconds
        replies: dict[int, Reply] = {}
        failed = False
        while len(replies) < self.world_size and time.monotonic() < limit:
            silent = [rank for rank in self._ranks if rank.index not in replies]
            for rank in wait_for_any(silent, limit - time.monotonic()):
                reply = rank.receive()
                replies[rank.index] = reply
                if not reply.ok and not failed:
                    failed = True
                    limit = min(limit, time.monotonic() + self._grace)
                if reply.ok and reply.kind != kind:
                    raise RuntimeError(f"rank {rank.index} sent '{reply.kind}' where '{kind}' was due")
        if failed or len(replies) < self.world_size:
            waited = time.monotonic() - started
            stacks = self._stacks([rank for rank in self._ranks if rank.index not in replies])
            raise JobFailed(describe_failure(activity, replies, stacks, waited, limit_reached=not failed))

    def _stacks(self, hanging: Sequence[RankProcess]) -> dict[int, str]:
        for rank in hanging:
            rank.request_stack()
        return {rank.index: rank.read_stack() for rank in hanging}

    def _result_file(self, number: int, index: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"job{number}-rank{index}.pt"

    def _take_result(self, number: int, index: int) -> Any:
        path = self._result_file(number, index)
        result = torch.load(path, weights_only=True)
        path.unlink()
        return result
