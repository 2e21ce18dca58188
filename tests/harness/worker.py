"""The side of a worker group that lives in a rank: join the process group once, then run jobs until pytest is gone.

Started by :class:`tests.harness.rank.RankProcess` as ``python -m tests.harness.worker SOCKET STACK_FILE``.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu
from tests.harness.isolation import fresh_state


def main() -> None:
    """Answer each job with ``done`` and then ``clean``, or with the traceback in place of the first that fails."""
    address, stack_file = sys.argv[1:]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=open(stack_file, "w"))  # noqa: SIM115 (open as long as the process)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        connection = Connection(client.detach())
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(connection, jobs), daemon=True).start()

    if _answer(connection, "ready", _join):
        while True:
            message = jobs.get()
            with fresh_state() as clean_up:
                if not _answer(connection, "done", partial(_run, message)):
                    continue  # the group is about to be stopped
                _answer(connection, "clean", clean_up)


def _read_jobs(connection: Connection, jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Queue the jobs. The socket closes when pytest is done or dead: end at once then, even inside a collective."""
    try:
        while True:
            jobs.put(json.loads(connection.recv_bytes()))
    except (EOFError, ConnectionResetError):
        os.killpg(0, signal.SIGKILL)  # with the children that a job may have left, as this rank leads its session


def _join() -> None:
    install_if_no_gpu()
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    dist.barrier()


def _run(message: dict[str, Any]) -> None:
    """Call the job and write what it returns, checked here so that a result of a wrong type is its own rank's error."""
    request = json.loads(message["request"])
    module_name, _, function_name = request["job"].partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    torch.save(function(**request["kwargs"]), message["results"])
    torch.load(message["results"], weights_only=True)


def _answer(connection: Connection, kind: str, action: Callable[[], None]) -> bool:
    error = None
    try:
        action()
    except BaseException:  # SystemExit is a failure of the job as well
        error = traceback.format_exc()
        print(error, file=sys.stderr)
    connection.send_bytes(json.dumps({"kind": kind, "error": error}).encode())
    return error is None


if __name__ == "__main__":
    main()
