"""One rank as the pytest process sees it: a process, a socket of JSON messages, a log, and a file for its stack."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.harness.preloaded import PROJECT_ROOT, PreloadedCommand

STARTUP_SECONDS = 180.0
"""A cold disk needs most of a minute to import torch and Megatron."""

_POLL_SECONDS = 0.5
"""How often a wait looks whether a process has ended; its children may hold its end of the socket open."""

_STACK_SECONDS = 10.0


@dataclass(frozen=True)
class Reply:
    """A rank's message: how far it came (``ready``, ``done`` or ``clean``), or why it did not (``error``)."""

    kind: str
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the rank did what it was asked to do."""
        return self.error is None


class RankProcess:
    """Starts ``tests.harness.worker`` as one rank, in a session of its own so that its children end with it."""

    def __init__(self, index: int, world_size: int, store_port: int, folder: Path, preloaded: PreloadedCommand) -> None:
        self.index = index
        self._log = folder / f"rank{index}.log"
        self._stack = folder / f"rank{index}.stack"
        address = str(folder / f"rank{index}.socket")
        with socket.create_server(address, family=socket.AF_UNIX) as server:
            server.settimeout(STARTUP_SECONDS)
            self._process = preloaded.start(
                "tests.harness.worker",
                [address, str(self._stack)],
                folder=PROJECT_ROOT,
                output=self._log,
                environment=_environment(index, world_size, store_port),
            )
            accepted, _ = server.accept()
            accepted.settimeout(None)
            self._connection = Connection(accepted.detach())

    @property
    def pid(self) -> int:
        """The rank's process id, which is its process group's id too."""
        return self._process.pid

    @property
    def connection(self) -> Any:
        """What to wait on."""
        return self._connection

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a rank that has ended is noticed when its answer is awaited."""
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except BrokenPipeError:
            assert self._process.wait(_STACK_SECONDS) is not None

    def receive(self) -> Reply:
        """The next message, or an error with the end of the log if the process has ended."""
        try:
            if self._connection.poll():
                return Reply(**json.loads(self._connection.recv_bytes()))
        except (EOFError, ConnectionResetError):
            pass  # it ended: told below, with its exit status
        status = self._process.wait(_STACK_SECONDS)
        assert status is not None
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return Reply("ended", f"the process {how}; the end of its output:\n{self.log_tail()}")

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.wait(0) is not None

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the rank printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def request_stack(self) -> None:
        """Make the rank write the stacks of its threads, which works inside a collective too."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGUSR1)

    def read_stack(self) -> str:
        """What :meth:`request_stack` made the rank write."""
        limit = time.monotonic() + _STACK_SECONDS
        while time.monotonic() < limit and not self.has_ended():
            text = self._stack.read_text(errors="replace") if self._stack.exists() else ""
            time.sleep(0.1)
            # It is written line by line, and ends with the main thread's frames.
            if "(most recent call first)" in text and text == self._stack.read_text(errors="replace"):
                return text
        return "(no stack: the rank did not react)"

    def kill(self) -> None:
        """End the rank and its children, and reap it."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself, and so have its children
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(_STACK_SECONDS)


def wait_for_any(ranks: Sequence[RankProcess], seconds: float) -> list[RankProcess]:
    """The ranks that have something to receive (a message or their end); empty after a short while without any."""
    ready = wait([rank.connection for rank in ranks], timeout=max(0.0, min(seconds, _POLL_SECONDS)))
    return [rank for rank in ranks if rank.connection in ready or rank.has_ended()]


def _environment(index: int, world_size: int, store_port: int) -> dict[str, str]:
    """torchrun's variables, loopback only."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store_port),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
