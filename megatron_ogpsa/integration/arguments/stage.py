"""Flags of one stage of training: what is missing, and with which it would be wrong or would fail late."""

from __future__ import annotations

import argparse

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.cpu import check_supported_on_cpu
from megatron_ogpsa.integration.arguments.loop import check_before_validation, check_loop_arguments, require_flags
from megatron_ogpsa.integration.arguments.packing import check_packing
from megatron_ogpsa.integration.arguments.parser import WHOLE_SET
from megatron_ogpsa.integration.arguments.projection import check_projection_arguments
from megatron_ogpsa.integration.inputs.context_parallel import check_context_parallel
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu
from megatron_ogpsa.refusal import Refusal, refuse

# Megatron would scale these losses by tokens and divide by pairs (core/transformer/moe/router.py).
_TOKENS, _ZERO = "it counts tokens, not pairs", "set it to 0"


def _is_on(coefficients: list[float] | float | None) -> bool:
    return any(coefficients) if isinstance(coefficients, list) else bool(coefficients)


IN_DPO = (
    Refusal("--moe-aux-loss-coeff", _TOKENS, _ZERO, lambda args: args.num_experts and _is_on(args.moe_aux_loss_coeff)),
    Refusal("--moe-z-loss-coeff", _TOKENS, _ZERO, lambda args: args.num_experts and args.moe_z_loss_coeff),
    Refusal("--mtp-num-layers", _TOKENS, "fine-tune without multi-token prediction"),
    Refusal("--dsa-indexer-loss-coeff", _TOKENS, _ZERO),
    Refusal("--skip-train", "the reference policy is known after a first step only", "train at least one step"),
)


def check_parsed(args: argparse.Namespace) -> None:
    """Refuse what parsed flags tell of themselves, of this stage or one to come: needs no ranks and no data.

    Megatron's validation adds to what is asked for (deprecated switches, what a checkpoint says), so that the checks are made
    once more on its result.

    Args:
        args: as they were parsed; not changed.

    Raises:
        UserError, UnsupportedError: as the checks.
    """
    asked = argparse.Namespace(**vars(args))  # checks fill in defaults
    if install_if_no_gpu():
        check_supported_on_cpu(asked)
    check_before_validation(asked)
    require_flags(asked, for_training=True)
    check_arguments(asked)
    check_projection_arguments(asked)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags with which training would be wrong or would fail late.

    Raises:
        UserError, UnsupportedError: naming the flag and the remedy.
    """
    if not args.ogpsa_train_data:
        example = "pairs to train on, such as data/pairs.jsonl" if args.ogpsa_stage == "dpo" else "conversations"
        raise UserError(f"--ogpsa-train-data is missing: name the {example}")
    if not args.calculate_per_token_loss:
        raise UserError(
            "--calculate-per-token-loss is off, so short answers would weigh more than long ones: switch it on"
        )
    if args.eval_iters < WHOLE_SET:
        raise UserError(
            f"--eval-iters {args.eval_iters}: use a number of batches, or leave it out to take the whole set"
        )
    if args.train_samples is not None and args.train_samples < (args.global_batch_size or 0):
        raise UserError(
            f"--train-samples {args.train_samples} is less than --global-batch-size {args.global_batch_size}, so that there "
            "would be no step: use as many, or more"
        )
    check_loop_arguments(args)
    check_context_parallel(args)
    if args.ogpsa_stage == "dpo":
        refuse(IN_DPO, args, " with --ogpsa-stage dpo is not supported")
    if args.ogpsa_packing or args.ogpsa_stage == "dpo":
        flag = "--ogpsa-packing" if args.ogpsa_packing else "--ogpsa-stage dpo"
        check_packing(args, flag, of_validation=True)


def require_data(args: argparse.Namespace) -> None:
    """Look whether the files that the flags name are there, long before they are read.

    Raises:
        UserError: naming the flag and the file.
    """
    from megatron_ogpsa.data.sources import require_source

    named = [
        ("--ogpsa-train-data", args.ogpsa_train_data),
        ("--ogpsa-valid-data", args.ogpsa_valid_data),
        *(("--ogpsa-reference", source) for _, source in args.ogpsa_reference),
    ]
    for flag, source in named:
        try:
            require_source(source or ".")
        except UserError as error:
            raise type(error)(f"{flag}: {error}") from None  # one that may pass stays one
