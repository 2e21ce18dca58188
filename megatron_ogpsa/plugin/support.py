"""What the plugin refuses, at start, by the flag's name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from megatron_ogpsa.config import OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.plugin.limits import (
    MEGATRON_FSDP,
    MODELS,
    MODELS_OF_UPDATES,
    OPTIMIZERS,
    OPTIMIZERS_OF_UPDATES,
    SKIPPED_STEPS,
    splits_without_sequences,
)
from megatron_ogpsa.precision.fp8_state import quantizing_modules
from megatron_ogpsa.precision.fp8_support import check_fp8_modules
from megatron_ogpsa.refusal import refuse
from megatron_ogpsa.sharding.gradients import leaf_optimizers
from megatron_ogpsa.system.megatron import require_series

logger = logging.getLogger(__name__)

_SUPPORTED_OPTIMIZERS = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)


_WITH_UPDATES = " with --ogpsa-space update"


def check_supported(optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module], config: OGPSAConfig) -> None:
    """Refuse what projection does not handle yet, before anything is hooked. Local: loops of many ranks agree on it.

    Raises:
        UnsupportedError: names the flag, the reason and the nearest thing that works.
        UserError: the model is not wrapped for data parallelism.
    """
    require_series(megatron.core.__version__)
    for chunk in chunks:
        _check_chunk(chunk, is_of_updates=config.space == "update")
    check_fp8_modules(quantizing_modules(list(chunks)))
    is_layer_wise = isinstance(optimizer, LayerWiseDistributedOptimizer)
    for leaf in [optimizer] if is_layer_wise else leaf_optimizers(optimizer):
        refuse(OPTIMIZERS, leaf.config, scope="")
        if not isinstance(leaf, _SUPPORTED_OPTIMIZERS):
            raise UnsupportedError(
                f"{type(leaf).__name__}: the basis has no layout for it; use --optimizer adam or sgd"
            )
        if config.space == "update":
            refuse((*OPTIMIZERS_OF_UPDATES, SKIPPED_STEPS), leaf.config, _WITH_UPDATES)


def _check_chunk(chunk: torch.nn.Module, *, is_of_updates: bool) -> None:
    if (ddp_config := getattr(chunk, "ddp_config", None)) is not None:
        refuse((MEGATRON_FSDP,), ddp_config, scope="")
    if not isinstance(chunk, DistributedDataParallel):
        raise UserError(
            f"attach() got a {type(chunk).__name__}: pass the list of megatron.core DistributedDataParallel chunks "
            "(--use-torch-fsdp2 is not supported; use --use-distributed-optimizer)"
        )
    model = get_model_config(chunk)
    if isinstance(model, TransformerConfig):
        refuse(MODELS, model, scope="")
        _warn_of_fusion(model)
        if is_of_updates:
            refuse(MODELS_OF_UPDATES, model, _WITH_UPDATES)
    _check_norms(chunk, is_split=splits_without_sequences(model))


def _check_norms(chunk: DistributedDataParallel, *, is_split: bool) -> None:
    """Those of gated delta nets, which models of one's own have without the variant; ``is_split``: their copies drift apart.

    Megatron's ``finalize_model_grads`` sums copies of norms with sequence parallelism, and without it those that it names.
    """
    for name, _ in chunk.named_parameters():
        if is_split and name.endswith(".self_attention.out_norm.weight"):
            raise UnsupportedError(
                "--experimental-attention-variant gated_delta_net with tensor parallelism and without --sequence-parallel: "
                f"Megatron gives each copy of {name} the gradient of one rank's heads, so that copies drift apart; add "
                "--sequence-parallel"
            )


def _warn_of_fusion(model: TransformerConfig) -> None:
    is_split = model.multi_latent_attention and model.tensor_model_parallel_size > 1
    if is_split and getattr(model, "mla_down_proj_fusion", False) and dist.get_rank() == 0:
        logger.warning(
            "--mla-down-proj-fusion with tensor parallelism: Megatron's gradient of the keys' rotary rows is that of one "
            "rank's heads, with the plugin or without; leave the flag out if that matters"
        )
