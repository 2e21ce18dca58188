"""Which settings of Megatron-Bridge the callback refuses, by Bridge's names for them.

FP8 is checked as in Megatron's own loop, whose flags Bridge has as fields of its configuration.
"""

from __future__ import annotations

import argparse
import re
from operator import attrgetter
from typing import Any

from megatron.core.utils import get_model_config

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.precision.fp8_support import check_fp8_available, check_fp8_flags

FP8_SETTINGS = {
    "--fp8-format": "model.fp8",
    "--fp8-recipe": "model.fp8_recipe",
    "--use-transformer-engine-op-fuser": "model.use_transformer_engine_op_fuser",
    "--context-parallel-size": "model.context_parallel_size",
    "--tensor-model-parallel-size": "model.tensor_model_parallel_size",
    "--sequence-parallel": "model.sequence_parallel",
    "--fp8-param-gather": "ddp.fp8_param_gather",
    "--overlap-param-gather": "ddp.overlap_param_gather",
    "--reuse-grad-buf-for-mxfp8-param-ag": "ddp.reuse_grad_buf_for_mxfp8_param_ag",
    "--use-precision-aware-optimizer": "optimizer.use_precision_aware_optimizer",
    "--main-params-dtype": "optimizer.main_params_dtype",
    "--micro-batch-size": "train.micro_batch_size",
    "--save": "checkpoint.save",
    "--load": "checkpoint.load",
    "--pretrained-checkpoint": "checkpoint.pretrained_checkpoint",
}
"""Megatron's flags that decide on FP8 → where Bridge keeps them."""

_PLAIN_NAMES = {"--seq-length": "model.seq_length", "--bf16": "bf16", "--ogpsa-reference": "OGPSACallback"}
_FLAG = re.compile(r"--[a-z0-9-]+[a-z0-9]")


def check_run(config: Any, chunks: list[Any], *, references_in_bf16: bool) -> None:
    """Refuse what reference passes would disturb, or would not reach. Local, no communication.

    Args:
        config: Bridge's ``ConfigContainer``.
        chunks: the model's, whose own configuration is that which Bridge has finished.

    Raises:
        UnsupportedError: names the setting.
        UserError: FP8 that this GPU or Transformer Engine does not have, or references in bf16 of a model that is not.
    """
    model = get_model_config(chunks[0])
    scaling = "reference passes would mark its scaling factors"
    for is_given, setting, reason, remedy in (
        (getattr(model, "fp4", None), "model.fp4", scaling, "train in bf16 or with model.fp8"),
        (
            getattr(model, "quant_recipe", None),
            "model.quant_recipe",
            "which layers are quantised, and by what, would not be known",
            "use model.fp8",
        ),
        (
            model.cuda_graph_impl not in (None, "none"),
            "model.cuda_graph_impl",
            "graphs replay training passes only",
            "use 'none'",
        ),
        (
            config.dist.use_decentralized_pg,
            "dist.use_decentralized_pg",
            "passes use Megatron's own groups",
            "use False",
        ),
        (
            config.checkpoint.async_save and config.train.rampup_batch_size,
            "train.rampup_batch_size with checkpoint.async_save",
            "checkpoints are saved at steps that no interval tells",
            "use one of the two",
        ),
    ):
        if is_given:
            raise UnsupportedError(f"{setting} with OGPSACallback is not supported: {reason}; {remedy}")
    if references_in_bf16 and not model.bf16:
        raise UserError(
            "OGPSACallback(references_in_bf16=True): reference passes without FP8 are in the parameters' type, which is "
            "bf16 with model.bf16 only; train in bf16, or leave it out"
        )
    _check_fp8(config, model)


def _check_fp8(config: Any, model: Any) -> None:
    if not model.fp8:
        return
    owners = argparse.Namespace(**{name: getattr(config, name) for name in ("ddp", "optimizer", "train", "checkpoint")})
    owners.model = model
    flags = {flag: attrgetter(setting)(owners) for flag, setting in FP8_SETTINGS.items()}
    args = argparse.Namespace(**{flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()})
    args.fp8, args.seq_length = model.fp8, config.model.seq_length
    try:
        check_fp8_flags(args)
        check_fp8_available(args)
    except UserError as error:
        names = FP8_SETTINGS | _PLAIN_NAMES
        message = _FLAG.sub(lambda found: names.get(found[0], found[0]), str(error))
        raise type(error)(message) from None
