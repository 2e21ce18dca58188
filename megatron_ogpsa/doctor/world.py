"""How many ranks a run has, and how many of them this machine can start. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ogpsa.cluster.settings import number_of_nodes
from megatron_ogpsa.system.processes import is_rank

MOST_RANKS_ON_CPU = 16
"""Ranks that are started for a trial where there is no GPU to limit them."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Ranks of a run.

    Attributes:
        size: of all nodes; None where nobody has said it, so that it is the least that the layout needs.
        local: of this node.
        is_job: whether this process is a rank of a job that torchrun or its like has started.
    """

    size: int | None
    local: int
    is_job: bool = False

    def of_layout(self, least: int) -> int:
        """Ranks of a run whose layout needs at least ``least`` of them."""
        return self.size or least


def find_world(
    flag: int | None,
    file: Mapping[str, str],
    *,
    nodes: str | None = None,
    gpus: int,
    environment: Mapping[str, str] = os.environ,
) -> World:
    """What the environment of a job says; else the command line; else the configuration's ``launch``.

    Args:
        flag: ``--nproc-per-node``.
        nodes: ``--nnodes``; else as in training, by NNODES, the file or SLURM.
        file: ``launch`` of the configuration: nproc-per-node (a number, ``gpu`` or ``auto``) and nnodes (N or MIN:MAX).
        gpus: of this machine.

    Raises:
        UserError: a number of nodes that is not possible.
    """
    if is_rank(environment):
        size = int(environment["WORLD_SIZE"])
        # torchrun says how many are on this node, srun and mpirun do not: then one for each GPU.
        return World(size=size, local=int(environment.get("LOCAL_WORLD_SIZE", min(size, gpus or size))), is_job=True)
    written = str(file.get("nproc-per-node", ""))
    by_machine = {"gpu": gpus or 1, "auto": gpus or os.cpu_count() or 1}
    local = flag or by_machine.get(written) or (int(written) if written.isdigit() else None)
    if local is None:
        return World(size=None, local=1)
    return World(size=local * number_of_nodes(nodes, file, environment)[1], local=local)


def can_start(ranks: int, *, gpus: int) -> bool:
    """Whether this machine alone can run so many."""
    return ranks <= (gpus or MOST_RANKS_ON_CPU)
