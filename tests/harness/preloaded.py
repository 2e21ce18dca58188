"""The command, started in a moment: forked from a process that has imported torch and Megatron already.

Importing them takes each rank 7 s of a core, longer than most tests train for. :class:`PreloadedCommand` keeps one
process that has done so; for each run it forks one that is the command, and that one forks the ranks, in place of
torchrun's agent. What torchrun itself does (and the command with its exit codes) is tested without this.

::

    pytest ── server (imports, no threads) ── command ┬─ rank 0
                                                      └─ rank 1
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_ogpsa.cluster.settings import LaunchSettings
from megatron_ogpsa.processes import PARENT_VARIABLE, end_with_parent

PROJECT_ROOT = Path(__file__).resolve().parents[2]

PRELOADED = (
    "datasets",
    "transformers",
    "megatron.training.training",
    "megatron_ogpsa.integration.program",
    "megatron_ogpsa.references",
    "megatron_ogpsa.reference_policy.passes",
)

THREADS_SAFE_TO_FORK = ("jemalloc_bg_thd",)
"""pyarrow's allocator has fork handlers for its own thread."""

END_SECONDS = 10.0
"""What other ranks get to end by themselves when one has failed."""


@dataclass(frozen=True)
class Finished:
    """How a run ended; ``exit_code`` is None if it was killed at its limit."""

    exit_code: int | None
    output: str


class PreloadedCommand:
    """``python -m MODULE ARGUMENTS`` with everything imported; one run at a time."""

    def __init__(self) -> None:
        """Starts the server, which imports while the tests go on."""
        self._connection, theirs = Pipe()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.preloaded", str(theirs.fileno()), str(os.getpid())],
                cwd=PROJECT_ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def run(self, module: str, arguments: Sequence[str], *, folder: Path, timeout: float) -> Finished:
        """Run to the end, or kill the command and its ranks after ``timeout`` seconds."""
        with tempfile.NamedTemporaryFile("r", prefix="ogpsa-output-", errors="replace") as output:
            request: dict[str, Any] = {"module": module, "arguments": list(arguments), "environment": dict(os.environ)}
            request |= {"folder": str(folder), "output": output.name}
            self._connection.send_bytes(json.dumps(request).encode())
            process_id = json.loads(self._connection.recv_bytes())
            exit_code = None
            if not self._connection.poll(timeout):
                os.killpg(process_id, signal.SIGKILL)
                self._connection.recv_bytes()
            else:
                exit_code = json.loads(self._connection.recv_bytes())
            return Finished(exit_code, output.read())

    def close(self) -> None:
        """End the server and what it has started."""
        self._connection.close()
        self._server.kill()
        self._server.wait()


def _serve(connection: Connection) -> None:
    """Fork one command after the other until pytest closes the pipe."""
    _preload()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        server = os.getpid()
        process_id = _fork()
        if process_id == 0:
            os.setsid()
            end_with_parent(server)
            connection.close()
            _become_command(request)
        connection.send_bytes(json.dumps(process_id).encode())
        _, status = os.waitpid(process_id, 0)
        connection.send_bytes(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def _preload() -> None:
    from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

    install_if_no_gpu()
    for name in PRELOADED:
        import_module(name)
    threads = {Path(folder, "comm").read_text().strip() for folder in Path("/proc/self/task").iterdir()}
    if others := threads - {Path("/proc/self/comm").read_text().strip(), *THREADS_SAFE_TO_FORK}:
        raise RuntimeError(f"threads {others} after the imports: a fork would leave their locks taken for ever")


def _become_command(request: Mapping[str, Any]) -> NoReturn:
    os.environ.clear()
    os.environ.update(request["environment"], OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a script has started in its background
    os.chdir(request["folder"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from megatron_ogpsa.cli import launching

    launching.launch = _launch_by_forking
    _run_as_main(request["module"], request["arguments"])


def _run_as_main(module: str, arguments: Sequence[str]) -> NoReturn:
    """Be ``python -m module arguments`` to the end of this process, exit handlers included."""
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # an earlier import of it would make runpy warn
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def _launch_by_forking(
    arguments: list[str], *, settings: LaunchSettings, environment: Mapping[str, str] | None = None
) -> int:
    """In place of :func:`megatron_ogpsa.cli.launching.launch`: the same variables, output, exit codes and signals.

    For one node, without restarts.
    """
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from megatron_ogpsa.cli import launching
    from megatron_ogpsa.cli.main import ERRORS_VARIABLE
    from megatron_ogpsa.cluster.failures import judge

    if settings.max_nodes > 1 or settings.max_restarts:
        raise RuntimeError("several nodes and restarts need torchrun's agent: fresh=True")
    num_ranks = int(settings.ranks_per_node)
    errors = tempfile.mkdtemp()  # not in a with statement, which each rank would leave too
    command, ranks = os.getpid(), dict[int, int]()
    os.environ.update({**(environment or {}), ERRORS_VARIABLE: errors, PARENT_VARIABLE: str(command)})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    for rank in range(num_ranks):
        process_id = _fork()
        if process_id == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
            os.environ.update(TORCHELASTIC_ERROR_FILE=f"{errors}/{rank}.json")
            _run_as_main(launching.RANK_MODULE, arguments)
        ranks[process_id] = rank
    told: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
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


def _fork() -> int:
    with warnings.catch_warnings():  # of threads; see THREADS_SAFE_TO_FORK
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    _serve(Connection(int(sys.argv[1])))
