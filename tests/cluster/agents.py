"""Agents of one or two nodes on this machine, each as the command runs it, in processes forked from this one.

``python -m tests.cluster.agents JSON``: behaviour of the ranks, flags of all nodes, and which agent gets which signal once
all ranks are ready; or whether there is an agent too many, which gets SIGTERM before the last rank is told to go on. Agents
may open but 256 files to begin with. Prints how each ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from megatron_ogpsa.cluster.node import run_node
from megatron_ogpsa.cluster.settings import launch_settings
from megatron_ogpsa.system.ports import free_port
from megatron_ogpsa.system.processes import PARENT_VARIABLE, end_with_parent
from tests.cluster.ready import ready_file

RANKS_PER_NODE = 2
ROOT = Path(__file__).parents[2]


def start(node: int, num_nodes: int, port: int, behaviour: str, flags: dict[str, str]) -> int:
    """Fork the agent of a node; returns its process id."""
    parent, process_id = os.getpid(), os.fork()
    if process_id:
        return process_id
    end_with_parent(parent)
    environment = {}
    if num_nodes > 1:
        flags |= {"local-addr": "127.0.0.1"}
        environment = {"NNODES": str(num_nodes), "NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port)}
    settings = launch_settings({"nproc-per-node": str(RANKS_PER_NODE)} | flags, {}, environment)
    os.environ |= {PARENT_VARIABLE: str(os.getpid()), "PYTHONPATH": str(ROOT)}
    os._exit(run_node([sys.executable, "-m", "tests.cluster.ranks", behaviour], settings, _say_signal))


def _say_signal(received: signal.Signals) -> None:
    print(f"the command was told {received.name}", flush=True)


def main(request: str) -> None:
    """Run the agents that ``request`` describes."""
    case = json.loads(request)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    num_nodes, started = case["nodes"], case.get("started", case["nodes"])
    port = free_port()
    held = socket.create_server(("127.0.0.1", port)) if case.get("port is taken") else None
    agents = [start(node, num_nodes, port, case["ranks"], case.get("flags", {})) for node in range(started)]
    if "signal" in case:
        _wait_for_ranks(started * RANKS_PER_NODE)
        os.kill(agents[case.get("of node", 0)], signal.Signals[case["signal"]])
    if case.get("one too many"):
        _wait_for_ranks(started * RANKS_PER_NODE - 1)
        _end_at_once(start(num_nodes - 1, num_nodes, port, case["ranks"], case.get("flags", {})))
        Path("told").touch()
    for node, process_id in enumerate(agents):
        _, status = os.waitpid(process_id, 0)
        os.write(1, f"node {node}: {os.waitstatus_to_exitcode(status)}\n".encode())  # at once: the other may write too
    if held:
        held.close()


def _wait_for_ranks(number: int) -> None:
    while not all(ready_file(rank).exists() for rank in range(number)):
        time.sleep(0.02)


def _end_at_once(agent: int) -> None:
    """As soon as it decides what signals mean."""
    while not _catches(agent, signal.SIGTERM):
        time.sleep(0.02)
    os.kill(agent, signal.SIGTERM)
    _, status = os.waitpid(agent, 0)
    print(f"one too many: {os.waitstatus_to_exitcode(status)}", flush=True)


def _catches(process_id: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


if __name__ == "__main__":
    main(sys.argv[1])
