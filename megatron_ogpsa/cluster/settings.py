"""What starting a run takes, from flags, the configuration's ``launch``, the environment and SLURM. Pure.

Names and meanings are torchrun's. Flags win over ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, these over
the file, and the file over what SLURM says of the job step.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ogpsa.cluster import slurm
from megatron_ogpsa.cluster.value import Value
from megatron_ogpsa.errors import UserError

FLAGS = {
    "nproc-per-node": ("N|gpu|auto", "ranks on each node: a number, one for each GPU, or auto: GPUs, else cores (1)"),
    "nnodes": ("N|MIN:MAX", "nodes of the run; a range lets nodes come and go (NNODES, or 1)"),
    "node-rank": (
        "N",
        "this node's number; 0 holds the rendezvous, without one it is the node of its name (NODE_RANK)",
    ),
    "rdzv-endpoint": ("HOST[:PORT]", "where nodes meet: node 0, and a free port there (MASTER_ADDR:MASTER_PORT)"),
    "rdzv-id": ("NAME", "of this run, the same on all nodes"),
    "rdzv-timeout": ("SECONDS", "that nodes wait for one another (600)"),
    "local-addr": ("HOST", "by which other nodes reach this one, if its own host name will not do"),
    "max-restarts": ("N", "times that ranks are started again after a failure, from the last checkpoint (0)"),
    "monitor-interval": ("SECONDS", "from one look at the ranks to the next (0.1)"),
    "shutdown-timeout": ("SECONDS", "that ranks get to save and end after SIGTERM (600)"),
}
"""Key → how its value looks, and what ``--help`` says; the flag is ``--KEY``."""

OF_ONE_NODE = ("node-rank", "local-addr")
"""Keys that a configuration, which is the same on all nodes, cannot hold."""

FILE_KEYS = tuple(key for key in FLAGS if key not in OF_ONE_NODE)

DEFAULT_PORT = 29500
"""torchrun's, where ``MASTER_ADDR`` has none."""

_PORT = "port"
"""Of an endpoint that is a host alone."""

MANY_NODES_VARIABLE = "MEGATRON_OGPSA_MANY_NODES"
"""Set by launch/train_nodes.sh, where a run of one node on each would be a mistake."""

_VARIABLES = {"nnodes": "NNODES", "node-rank": "NODE_RANK", "rdzv-endpoint": "MASTER_ADDR", _PORT: "MASTER_PORT"}


@dataclass(frozen=True)
class LaunchSettings:
    """How the agent of this node starts its ranks.

    Attributes:
        ranks_per_node: a number, ``gpu`` or ``auto``; only the node itself knows how many GPUs it has.
        node_rank: 0 for the node that holds the rendezvous; None: the node whose host name or address is the endpoint's.
        endpoint: host and port of the rendezvous.
        run_id: the same on all nodes of a run.
        local_addr: under which other nodes reach this one; None: by its host name.
        shutdown_timeout: seconds from SIGTERM to SIGKILL.
    """

    ranks_per_node: str = "1"
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int | None = None
    endpoint: str = "localhost:0"
    run_id: str = ""
    rdzv_timeout: int = 600
    local_addr: str | None = None
    max_restarts: int = 0
    monitor_interval: float = 0.1
    shutdown_timeout: float = 600.0


def launch_settings(
    flags: Mapping[str, str], file: Mapping[str, str], environment: Mapping[str, str], *, run_id: str = "megatron-ogpsa"
) -> LaunchSettings:
    """Settings of this node.

    Args:
        flags: key → value, of those that were given.
        file: the same, from the configuration's ``launch``.
        run_id: of a run on several nodes, if nothing gives it one; the same on all of them.

    Raises:
        UserError: values that are not possible, do not go together, or are missing; names the flag or the variable.
    """
    step = slurm.step_values(environment)
    given = step | {key: Value(text, f"launch.{key}") for key, text in file.items()}
    given |= {key: Value(environment[name], name) for key, name in _VARIABLES.items() if environment.get(name)}
    given |= {key: Value(text, f"--{key}") for key, text in flags.items()}
    least, most = _nodes(given, step, environment)
    return LaunchSettings(
        ranks_per_node=_ranks_per_node(given.get("nproc-per-node", Value("1", ""))),
        min_nodes=least,
        max_nodes=most,
        node_rank=_node_rank(given.get("node-rank"), given.get("nnodes"), most),
        endpoint=_endpoint(given, most),
        run_id=given["rdzv-id"].text if "rdzv-id" in given else run_id if most > 1 else uuid.uuid4().hex,
        rdzv_timeout=_whole(given, "rdzv-timeout", 600, at_least=1),
        local_addr=given["local-addr"].text if "local-addr" in given else "127.0.0.1" if most == 1 else None,
        max_restarts=_whole(given, "max-restarts", 0, at_least=0),
        monitor_interval=_seconds(given, "monitor-interval", 0.1),
        shutdown_timeout=_seconds(given, "shutdown-timeout", 600.0),
    )


def number_of_nodes(flag: str | None, file: Mapping[str, str], environment: Mapping[str, str]) -> tuple[int, int]:
    """The fewest and the most nodes, as :func:`launch_settings` takes them.

    Args:
        flag: ``--nnodes``, if it was given.

    Raises:
        UserError: a value that is not possible.
    """
    step = slurm.step_values(environment)
    given = step | {key: Value(text, f"launch.{key}") for key, text in file.items()}
    if environment.get(_VARIABLES["nnodes"]):
        given["nnodes"] = Value(environment[_VARIABLES["nnodes"]], _VARIABLES["nnodes"])
    if flag:
        given["nnodes"] = Value(flag, "--nnodes")
    return _nodes(given, step, {})


def _nodes(given: Mapping[str, Value], step: Mapping[str, Value], environment: Mapping[str, str]) -> tuple[int, int]:
    if "nnodes" not in given:
        slurm.require_one_node(environment)
        if environment.get(MANY_NODES_VARIABLE):
            raise UserError(
                f"{_VARIABLES['nnodes']} is not set: give the number of nodes, by it, --nnodes or launch.nnodes in the "
                "configuration, or use launch/train.sh"
            )
        return 1, 1
    value = given["nnodes"]
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value.text)
    if not match:
        raise value.error("write a number of nodes, or MIN:MAX")
    least, most = int(match[1]), int(match[2] or match[1])
    if not 1 <= least <= most:
        raise value.error("use 1 or more, and no less for MAX than for MIN")
    if "nnodes" in step and most > 1 and not least <= int(step["nnodes"].text) <= most:
        raise value.error(
            f"srun has started this on {step['nnodes'].text} nodes ({step['nnodes'].place}): leave {value.place} out, or "
            "start as many"
        )
    return least, most


def _node_rank(value: Value | None, nnodes: Value | None, most: int) -> int | None:
    if value is None:
        return None
    rank = value.whole(at_least=0)
    if most == 1 and (value.place.startswith("SLURM") or (nnodes and not value.place.startswith("--"))):
        return None  # one of several nodes, on which a run of its own was asked for
    if rank >= most:
        of = f"{nnodes.place} is {nnodes.text}" if nnodes else "there is one node: set NNODES or --nnodes"
        raise value.error(f"nodes are counted from 0, and {of}")
    return rank


def _endpoint(given: Mapping[str, Value], most: int) -> str:
    value = given.get("rdzv-endpoint")
    if most == 1 and (value is None or not value.place.startswith(("--", "launch."))):
        return "localhost:0"  # whoever has MASTER_ADDR set for other programs means several nodes by it
    if value is None:
        raise UserError(
            f"{given['nnodes'].place} says {given['nnodes'].text} nodes, but not where they meet: set MASTER_ADDR to the "
            "host name of node 0, or give --rdzv-endpoint HOST:PORT"
        )
    match = re.fullmatch(r"(\[[^\]\s]+\]|[^:\[\]\s]+)(?::(\d+))?", value.text)
    if not match:
        raise value.error("write HOST or HOST:PORT, an IPv6 address in brackets")
    port = Value(match[2], value.place) if match[2] else given.get(_PORT, Value(str(DEFAULT_PORT), ""))
    number = port.whole(at_least=1)
    if number > 65535:
        raise port.error("ports end at 65535")
    return f"{match[1]}:{number}"


def _ranks_per_node(value: Value) -> str:
    return value.text if value.text in ("gpu", "auto") else str(value.whole(at_least=1, others=", gpu or auto"))


def _whole(given: Mapping[str, Value], key: str, default: int, *, at_least: int) -> int:
    return given[key].whole(at_least=at_least) if key in given else default


def _seconds(given: Mapping[str, Value], key: str, default: float) -> float:
    return given[key].seconds() if key in given else default
