"""Signals that reach a node's agent while torch starts its ranks, or ends them to start them again."""

from __future__ import annotations

import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.multiprocessing import SignalException

from megatron_ogpsa.cluster.agent import NodeAgent, Verdict


def agent_of(*ranks: subprocess.Popen[bytes]) -> Any:
    """An agent as it is before torch has noted that its ranks are healthy."""
    agent: Any = NodeAgent.__new__(NodeAgent)
    agent._worker_group = SimpleNamespace(state=WorkerState.INIT)
    agent._pcontext = SimpleNamespace(
        subprocess_handlers={i: SimpleNamespace(proc=rank) for i, rank in enumerate(ranks)}
    )
    agent._told, agent._patience, agent._on_signal = None, 60.0, lambda _: None
    return agent


def test_ranks_that_have_just_been_started_get_the_signal() -> None:
    """torch looks its host's name up, for each rank, before it calls them healthy."""
    rank = subprocess.Popen(["sleep", "600"])
    agent = agent_of(rank)
    agent._hand_on(signal.SIGTERM, None)
    assert rank.wait(60) == -signal.SIGTERM
    assert agent._told == signal.SIGTERM


def test_where_there_are_no_ranks_the_agent_ends() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(SignalException, match="SIGTERM"):
        agent_of(ended)._hand_on(signal.SIGTERM, None)


def test_ranks_are_not_started_again_after_a_signal() -> None:
    """It came while those before were being ended, because a node had joined: nobody would tell the new ones. The other
    nodes learn of it before they could count on this one."""
    agent = agent_of()
    agent._told, agent.name = signal.SIGTERM, "here"
    agent._worker_group = SimpleNamespace(state=WorkerState.STOPPED, group_world_size=2, store=HashStore())
    agent._worker_group.store.add("megatron-ogpsa/known-by", 1)  # the other node's
    with pytest.raises(SignalException, match="SIGTERM"):
        agent._rendezvous(agent._worker_group)
    assert agent.find_verdict() == Verdict(143, "SIGTERM ended the ranks", "here")
