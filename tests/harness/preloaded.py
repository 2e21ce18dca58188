"""Commands, started in a moment: forked from a process that has imported torch and Megatron already.

Importing them takes each rank 7 s of a core, longer than most tests train for. :class:`PreloadedCommand` keeps one
process that has done so; for each run it forks one that is the command, and that one forks the ranks: by itself, which is
quickest, or with ``agent=True`` as users have it, by torchrun's agent with all that it does. (That the command and its
ranks import what they need is tested without this.)

::

    pytest ── server (imports, no threads) ── command ┬─ rank 0
                                                      └─ rank 1
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_ogpsa.cluster.settings import LaunchSettings
from megatron_ogpsa.system import ports
from megatron_ogpsa.system.ports import free_port
from megatron_ogpsa.system.processes import PARENT_VARIABLE, end_with_parent
from tests.harness.docstrings import keep_docstrings
from tests.harness.forking import fork_module, fork_python_modules

PROJECT_ROOT = Path(__file__).resolve().parents[2]

PRELOADED = (
    "datasets",
    "transformers",
    "megatron.training.training",
    "megatron_ogpsa.integration.program",
    "megatron_ogpsa.references.gradients",
    "megatron_ogpsa.reference_policy.passes",
    "megatron_ogpsa.cluster.node",
)

VERBS_WITHOUT_A_DEVICE = ("convert", "plan")
"""They choose where tensors live before Megatron is imported, which here has happened."""

THREADS_SAFE_TO_FORK = ("jemalloc_bg_thd",)
"""pyarrow's allocator has fork handlers for its own thread."""

END_SECONDS = 10.0
"""What other ranks get to end by themselves when one has failed."""


@dataclass(frozen=True)
class Finished:
    """How a run ended; ``exit_code`` is None if it was killed at its limit."""

    exit_code: int | None
    output: str


class Running:
    """A command that has been started. Its ranks end with it.

    Attributes:
        pid: its process id, and its process group's.
    """

    def __init__(self, pid: int, output: Path, owner: PreloadedCommand) -> None:
        self.pid = pid
        self._output, self._owner = output, owner

    @property
    def output(self) -> str:
        """What it and its ranks have written so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float) -> int | None:
        """Its exit code, or None if it still runs after so many seconds."""
        return self._owner._exit_code(self.pid, timeout)

    def kill(self) -> None:
        """End the command, if it still runs, without a chance to tell its ranks."""
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(END_SECONDS)


class PreloadedCommand:
    """``python -m MODULE ARGUMENTS`` with everything imported."""

    def __init__(self, *, prepare: str = "") -> None:
        """Starts the server, which imports while the tests go on.

        Args:
            prepare: ``"package.module:function"`` that the server calls before it imports Megatron.
        """
        self._exit_codes: dict[int, int] = {}
        self._connection, theirs = Pipe()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.preloaded", str(theirs.fileno()), str(os.getpid()), prepare],
                cwd=PROJECT_ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        folder: Path,
        output: Path,
        environment: Mapping[str, str] | None = None,
        agent: bool = False,
        network: Path | None = None,
    ) -> Running:
        """Start and return at once.

        Args:
            output: what the command and its ranks write is appended to this file.
            environment: variables besides those of this process.
            agent: start ranks by torchrun's agent, and any other ``python -m``, as users have it, but forked.
            network: the namespace to run in, as a file of ``/proc``.
        """
        request: dict[str, Any] = {"module": module, "arguments": list(arguments), "folder": str(folder)}
        request |= {"environment": {**os.environ, **(environment or {})}, "output": str(output)}
        request |= {"agent": agent, "network": str(network) if network else None}
        output.touch()
        self._connection.send_bytes(json.dumps(request).encode())
        while (process_id := self._receive()) is None:
            pass
        self._exit_codes.pop(process_id, None)  # of an ended process whose id has come again
        return Running(process_id, output, self)

    def run(
        self, module: str, arguments: Sequence[str], *, folder: Path, timeout: float, agent: bool = False
    ) -> Finished:
        """Run to the end, or kill the command and its ranks after ``timeout`` seconds."""
        with tempfile.NamedTemporaryFile(prefix="ogpsa-output-") as file:
            command = self.start(module, arguments, folder=folder, output=Path(file.name), agent=agent)
            exit_code = command.wait(timeout)
            if exit_code is None:
                os.killpg(command.pid, signal.SIGKILL)
                command.wait(END_SECONDS)
            return Finished(exit_code, command.output)

    def close(self) -> None:
        """End the server and what it has started."""
        self._connection.close()
        self._server.kill()
        self._server.wait()

    def _exit_code(self, process_id: int, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        while process_id not in self._exit_codes and self._connection.poll(max(0.0, deadline - time.monotonic())):
            self._receive()
        return self._exit_codes.get(process_id)

    def _receive(self) -> int | None:
        """The next message: the id of a command that was started, or None after an exit code was noted."""
        message = json.loads(self._connection.recv_bytes())
        if "ended" in message:
            self._exit_codes[message["ended"]] = message["exit_code"]
            return None
        return int(message["started"])


def _serve(connection: Connection, setup: str) -> None:
    """Fork what is asked for, and tell how it ended, until pytest closes the pipe."""
    if setup:
        module, _, function = setup.partition(":")
        getattr(import_module(module), function)()
    else:
        # Where there is a GPU, importing it starts a thread of the driver's, although GPUs are hidden. Tests that are not
        # marked ``gpu`` are of layers without it, or over emulated kernels.
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    _preload()
    running: dict[int, int] = {}  # process id by its file descriptor, which can be read when the process has ended
    while True:
        for ready in wait([connection, *running]):
            if isinstance(ready, int):
                process_id = running.pop(ready)
                os.close(ready)
                _, status = os.waitpid(process_id, 0)
                message = {"ended": process_id, "exit_code": os.waitstatus_to_exitcode(status)}
            else:
                try:
                    request = json.loads(connection.recv_bytes())
                except EOFError:
                    return
                prepare = partial(_prepare_command, request, connection, os.getpid())
                message = {"started": fork_module(request["module"], request["arguments"], prepare)}
                running[os.pidfd_open(message["started"])] = message["started"]
            connection.send_bytes(json.dumps(message).encode())


def _preload() -> None:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    for name in PRELOADED:
        import_module(name)
    from megatron_ogpsa.integration.arguments.parser import build_parser

    keep_docstrings()
    build_parser()
    ports._PORTS = _own_ports(ports._PORTS, os.environ.get("PYTEST_XDIST_WORKER", "gw0"))
    threads = {Path(folder, "comm").read_text().strip() for folder in Path("/proc/self/task").iterdir()}
    if others := threads - {Path("/proc/self/comm").read_text().strip(), *THREADS_SAFE_TO_FORK}:
        raise RuntimeError(f"threads {others} after the imports: a fork would leave their locks taken for ever")


def _own_ports(every: range, worker: str) -> range:
    """A tenth of them for each process of pytest: some seconds pass until a port is bound, and two may choose one."""
    share = len(every) // 10
    start = every.start + share * (int(worker.removeprefix("gw")) % 10)
    return range(start, start + share)


def _prepare_command(request: Mapping[str, Any], connection: Connection, server: int) -> None:
    os.setsid()
    end_with_parent(server)
    connection.close()
    os.environ.clear()
    os.environ.update(request["environment"], OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a script has started in its background
    os.chdir(request["folder"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if request["network"]:
        os.setns(os.open(request["network"], os.O_RDONLY), os.CLONE_NEWNET)
    if request["agent"]:
        fork_python_modules(but_with=VERBS_WITHOUT_A_DEVICE)
    else:
        from megatron_ogpsa.cli import launching

        launching.launch = _launch_by_forking


def _launch_by_forking(
    arguments: list[str],
    *,
    settings: LaunchSettings,
    environment: Mapping[str, str] | None = None,
    on_signal: Callable[[signal.Signals], None] = lambda _: None,
) -> int:
    """In place of :func:`megatron_ogpsa.cli.launching.launch`: the same variables, output, exit codes and signals.

    For one node, without restarts.
    """
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from megatron_ogpsa.cli import launching
    from megatron_ogpsa.cluster.failures import judge
    from megatron_ogpsa.console.telling import ERRORS_VARIABLE

    if settings.max_nodes > 1 or settings.max_restarts:
        raise RuntimeError("several nodes and restarts need torchrun's agent: agent=True")
    num_ranks = int(settings.ranks_per_node)
    errors, ranks = tempfile.mkdtemp(), dict[int, int]()
    os.environ.update({**(environment or {}), ERRORS_VARIABLE: errors, PARENT_VARIABLE: str(os.getpid())})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": f"{errors}/{rank}.json"}
        own |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        ranks[fork_module(launching.RANK_MODULE, arguments, partial(os.environ.update, own))] = rank
    told: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        on_signal(signal.Signals(number))
        for process_id in ranks:
            os.kill(process_id, number)

    signal.signal(signal.SIGTERM, hand_on)
    codes = _wait(ranks)
    failures = {rank: ProcessFailure(rank, 0, code, f"{errors}/{rank}.json") for rank, code in codes.items() if code}
    shutil.rmtree(errors)
    if told and any(codes.values()):
        return 128 + told[0]
    if not failures:
        return 0
    judged = judge(failures)
    if not judged.is_told:
        print(f"megatron-ogpsa: {judged.cause}", file=sys.stderr)
    return judged.exit_code


def _wait(ranks: dict[int, int]) -> dict[int, int]:
    """Exit codes by rank, in the order in which ranks ended; if one fails the others are ended."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while ranks:
        process_id, status = os.waitpid(-1, os.WNOHANG)
        if process_id in ranks:
            codes[ranks.pop(process_id)] = os.waitstatus_to_exitcode(status)
            if any(codes.values()) and deadline == float("inf"):
                deadline = time.monotonic() + END_SECONDS
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
                    os.kill(other, signal.SIGCONT)  # a stopped one would not see the other signal
        elif time.monotonic() > deadline:
            deadline = float("inf")
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return codes


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    _serve(Connection(int(sys.argv[1])), sys.argv[3])
