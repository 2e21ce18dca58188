"""Ranks of one start of a job find each other in its store, and those of two starts do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from megatron_ogpsa.system.processes import ATTEMPT_VARIABLE
from megatron_ogpsa.watchdog.board import STORE_VARIABLE, Address, Board

ELASTIC = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE", STORE_VARIABLE, ATTEMPT_VARIABLE)


@pytest.fixture
def port() -> Iterator[int]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ({}, {}, True),
        # Rank 0 holds the store. The agent of a node that was lost and has come anew begins to count.
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "0"}, True),
        # Plain torchrun on one node: one store for all starts.
        (
            {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            False,
        ),
        # Of a stage, in a process of its own, whose job says which start it is.
        (
            {"TORCHELASTIC_RESTART_COUNT": "1", ATTEMPT_VARIABLE: "0"},
            {"TORCHELASTIC_RESTART_COUNT": "0", ATTEMPT_VARIABLE: "0"},
            True,
        ),
        (
            {"TORCHELASTIC_USE_AGENT_STORE": "False", ATTEMPT_VARIABLE: "1"},
            {"TORCHELASTIC_USE_AGENT_STORE": "False", ATTEMPT_VARIABLE: "0"},
            False,
        ),
    ],
)
def test_ranks_of_one_start_share_a_board(
    port: int, monkeypatch: pytest.MonkeyPatch, first: dict[str, str], second: dict[str, str], meet: bool
) -> None:
    def board(environment: dict[str, str]) -> Board:
        for name in ELASTIC:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}.items():
            monkeypatch.setenv(name, value)
        return Board(Address.from_environment(), num_ranks=2)

    one, other = board(first), board(second)
    assert one.count("left") == 1
    assert other.count("left") == (2 if meet else 1)
