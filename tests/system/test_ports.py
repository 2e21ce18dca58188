"""Ports for ranks to meet at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system import ports


def test_a_port_is_free_and_none_that_outgoing_connections_get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "range").write_text("10000\t14999\n", encoding="ascii")
    monkeypatch.setattr(ports, "_OUTGOING", tmp_path / "range")
    assert not any(10000 <= ports.free_port() <= 14999 for _ in range(20))
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "range").write_text(f"{port + 20}\t{port + 39}\n", encoding="ascii")
        monkeypatch.setattr(ports, "_PORTS", range(port, port + 40))
        assert all(port < ports.free_port() < port + 20 for _ in range(20))
        monkeypatch.setattr(ports, "_PORTS", range(port, port + 1))
        with pytest.raises(UserError, match=r"no port from \d+ to \d+ is free on this node"):
            ports.free_port()


def test_processes_that_seed_alike_choose_differently() -> None:
    chosen = set()
    for _ in range(5):
        random.seed(1234)
        chosen.add(ports.free_port())
    assert len(chosen) > 1
