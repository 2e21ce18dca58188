"""Every element of the model counts once in every sum over ranks.

Megatron keeps copies of some parameters: norms, biases and routers under tensor parallelism, tied embeddings on the
first and the last stage, and, without the distributed optimizer, everything under data parallelism. All copies are
projected with the same coefficients; exactly one of them enters the sums that give those coefficients. Which one
follows Megatron's own rule for the gradient norm (``MegatronOptimizer._filter_grads_for_norm`` in
``core/optimizer/optimizer.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import get_attr_wrapped_model

from megatron_ogpsa.sharding.names import NamedParameter


@dataclass(frozen=True)
class Reduction:
    """The ranks that a sum goes over.

    Attributes:
        group: every rank of the model, all its copies included: what is not finite on one of them is known to all.
        holds_copies: whether ``group`` holds data-parallel copies of what an optimizer updates.
    """

    group: dist.ProcessGroup | None
    holds_copies: bool


def reduction_of(optimizers: Sequence[MegatronOptimizer], chunks: Sequence[DistributedDataParallel]) -> Reduction:
    """Choose the ranks of the sums.

    With one instance of the distributed optimizer Megatron reduces the gradient norm over all ranks, and our all-reduce
    takes its place in the same group. Otherwise Megatron's goes over the ranks of one copy of the model, or needs two
    groups (dense and expert parameters); ours goes over all ranks then too, and counts one copy: copies that decided each
    for itself would part if memory failed in one of them.
    """
    groups = [optimizer.get_grad_stats_parallel_group() for optimizer in optimizers]
    instances = chunks[0].ddp_config.num_distributed_optimizer_instances
    are_distributed = all(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers)
    if are_distributed and instances == 1 and all(group == groups[0] for group in groups):
        return Reduction(groups[0], holds_copies=False)
    if instances > 1:
        return Reduction(dist.group.WORLD, holds_copies=True)
    collection = get_attr_wrapped_model(chunks[0], "pg_collection")
    group = getattr(collection, "intra_dist_opt", None)
    if group is None:
        group = parallel_state.get_intra_distributed_optimizer_instance_group()
    return Reduction(group, holds_copies=True)


def is_counted(parameter: NamedParameter, optimizer: MegatronOptimizer, reduction: Reduction) -> bool:
    """Whether this rank's copy of ``parameter`` enters sums over ``reduction.group``."""
    param = parameter.param
    is_own = is_split_unmarked(parameter) or param_is_not_tensor_parallel_duplicate(
        param,
        tp_group=getattr(optimizer, "tp_group", None),
        expert_tp_group=getattr(optimizer, "expert_tp_group", None),
    )
    counted = is_own and param_is_not_shared(param)
    return counted and (not reduction.holds_copies or _copies_group(parameter, optimizer).rank() == 0)


def is_one_copy(parameter: NamedParameter) -> bool:
    """Whether this rank's copy of a model parameter is the one that stands for all of them in a sum over all ranks."""
    param, chunk = parameter.param, parameter.chunk
    group = chunk.expt_dp_group if _is_expert(param) else chunk.dp_cp_group
    is_own = is_split_unmarked(parameter) or param_is_not_tensor_parallel_duplicate(
        param, expert_tp_group=parallel_state.get_expert_tensor_parallel_group(check_initialized=False)
    )
    return is_own and param_is_not_shared(param) and group.rank() == 0


def is_split_unmarked(parameter: NamedParameter) -> bool:
    """Whether tensor parallelism splits a parameter, over its rows, that Megatron 0.19 does not mark as split.

    The attention sinks of ``--softmax-type learnable``, a number for each of a rank's heads
    (``core/transformer/dot_product_attention.py``); checkpoints know them as split. By Megatron's rule those of the first
    rank would stand for all, as copies do.
    """
    return parameter.name.endswith(".softmax_offset")


def _copies_group(parameter: NamedParameter, optimizer: MegatronOptimizer) -> dist.ProcessGroup:
    """Ranks that hold copies of what ``optimizer`` updates of ``parameter``: instances, or data-parallel ranks."""
    chunk = parameter.chunk
    group: dist.ProcessGroup
    if isinstance(optimizer, DistributedOptimizer):
        group = chunk.inter_dist_opt_group
    else:
        group = chunk.intra_expt_dp_group if _is_expert(parameter.param) else chunk.intra_dp_cp_group
    return group


def _is_expert(param: torch.nn.Parameter) -> bool:
    # Megatron marks what is reduced over the experts' own groups (core/tensor_parallel/layers.py).
    return not getattr(param, "allreduce", True)
