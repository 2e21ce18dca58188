"""What the plugin refuses, at start, by the flag's name."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.utils import get_model_config

from megatron_ogpsa.config import OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.precision.fp8_state import quantizing_modules
from megatron_ogpsa.precision.fp8_support import check_fp8_modules
from megatron_ogpsa.sharding.gradients import leaf_optimizers
from megatron_ogpsa.system.megatron import require_series

logger = logging.getLogger(__name__)

_SUPPORTED_OPTIMIZERS = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)


def check_supported(optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module], config: OGPSAConfig) -> None:
    """Refuse what projection does not handle yet, before anything is hooked.

    Raises:
        UnsupportedError: names the flag, the reason and the nearest thing that works.
        UserError: the model is not wrapped for data parallelism.
    """
    require_series(megatron.core.__version__)
    for chunk in chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is not None and getattr(ddp_config, "use_megatron_fsdp", False):
            raise UnsupportedError(
                "--use-megatron-fsdp: its gradients are DTensors outside Megatron's gradient buffers; "
                "use --use-distributed-optimizer, which shards optimizer state and gradients"
            )
        if not isinstance(chunk, DistributedDataParallel):
            raise UserError(
                f"attach() got a {type(chunk).__name__}: pass the list of megatron.core DistributedDataParallel chunks "
                "(--use-torch-fsdp2 is not supported; use --use-distributed-optimizer)"
            )
        model = get_model_config(chunk)
        if getattr(model, "mtp_num_layers", None):
            raise UnsupportedError(
                "--mtp-num-layers: losses of references would enter those that the log shows; fine-tune without multi-token "
                "prediction"
            )
        _check_parameters(chunk, is_split=model.tensor_model_parallel_size > 1 and not model.sequence_parallel)
        _check_latent_attention(model)
    check_fp8_modules(quantizing_modules(list(chunks)))
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        raise UnsupportedError(_layer_wise_message())
    for leaf in leaf_optimizers(optimizer):
        if not isinstance(leaf, _SUPPORTED_OPTIMIZERS):
            is_layer_wise = isinstance(leaf, LayerWiseDistributedOptimizer)
            raise UnsupportedError(
                _layer_wise_message() if is_layer_wise else f"{type(leaf).__name__}: use --optimizer adam or sgd"
            )
        if getattr(leaf.config, "optimizer_cuda_graph", False):
            raise UnsupportedError(
                "--optimizer-cuda-graph: the projection decides on the host whether the gradient is finite, which "
                "a graph cannot hold; leave the flag out"
            )
        if config.space == "update":
            _check_update_space(leaf)
    if config.space == "update" and any(get_model_config(chunk).qk_clip for chunk in chunks):
        raise UnsupportedError(
            "--qk-clip with --ogpsa-space update: it changes weights after the step, where nothing is projected; leave the "
            "flag out, or use --ogpsa-space gradient"
        )
    if isinstance(optimizer, ChainedOptimizer) and not optimizer.chained_optimizers:
        raise UserError("attach() got an optimizer without parameters: unfreeze some, or leave the plugin out")


def _check_update_space(leaf: MegatronOptimizer) -> None:
    # Both keep the parameters that they update where the projection does not reach them.
    for name, flag in (
        ("optimizer_cpu_offload", "--optimizer-cpu-offload"),
        ("use_precision_aware_optimizer", "--use-precision-aware-optimizer"),
    ):
        if getattr(leaf.config, name, False):
            raise UnsupportedError(
                f"{flag} with --ogpsa-space update: the fp32 parameters lie within the inner optimizer; leave the flag "
                "out, or use --ogpsa-space gradient"
            )
    # Megatron then skips the step on those ranks alone that hold parameters; the others would wait in the projection.
    if math.isfinite(getattr(leaf.config, "grad_norm_skip_threshold", math.inf)):
        raise UnsupportedError(
            "grad_norm_skip_threshold with --ogpsa-space update: a stage without trainable parameters would wait for the "
            "others; leave it at infinity, or use --ogpsa-space gradient"
        )


def _check_parameters(chunk: DistributedDataParallel, *, is_split: bool) -> None:
    """``is_split``: over tensor-parallel ranks, without sequence parallelism."""
    for name, param in chunk.named_parameters():
        # Megatron's finalize_model_grads sums copies of norms with sequence parallelism, and without it those that it names.
        if is_split and name.endswith(".self_attention.out_norm.weight"):
            raise UnsupportedError(
                "--experimental-attention-variant gated_delta_net with tensor parallelism and without --sequence-parallel: "
                f"Megatron gives each copy of {name} the gradient of one rank's heads, so that copies drift apart; add "
                "--sequence-parallel"
            )
        if getattr(param, "is_gtp_weight_remat", False):
            raise UnsupportedError(
                f"--gtp-weight-remat-size: {name} is sharded over an axis that the projection does not count yet; "
                "use --tensor-model-parallel-size"
            )


def _check_latent_attention(config: Any) -> None:
    """The keys that all heads share are made by each tensor-parallel rank, of weights that each has a copy of.

    Only with sequence parallelism does ``core/transformer/multi_latent_attention.py`` sum what the ranks' heads make of them.
    """
    if not getattr(config, "multi_latent_attention", False) or config.tensor_model_parallel_size == 1:
        return
    if not config.sequence_parallel:
        raise UnsupportedError(
            "--multi-latent-attention with tensor parallelism and without --sequence-parallel: Megatron gives each copy of "
            "the keys' projection the gradient of one rank's heads, so that copies drift apart; add --sequence-parallel"
        )
    if getattr(config, "mla_down_proj_fusion", False) and dist.get_rank() == 0:
        logger.warning(
            "--mla-down-proj-fusion with tensor parallelism: Megatron's gradient of the keys' rotary rows is that of one "
            "rank's heads, with the plugin or without; leave the flag out if that matters"
        )


def _layer_wise_message() -> str:
    return (
        "--optimizer muon and other layer-wise optimizers (--use-layer-wise-distributed-optimizer): they give whole "
        "parameters to ranks, outside the shards that the basis is laid out for; use --optimizer adam"
    )
