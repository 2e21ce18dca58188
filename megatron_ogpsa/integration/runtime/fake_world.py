"""A cluster that is not there: Megatron's own groups, model, buffers and optimizer of one of its ranks, without memory.

Process groups are torch's fake ones, tensors lie on its meta device. Shapes, names and copies do not depend on what
only GPUs have: layers are built from Megatron's local modules, attention without parameters stands for any attention, and
fusions are off.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


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
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        setattr(plain, name, torch.float32)  # others go with the precision-aware optimizer alone
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
