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
        group: holds each element of the model at least once.
        spans_data_parallel_copies: whether ``group`` also holds the data-parallel copies of a non-distributed
            optimizer.
    """

    group: dist.ProcessGroup
    spans_data_parallel_copies: bool


def reduction_of(optimizers: Sequence[MegatronOptimizer], chunks: Sequence[DistributedDataParallel]) -> Reduction:
    """Choose the ranks of the sums.

    Where Megatron reduces the gradient norm in one all-reduce, ours takes its place in the same group: one instance of
    the distributed optimizer, or the model-parallel ranks without it. Dense and expert parameters without the
    distributed optimizer have different groups, for which Megatron needs two all-reduces; then one goes over all ranks
    of the model, and data-parallel copies are left out of it by rank.
    """
    groups = [optimizer.get_grad_stats_parallel_group() for optimizer in optimizers]
    if all(group == groups[0] for group in groups):
        return Reduction(groups[0], spans_data_parallel_copies=False)
    collection = get_attr_wrapped_model(chunks[0], "pg_collection")
    group = getattr(collection, "intra_dist_opt", None)
    if group is None:
        group = parallel_state.get_intra_distributed_optimizer_instance_group()
    return Reduction(group, spans_data_parallel_copies=True)


def is_counted(parameter: NamedParameter, optimizer: MegatronOptimizer, reduction: Reduction) -> bool:
    """Whether this rank's copy of ``parameter`` enters sums over ``reduction.group``."""
    param = parameter.param
    counted = param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(
        param,
        tp_group=getattr(optimizer, "tp_group", None),
        expert_tp_group=getattr(optimizer, "expert_tp_group", None),
    )
    if reduction.spans_data_parallel_copies and not isinstance(optimizer, DistributedOptimizer):
        counted = counted and _data_parallel_group(parameter).rank() == 0
    return counted


def is_one_copy(parameter: NamedParameter) -> bool:
    """Whether this rank's copy of a model parameter is the one that stands for all of them in a sum over all ranks."""
    param, chunk = parameter.param, parameter.chunk
    group = chunk.expt_dp_group if _is_expert(param) else chunk.dp_cp_group
    return param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param) and group.rank() == 0


def _data_parallel_group(parameter: NamedParameter) -> dist.ProcessGroup:
    chunk = parameter.chunk
    group: dist.ProcessGroup = chunk.intra_expt_dp_group if _is_expert(parameter.param) else chunk.intra_dp_cp_group
    return group


def _is_expert(param: torch.nn.Parameter) -> bool:
    # Megatron marks what is reduced over the experts' own groups (core/tensor_parallel/layers.py).
    return not getattr(param, "allreduce", True)
