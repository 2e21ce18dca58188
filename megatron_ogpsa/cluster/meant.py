"""Whether a process that has a rank's variables is meant to be a rank: otherwise what was said of starting ranks is lost."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_ogpsa.cluster.settings import MANY_NODES_VARIABLE
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.processes import PARENT_VARIABLE


def require_meant_as_rank(
    flags: Mapping[str, str], file: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> None:
    """In a rank: check that it was not to start ranks.

    In containers for PyTorch enroot's hook sets a rank's variables for each task of SLURM, also for the one task of a node
    that is to start the node's ranks.

    Args:
        flags: of starting ranks, key → value, of those that were given.
        file: the same, from the configuration's ``launch``, which torchrun's ranks do without.

    Raises:
        UserError: it was; names the variables, and what to do in either case.
    """
    asked = ", ".join(f"--{key} {text}" for key, text in flags.items())
    if environment.get(PARENT_VARIABLE) or "TORCHELASTIC_RUN_ID" in environment:
        if asked:
            raise UserError(
                f"{asked}: torchrun has started this rank, which starts no others: give torchrun such flags, before -m"
            )
        return
    where = "the flags"
    if not asked and environment.get(MANY_NODES_VARIABLE):
        asked, where = "launch/train_nodes.sh", "the script"
    if not asked and _differ(file.get("nproc-per-node"), environment):
        asked, where = f"launch.nproc-per-node {file['nproc-per-node']}", "it"
    if asked:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        found = ", ".join(f"{name}={environment[name]}" for name in names)
        unset = " ".join(f"-u {name}" for name in names)
        raise UserError(
            f"{asked}: {found} are set, as for each task of SLURM in a container for PyTorch, so that this is a rank and "
            f"would start none; to start ranks, begin the command with env {unset}; if this is to be one of them, leave "
            f"{where} out"
        )


def _differ(written: str | None, environment: Mapping[str, str]) -> bool:
    """Whether a node would have other ranks than it has: certainly, since not every launcher says how many these are."""
    local = _ranks_of_node(environment)
    if written in ("gpu", "auto"):
        import torch  # which most starts of the command do without

        return local is not None and torch.cuda.device_count() > local  # one GPU may be all that each rank sees
    if written is None or not written.isdigit() or not int(written):
        return False
    number = int(written)
    if local is not None:
        return number != local
    return int(environment["LOCAL_RANK"]) >= number or int(environment["WORLD_SIZE"]) % number > 0


def _ranks_of_node(environment: Mapping[str, str]) -> int | None:
    if given := environment.get("LOCAL_WORLD_SIZE"):
        return int(given)
    tasks, nodes = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_NUM_NODES")
    if not nodes or tasks != environment["WORLD_SIZE"]:  # ranks may be another launcher's, within one task
        return None
    return -(-int(tasks) // int(nodes))
