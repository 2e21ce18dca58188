"""The collectives of attaching, of a step and of a refresh's Gram matrices: a sum of small fp64 tables, a union of names."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(table: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``table`` (fp64, contiguous) over ``group`` in place; every rank gets the same bits.

    Once per refresh it carries the Gram matrices, once per step the coefficients together with ‖g‖², in place of
    Megatron's own all-reduce of the norm.
    """
    dist.all_reduce(table, op=dist.ReduceOp.SUM, group=group)
    return table


def union_of_names(names: list[str], group: dist.ProcessGroup | None) -> list[str]:
    """All names that any rank of ``group`` holds, sorted, so that every rank numbers them alike."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, names, group=group)
    return sorted(set().union(*gathered))
