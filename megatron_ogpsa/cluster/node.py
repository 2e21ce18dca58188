"""Run the agent of this node, and say in one line how it went."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import determine_local_world_size

from megatron_ogpsa.cluster.agent import HANDED_ON, NodeAgent, Verdict
from megatron_ogpsa.cluster.failures import ITS_OUTPUT
from megatron_ogpsa.cluster.settings import LaunchSettings
from megatron_ogpsa.cluster.thawing import stopped_processes_end
from megatron_ogpsa.cluster.words import say
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.open_files import raise_limit

_STORE_SECONDS = 60
"""For one answer from the store of the rendezvous."""


def run_node(
    command: Sequence[str], settings: LaunchSettings, on_signal: Callable[[signal.Signals], None] = lambda _: None
) -> int:
    """Start ``command`` once for each rank of this node, together with the other nodes, and wait for the end.

    Args:
        on_signal: called with each signal that is forwarded to the ranks; they may still exit with 0.

    Returns:
        0, the exit code of the first rank that failed anywhere, 128 + the number of the signal that ended the ranks, or 1
        if nodes did not find each other. The reason is told, but for users' mistakes, which ranks tell themselves.

    Raises:
        UserError: there is no GPU to start a rank for.
    """
    for name in (
        "torch.distributed.elastic",
        "torch.distributed.elastic.agent.server.api",
        "torch.distributed.launcher",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    raise_limit()
    num_ranks = _num_ranks(settings.ranks_per_node)
    # As torchrun does for more than one rank, but sharing out the cores rather than leaving most of them idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    if settings.max_restarts or settings.max_nodes > 1:
        # Otherwise agents share one store with all generations of ranks: these would find the addresses of the one before,
        # and those of a node that has come anew look for it elsewhere (https://github.com/pytorch/pytorch/issues/135712).
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        rendezvous = _join(settings)
        agent = _agent(command, num_ranks, rendezvous, settings, on_signal)
        try:
            with _signals_restored(), stopped_processes_end():
                return _run(agent, settings)
        finally:
            if agent.has_had_ranks or not _others_have_met(rendezvous):
                rendezvous.shutdown()  # closes it for good, so that nodes which still meet end too
    except _NotMetError as error:
        say(str(error))
        return 1


def _agent(
    command: Sequence[str],
    num_ranks: int,
    rendezvous: RendezvousHandler,
    settings: LaunchSettings,
    on_signal: Callable[[signal.Signals], None],
) -> NodeAgent:
    spec = WorkerSpec(
        role="default",
        local_world_size=num_ranks,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=rendezvous,
        max_restarts=settings.max_restarts,
        monitor_interval=settings.monitor_interval,
        local_addr=settings.local_addr,
    )
    return NodeAgent(spec, shutdown_timeout=settings.shutdown_timeout, on_signal=on_signal)


def _others_have_met(rendezvous: Any) -> bool:
    """Whether a run goes on without this node, which needs the rendezvous for its restarts.

    Args:
        rendezvous: torch's handler, which keeps to itself what it knows.
    """
    known = rendezvous._state_holder
    with suppress(RendezvousError):  # the node that holds it is gone: as it was last seen
        known.sync()
    has_met = known.state.complete or known.state.round > 0  # or is meeting again
    return bool(has_met) and rendezvous._this_node not in known.state.participants


@contextmanager
def _signals_restored() -> Iterator[None]:
    """So that a signal ends whoever runs several stages, if it comes between two of them."""
    before = {number: signal.getsignal(number) for number in HANDED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _NotMetError(Exception):
    """Nodes did not find, or have lost, each other; says why and what to do."""


def _join(settings: LaunchSettings) -> RendezvousHandler:
    """Hold the rendezvous, or find it."""
    deadline = time.monotonic() + settings.rdzv_timeout
    while True:
        try:
            return get_rendezvous_handler(_rendezvous_parameters(settings))
        except RendezvousConnectionError as error:
            reason = _reason(error)
        if settings.node_rank == 0 or settings.max_nodes == 1:
            raise _NotMetError(
                f"cannot hold the rendezvous at {settings.endpoint} ({reason}): does another run use the port? Then set "
                "MASTER_PORT to a free one, on all nodes"
            )
        if time.monotonic() > deadline:
            raise _NotMetError(
                f"no rendezvous at {settings.endpoint} within {settings.rdzv_timeout} s ({reason}): is node 0 started, and "
                "can this node reach it? The node with NODE_RANK=0 holds it, or the one whose host name MASTER_ADDR is"
            )
        say(f"waiting for node 0 at {settings.endpoint}")


def _rendezvous_parameters(settings: LaunchSettings) -> RendezvousParameters:
    options: dict[str, Any] = {
        "join_timeout": settings.rdzv_timeout,
        "read_timeout": min(_STORE_SECONDS, settings.rdzv_timeout),
    }
    if settings.node_rank is not None and settings.max_nodes > 1:
        options["is_host"] = settings.node_rank == 0
    return RendezvousParameters(
        backend="c10d",
        endpoint=settings.endpoint,
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=settings.local_addr,
        **options,
    )


def _run(agent: NodeAgent, settings: LaunchSettings) -> int:
    """The agent to its end; returns the exit code."""
    try:
        agent.take_signals()
        result = agent.run()
    except SignalException as error:
        say(f"{error.sigval.name} ended it before its ranks were started")
        return 128 + error.sigval
    except RendezvousTimeoutError:
        raise _NotMetError(
            f"fewer than {settings.min_nodes} nodes have met at {settings.endpoint} within {settings.rdzv_timeout} s: look "
            "at the output of those that are missing, and whether all have the same --rdzv-id"
        ) from None
    except RendezvousClosedError:
        return _tell(agent, _verdict_elsewhere(agent))
    except RendezvousConnectionError as error:
        raise _NotMetError(
            f"the node that holds the rendezvous, {settings.endpoint}, is gone ({_reason(error)}): its output says why; "
            "start the run again on all nodes"
        ) from None
    if result is None:  # torch ends agents so that have waited for a place until the end
        say(f"not needed: the run has had {settings.max_nodes} other nodes")
        return 0
    return _tell(agent, agent.verdict) if result.is_failed() else 0


def _tell(agent: NodeAgent, verdict: Verdict | None) -> int:
    if verdict is None:
        raise _NotMetError(
            "the run has ended on another node, whose output says why; if this is to be a new run, give it another --rdzv-id"
        )
    if verdict.node != agent.name:
        say(f"{verdict.cause.removesuffix('; ' + ITS_OUTPUT)} on {verdict.node}; its output is there")
    elif not verdict.is_told:
        say(verdict.cause)
    return verdict.exit_code


def _verdict_elsewhere(agent: NodeAgent) -> Verdict | None:
    try:
        return agent.find_verdict()
    except RendezvousConnectionError:
        return None


def _num_ranks(text: str) -> int:
    try:
        return int(determine_local_world_size(text))
    except ValueError:
        raise UserError(f"--nproc-per-node {text}: there is no GPU on this node: give a number") from None


def _reason(error: BaseException) -> str:
    """What went wrong in the first place, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
