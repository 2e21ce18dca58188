"""Which settings of Megatron-Bridge the callback refuses, by Bridge's names for them.

FP8 is checked as in Megatron's own loop, whose flags Bridge has as fields of its configuration.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from megatron.core.utils import get_model_config

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.precision.fp8_support import check_fp8_available, check_fp8_flags
from megatron_ogpsa.references.limits import PASSES
from megatron_ogpsa.refusal import Refusal, refuse

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

_PLAIN_NAMES = {
    "--seq-length": "model.seq_length",
    "--bf16": "bf16",
    "--fp4-format": "model.fp4",
    "--ogpsa-reference": "OGPSACallback",
}
_FLAG = re.compile(r"--[a-z0-9-]+[a-z0-9]")

SCOPE = " with OGPSACallback is not supported"

OF_BRIDGE = (
    Refusal(
        "model.quant_recipe",
        "which layers are quantised, and by what, would not be known",
        "use model.fp8",
        lambda run: run.model.quant_recipe,
    ),
    Refusal(
        "dist.use_decentralized_pg",
        "passes use Megatron's own groups",
        "use False",
        lambda run: run.config.dist.use_decentralized_pg,
    ),
    Refusal(
        "train.rampup_batch_size with checkpoint.async_save",
        "checkpoints are saved at steps that no interval tells",
        "use one of the two",
        lambda run: run.config.checkpoint.async_save and run.config.train.rampup_batch_size,
    ),
)
"""What Megatron's own loop does not have, or flags do not tell."""


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
    with _in_bridges_words(model):
        refuse(PASSES, model, SCOPE)
    refuse(OF_BRIDGE, argparse.Namespace(model=model, config=config), SCOPE)
    if references_in_bf16 and not model.bf16:
        raise UserError(
            "OGPSACallback(references_in_bf16=True): reference passes without FP8 are in the parameters' type, which is "
            "bf16 with model.bf16 only; train in bf16, or leave it out"
        )
    if references_in_bf16 and model.fp8 and model.tp_comm_overlap:
        raise UnsupportedError(
            "model.tp_comm_overlap with OGPSACallback(references_in_bf16=True) and model.fp8: its buffers are made for "
            "products in FP8 alone; leave one of them out"
        )
    _check_fp8(config, model)


@contextmanager
def _in_bridges_words(model: Any) -> Iterator[None]:
    """What is refused by Megatron's flags is told by Bridge's names of them."""

    def translated(found: re.Match[str]) -> str:
        field = found[0].removeprefix("--").replace("-", "_")
        known = FP8_SETTINGS | _PLAIN_NAMES
        return known.get(found[0], f"model.{field}" if hasattr(model, field) else found[0])

    try:
        yield
    except UserError as error:
        raise type(error)(_FLAG.sub(translated, str(error))) from None


def _check_fp8(config: Any, model: Any) -> None:
    if not model.fp8:
        return
    owners = argparse.Namespace(**{name: getattr(config, name) for name in ("ddp", "optimizer", "train", "checkpoint")})
    owners.model = model
    flags = {flag: attrgetter(setting)(owners) for flag, setting in FP8_SETTINGS.items()}
    args = argparse.Namespace(**{flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()})
    args.fp8, args.seq_length = model.fp8, config.model.seq_length
    with _in_bridges_words(model):
        check_fp8_flags(args)
        check_fp8_available(args)
