"""torchrun's agent, which starts the ranks of a node, with what training needs beyond it.

* SIGTERM is handed on to the ranks, so that Megatron saves (``--exit-signal-handler``); the agent waits for their end as for
  any other. torchrun's ends them 30 s later, and itself with an error.
* A failure that no restart would mend ends the run on all nodes, which are told of it through the store. Under torchrun
  ranks of other nodes wait in their collectives until these time out.
* What a rank has started ends with it, however it ends: Megatron's writer of ``--async-save`` holds memory of the GPU.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from subprocess import Popen
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from megatron_ogpsa.cluster.failures import judge
from megatron_ogpsa.cluster.words import say
from megatron_ogpsa.errors import UserError

HANDED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,  # Ctrl-C reaches this process alone: ranks are sessions of their own
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,  # for Megatron's --exit-signal
    signal.SIGUSR2: signal.SIGUSR2,
}
"""What this process is told → what the ranks are told."""

_VERDICT, _KNOWN_BY = "megatron-ogpsa/verdict", "megatron-ogpsa/known-by"
_LOOK_SECONDS = 1.0
_FAREWELL_SECONDS = 5.0
"""That a node waits for the others to know, since it may hold the store through which they learn it."""


@dataclass(frozen=True)
class Verdict:
    """Why the run ended, as the first node has put it that knew.

    Attributes:
        cause: such as ``rank 3 ended with exit code 1``.
        node: host name and process id of the agent that saw it.
        is_told: whether ranks of that node have said why.
    """

    exit_code: int
    cause: str
    node: str
    is_told: bool = False


class NodeAgent(LocalElasticAgent):
    """The agent of one node.

    Attributes:
        verdict: why the run has ended for good, if it did not end well.
        has_had_ranks: whether this node has ever been part of the run.
        name: of this agent in verdicts.
    """

    def __init__(
        self, spec: WorkerSpec, *, shutdown_timeout: float, on_signal: Callable[[signal.Signals], None]
    ) -> None:
        """As torch's.

        Args:
            shutdown_timeout: seconds that ranks get to end after a signal was handed on.
            on_signal: told of the first that is.
        """
        super().__init__(spec, DefaultLogsSpecs())
        self.verdict: Verdict | None = None
        self.has_had_ranks = False
        self.name = f"{os.uname().nodename} (process {os.getpid()})"
        self._told: signal.Signals | None = None
        self._kill_at = float("inf")
        self._patience = shutdown_timeout
        self._on_signal = on_signal
        self._last_look = 0.0
        self._ignored = [number for number in HANDED_ON if signal.getsignal(number) == signal.SIG_IGN]

    def take_signals(self) -> None:
        """Let this agent decide what signals mean. torch's own handlers come with each start of ranks.

        What this process was started to ignore it goes on ignoring: SIGHUP under nohup, Ctrl-C in a script's background.
        """
        for number in HANDED_ON:
            signal.signal(number, signal.SIG_IGN if number in self._ignored else self._hand_on)

    def find_verdict(self) -> Verdict | None:
        """Why the run has ended, as far as another node has said so.

        Raises:
            RendezvousConnectionError: the store is gone.
        """
        store: Any = self._worker_group.store
        try:
            if store is None or not store.check([_VERDICT]):
                return None
            return Verdict(**json.loads(store.get(_VERDICT)))
        except RuntimeError as error:
            raise RendezvousConnectionError(str(error)) from error

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._told is not None:  # while ranks were being ended, to be started again
            # Told to all nodes before this one meets them: they would wait for ranks that it does not start.
            self._end_run(worker_group, self._ended_by(self._told))
            raise SignalException(self._told.name, sigval=self._told)
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.has_had_ranks = True
        ids: dict[int, Any] = super()._start_workers(worker_group)
        self.take_signals()
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            if time.monotonic() > self._kill_at:
                self._kill()
            if verdict := self._look_for_verdict():
                self._end_run(worker_group, verdict)
                return RunResult(state=WorkerState.FAILED)
        elif result.state == WorkerState.FAILED:
            self._judge(worker_group, result)
        return result

    def _shutdown(self, *given: Any, **named: Any) -> None:
        """All ranks have ended after this; torch signals the groups of those alone that have not ended before.

        (What it is given differs with torch's version.)
        """
        super()._shutdown(*given, **named)
        for process in self._processes():
            if process.poll():  # not one that ended well: that may be long ago, and its id another's by now
                _kill_group(process)

    def _judge(self, worker_group: WorkerGroup, result: RunResult) -> None:
        """Whether the ranks are started again."""
        verdict = self._own_verdict(result)
        in_vain = self._told is not None or verdict.exit_code == UserError.exit_code
        known = None if self._is_alone() else self.find_verdict()
        if known or in_vain or self._remaining_restarts == 0:
            self._end_run(worker_group, known or verdict)
        else:
            left = self._remaining_restarts - 1
            say(f"{verdict.cause}. All ranks are started again (after that, {left} more times)")

    def _own_verdict(self, result: RunResult) -> Verdict:
        if self._told is not None:
            return self._ended_by(self._told)
        judged = judge(result.failures)
        return Verdict(judged.exit_code, judged.cause, self.name, is_told=judged.is_told)

    def _ended_by(self, told: signal.Signals) -> Verdict:
        return Verdict(128 + told, f"{told.name} ended the ranks", self.name)

    def _look_for_verdict(self) -> Verdict | None:
        now = time.monotonic()
        if self._is_alone() or now - self._last_look < _LOOK_SECONDS:
            return None
        self._last_look = now
        return self.find_verdict()

    def _end_run(self, worker_group: WorkerGroup, verdict: Verdict) -> None:
        """No restarts any more, here and elsewhere; the verdict that was first in the store is everyone's."""
        self._remaining_restarts = 0  # as torch itself does where a restart would be in vain
        self.verdict = verdict
        if self._is_alone():
            return
        store: Any = worker_group.store
        try:
            first = store.compare_set(_VERDICT, "", json.dumps(asdict(verdict)))
            self.verdict = Verdict(**json.loads(first))
            known_by = store.add(_KNOWN_BY, 1)
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while known_by < self._num_nodes() and time.monotonic() < deadline:
                time.sleep(0.1)
                known_by = store.add(_KNOWN_BY, 0)
        except RuntimeError:  # whoever held the store has ended already: there is nobody to tell
            return

    def _num_nodes(self) -> int:
        return self._worker_group.group_world_size or 1

    def _is_alone(self) -> bool:
        return self._num_nodes() == 1

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        has_ranks = any(self._ranks())  # torch's state is the last to know, after it has looked up names
        if self._worker_group.state in (WorkerState.INIT, WorkerState.STOPPED) and not has_ranks:  # nodes are meeting
            raise SignalException(received.name, sigval=received)
        if received == signal.SIGINT and self._told == signal.SIGINT:  # a second Ctrl-C
            self._kill()
        if self._told is None:
            self._told, self._kill_at = received, time.monotonic() + self._patience
            self._on_signal(received)
        for process in self._ranks():
            process.send_signal(HANDED_ON[received])  # not to its group: loaders of data must last until it has saved

    def _kill(self) -> None:
        for process in self._ranks():
            _kill_group(process)
        self._kill_at = float("inf")

    def _ranks(self) -> Iterator[Popen[Any]]:
        """The ranks' processes that have not ended."""
        return (process for process in self._processes() if process.poll() is None)

    def _processes(self) -> Iterator[Popen[Any]]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return (handler.proc for handler in handlers.values())


def _kill_group(rank: Popen[Any]) -> None:
    """Kill a rank, which leads a group of its own, and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
