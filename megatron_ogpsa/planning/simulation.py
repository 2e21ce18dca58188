"""What one rank of a cluster that is not there would hold.

Read off Megatron's own objects (:mod:`megatron_ogpsa.integration.runtime.fake_world`) by the same code as in training
(:mod:`megatron_ogpsa.sharding`). 1,024 ranks one after the other take minutes, and one of each pipeline stage, which is all
that a plan needs, seconds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ogpsa.integration.runtime.cpu import META
from megatron_ogpsa.integration.runtime.fake_world import build_chunks, build_optimizer, fake_world
from megatron_ogpsa.planning.costs import ShardSize, share_on_accelerator, state_bytes
from megatron_ogpsa.sharding.gradients import Piece, leaf_optimizers, pieces_of
from megatron_ogpsa.sharding.logical import logical_name, logical_runs, row_pattern
from megatron_ogpsa.sharding.names import NamedParameter, named_parameters
from megatron_ogpsa.sharding.ownership import is_split_unmarked, reduction_of


@dataclass(frozen=True, kw_only=True)
class HeldPiece:
    """The elements [start, stop) of a rank's share of a parameter, which its optimizer updates.

    Attributes:
        name: of the parameter in the unsharded model.
        share, num_shares: which of the tensor-parallel slices of the parameter; (0, 1) for a parameter held in full.
        numel: of the share.
        counted: whether this copy enters sums over ranks.
        runs: (block, elements) in memory order.
    """

    name: str
    share: int
    num_shares: int
    numel: int
    start: int
    stop: int
    counted: bool
    runs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class LocalParameter:
    """A rank's share of a parameter, whichever part of it its optimizer updates.

    Attributes:
        split_dim: the dim that tensor parallelism splits, or None.
        num_shares: into how many.
        numel: of the share.
        is_expert: whether each expert-parallel rank has one of its own.
        is_tied_copy: the last stage's copy of the first stage's embedding.
        blocks: the logical tensors that it is made of.
    """

    name: str
    split_dim: int | None
    num_shares: int
    numel: int
    is_expert: bool
    is_tied_copy: bool
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SimulatedRank:
    """What one rank would hold.

    Attributes:
        reduction_ranks: ranks in the all-reduces of a step and of a refresh.
        parameters: its shares of the model's, in the model's order.
        pieces: the parts of these that its optimizer updates.
    """

    rank: int
    reduction_ranks: tuple[int, ...]
    parameters: tuple[LocalParameter, ...]
    pieces: tuple[HeldPiece, ...]
    size: ShardSize


def simulate(args: argparse.Namespace, rank: int) -> SimulatedRank:
    """Build ``rank`` of ``args.world_size`` and read off what it holds.

    Args:
        args: Megatron's, validated; the process has called
            :func:`megatron_ogpsa.integration.runtime.cpu.install_on_meta`.
    """
    with fake_world(args, rank):
        chunks = build_chunks(args, META)
        optimizer = build_optimizer(args, chunks)
        leaves = leaf_optimizers(optimizer)
        reduction = reduction_of(leaves, chunks)
        pieces = tuple(_held(piece) for piece in pieces_of(leaves, chunks, reduction))
        return SimulatedRank(
            rank=rank,
            reduction_ranks=tuple(dist.get_process_group_ranks(reduction.group)),
            parameters=tuple(_local(parameter) for parameter in named_parameters(chunks)),
            pieces=pieces,
            size=_size(args, chunks, sum(piece.stop - piece.start for piece in pieces)),
        )


def _held(piece: Piece) -> HeldPiece:
    parameter = piece.parameter
    share, num_shares = _share(parameter)
    return HeldPiece(
        name=parameter.name,
        share=share,
        num_shares=num_shares,
        numel=parameter.param.numel(),
        start=piece.start,
        stop=piece.stop,
        counted=piece.counted,
        runs=tuple(logical_runs(parameter, piece.start, piece.stop)),
    )


def _local(parameter: NamedParameter) -> LocalParameter:
    param = parameter.param
    num_shares = _share(parameter)[1]
    parts = [name for name, _ in row_pattern(parameter).parts]
    split_dim = 0 if is_split_unmarked(parameter) else getattr(param, "partition_dim", None)
    return LocalParameter(
        name=parameter.name,
        split_dim=split_dim if num_shares > 1 else None,
        num_shares=num_shares,
        numel=param.numel(),
        is_expert=not getattr(param, "allreduce", True),
        is_tied_copy=bool(getattr(param, "shared", False)),
        blocks=tuple(logical_name(parameter.name, part) for part in parts),
    )


def _share(parameter: NamedParameter) -> tuple[int, int]:
    """Which tensor-parallel slice of a parameter this is, of how many; Megatron marks what is split."""
    from megatron.core import parallel_state

    if not getattr(parameter.param, "tensor_model_parallel", False) and not is_split_unmarked(parameter):
        return 0, 1
    if getattr(parameter.param, "allreduce", True):
        return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()


def _size(args: argparse.Namespace, chunks: list[Any], elements: int) -> ShardSize:
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    in_fp32 = all(buffer.grad_dtype == torch.float32 for buffer in buffers)
    weights = [param for chunk in chunks for param in chunk.module.parameters()]
    return ShardSize(
        elements=elements,
        trained=sum(param.numel() for param in weights if param.requires_grad),
        packed=0 if in_fp32 or args.use_precision_aware_optimizer else elements,
        weight_bytes=sum(param.numel() * param.element_size() for param in weights),
        gradient_bytes=sum(buffer.numel * buffer.grad_dtype.itemsize for buffer in buffers),
        state_bytes=round(elements * state_bytes(args) * share_on_accelerator(args)),
    )
