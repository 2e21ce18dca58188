"""One rank of a cluster that is not there: Megatron's own groups, model, buffers and optimizer, without memory.

Process groups are torch's fake ones, tensors lie on its meta device. What such a rank holds, and which of it counts, is
read off the same objects by the same code as in training (:mod:`megatron_ogpsa.sharding`). 1,024 ranks one after the
other take minutes, and one of each pipeline stage, which is all that a plan needs, seconds.

Shapes, names and copies do not depend on what only GPUs have: layers are built from Megatron's local modules, attention
without parameters stands for any attention, and fusions are off.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_ogpsa.integration.runtime.cpu import META
from megatron_ogpsa.planning.costs import FP32, ShardSize
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


@contextmanager
def fake_world(args: argparse.Namespace, rank: int) -> Iterator[None]:
    """Megatron's process groups as ``rank`` sees them; no other rank is there, and collectives return at once."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Megatron tells of each bucket of each rank
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        logging.disable(disabled)


class NoAttention(nn.Module):
    """Stands for attention, which has no parameters but sinks (``--softmax-type learnable``); never called."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.empty(heads))


def _layer_specs(config: Any, vp_stage: int | None) -> Any:
    """Megatron's local layers, with attention that no layout is too much for."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    transformer = config.transformer
    spec = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention.submodules
        if hasattr(attention, "core_attention"):
            attention.core_attention = NoAttention
    return spec


def _plain(args: argparse.Namespace) -> argparse.Namespace:
    """The same model and shards without what needs a GPU, none of which changes a parameter's shape or copies."""
    plain = copy.copy(args)
    for name in (
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "gradient_accumulation_fusion",
        "sequence_parallel",
        "tp_comm_overlap",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "use_cpu_initialization",
        "optimizer_cpu_offload",
        "use_precision_aware_optimizer",
    ):
        setattr(plain, name, False)
    plain.transformer_impl = "local"
    plain.no_persist_layer_norm = True
    plain.perform_initialization = False
    return plain


def _copy_latent_projections(module: nn.Module, num_ranks: int) -> None:
    """Let each tensor-parallel rank have all rows, as with Transformer Engine, where Megatron's own layers share them out.

    ``core/transformer/multi_latent_attention.py``: ``parallel_mode="duplicated"``; not with ``mla_down_proj_fusion``.
    """
    for name, layer in module.named_modules():
        if name.endswith((".linear_q_down_proj", ".linear_kv_down_proj")):
            rows, columns = layer.weight.shape
            layer.weight = nn.Parameter(torch.empty(rows * num_ranks, columns))


def build_chunks(args: argparse.Namespace, device: torch.device) -> list[Any]:
    """This rank's model chunks, wrapped for data parallelism, on ``device``; they cannot run."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import get_megatron_ddp_config

    config = gpt_config_from_args(_plain(args))
    config.transformer_layer_spec = _layer_specs
    builder = GPTModelBuilder(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = args.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        with device, redirect_stdout(io.StringIO()):  # it tells how the vocabulary is padded
            module = builder.build_model(groups, vp_stage=stage if virtual else None)
            is_whole = args.transformer_impl == "transformer_engine" and not args.mla_down_proj_fusion
            if args.multi_latent_attention and is_whole:
                _copy_latent_projections(module, args.tensor_model_parallel_size)
        module.to(args.params_dtype)
        chunks.append(DistributedDataParallel(config.transformer, get_megatron_ddp_config(args), module))
    return chunks


def build_optimizer(args: argparse.Namespace, chunks: list[Any]) -> Any:
    """Megatron's optimizer of ``chunks``."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    config, overrides = get_megatron_optimizer_config(_plain(args))
    return get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)


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
        packed=0 if in_fp32 or args.use_precision_aware_optimizer else elements,
        weight_bytes=sum(param.numel() * param.element_size() for param in weights),
        gradient_bytes=sum(buffer.numel * buffer.grad_dtype.itemsize for buffer in buffers),
        state_bytes=round(elements * _state_bytes(args) * _share_on_accelerator(args)),
    )


def _share_on_accelerator(args: argparse.Namespace) -> float:
    return 1.0 - args.optimizer_offload_fraction if args.optimizer_cpu_offload else 1.0


def _state_bytes(args: argparse.Namespace) -> int:
    """Bytes of optimizer state for each element that a rank updates, main parameters included."""
    aware = args.use_precision_aware_optimizer
    main = args.main_params_dtype.itemsize if aware else FP32
    if aware and main == FP32 and args.params_dtype == torch.bfloat16:
        main = 2  # what fp32 has beyond the bf16 parameter (store_param_remainders of Megatron's OptimizerConfig)
    main = 0 if args.params_dtype == torch.float32 else main
    if args.optimizer == "sgd":
        return main + (FP32 if args.sgd_momentum else 0)
    moments = (args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize) if aware else 2 * FP32
    return int(main + moments)
