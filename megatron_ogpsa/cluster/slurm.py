"""What SLURM says of the job step that this process belongs to. Pure.

Only a step counts, which is what ``srun`` starts: within ``salloc`` or a batch script there are nodes, but this process
runs on one of them, once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from megatron_ogpsa.cluster.value import Value
from megatron_ogpsa.errors import UserError

_FIRST_PORT, _NUM_PORTS = 20000, 10000
"""A port for each job, below those that Linux gives to outgoing connections."""

ONE_AGENT_A_NODE = "start one on each node: srun --ntasks-per-node=1"


def step_values(environment: Mapping[str, str]) -> dict[str, Value]:
    """Key of the launch settings → what the step says; empty outside of one.

    Raises:
        UserError: the step has several tasks on a node, or a variable is not what SLURM would write.
    """
    count = _variable(environment, "SLURM_STEP_NUM_NODES")
    hosts = _variable(environment, "SLURM_STEP_NODELIST")
    job = _variable(environment, "SLURM_JOB_ID")
    if not (count and hosts and job):
        return {}
    tasks = _variable(environment, "SLURM_STEP_NUM_TASKS")
    if tasks and tasks.whole(at_least=1) != count.whole(at_least=1):
        raise UserError(
            f"SLURM has started {tasks.text} of this command on {count.text} nodes ({tasks.place}, {count.place}), and each "
            f"starts ranks of its own: {ONE_AGENT_A_NODE}"
        )
    values = {
        "nnodes": count,
        "rdzv-endpoint": Value(host_names(hosts)[0], hosts.place),
        "port": Value(str(_FIRST_PORT + job.whole(at_least=0) % _NUM_PORTS), job.place),
        "rdzv-id": Value(f"slurm-{job.text}.{environment.get('SLURM_STEP_ID', '')}", job.place),
    }
    if node := _variable(environment, "SLURM_NODEID"):
        values["node-rank"] = node
    return values


def require_one_node(environment: Mapping[str, str]) -> None:
    """Where nothing says how many nodes there are.

    Raises:
        UserError: SLURM has given several, but the command was started on one of them.
    """
    count = _variable(environment, "SLURM_NNODES") or _variable(environment, "SLURM_JOB_NUM_NODES")
    if count and environment.get("SLURM_JOB_ID") and count.whole(at_least=1) > 1:
        raise UserError(
            f"SLURM has given this job {count.text} nodes ({count.place}), but the command was started on one of them: "
            f"{ONE_AGENT_A_NODE}; or give --nnodes 1 to use this node alone"
        )


def host_names(nodes: Value) -> list[str]:
    """The hosts of SLURM's compact form, such as ``node[001-003,007],login1``, in its order.

    Raises:
        UserError: not of that form.
    """
    names: list[str] = []
    for pattern in re.findall(r"(?:\[[^\]]*\]|[^,])+", nodes.text):
        parts = re.split(r"\[([^\[\]]*)\]", pattern)  # text and bracket in turn
        if set("[]") & set("".join(parts[::2])):
            raise nodes.error("not a list of nodes as SLURM writes it")
        choices = [_numbers(part, nodes) if position % 2 else [part] for position, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    if not names:
        raise nodes.error("not a list of nodes as SLURM writes it")
    return names


def _numbers(bracket: str, nodes: Value) -> list[str]:
    numbers: list[str] = []
    for part in bracket.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise nodes.error("not a list of nodes as SLURM writes it")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _variable(environment: Mapping[str, str], name: str) -> Value | None:
    return Value(environment[name], name) if environment.get(name) else None
