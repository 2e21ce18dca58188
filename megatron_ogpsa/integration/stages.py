"""What ``megatron-ogpsa train`` can do, by ``--ogpsa-stage``: each stage is data, a loss, and hooks in the loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.integration.arguments.loop import check_loop_arguments
from megatron_ogpsa.integration.arguments.packing import check_packing
from megatron_ogpsa.integration.arguments.parser import WHOLE_SET
from megatron_ogpsa.integration.inputs.context_parallel import check_context_parallel
from megatron_ogpsa.integration.inputs.datasets import load_conversations, load_pairs, make_datasets_provider
from megatron_ogpsa.integration.inputs.forward import ForwardStep, make_forward_step
from megatron_ogpsa.integration.loop.hooks import LoopHook
from megatron_ogpsa.integration.loop.time_left import TimeLeft
from megatron_ogpsa.integration.projection.reference_data import reference_loader
from megatron_ogpsa.integration.projection.run import ProjectionRun
from megatron_ogpsa.integration.reference_policy import ReferencePolicy
from megatron_ogpsa.losses.sft import summed_token_loss


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What Megatron's ``pretrain`` is given, and who acts in its loop."""

    datasets_provider: Callable[..., Any]
    forward_step: ForwardStep
    hooks: Sequence[LoopHook]


def projection_hooks(args: argparse.Namespace, policy: ReferencePolicy | None = None) -> list[LoopHook]:
    """The projection, if the run has references.

    Raises:
        UserError, UnsupportedError: flags that it cannot do with.
    """
    run = ProjectionRun(args, reference_loader(args, policy))
    return [run] if args.ogpsa_reference else []


def build_stage(args: argparse.Namespace) -> Stage:
    """The stage of ``--ogpsa-stage``.

    Raises:
        UserError, UnsupportedError: flags with which it would be wrong or would fail late.
    """
    check_arguments(args)
    return _dpo(args) if args.ogpsa_stage == "dpo" else _sft(args)


def _sft(args: argparse.Namespace) -> Stage:
    return Stage(
        datasets_provider=make_datasets_provider(load_conversations),
        forward_step=make_forward_step(
            lambda batch: partial(summed_token_loss, loss_mask=batch.loss_mask), packed=args.ogpsa_packing
        ),
        hooks=[*projection_hooks(args), TimeLeft(args)],
    )


def _dpo(args: argparse.Namespace) -> Stage:
    policy = ReferencePolicy(args)
    projection = projection_hooks(args, policy)
    return Stage(
        datasets_provider=make_datasets_provider(lambda source: policy.numbered(load_pairs(source))),
        forward_step=make_forward_step(policy.loss_of, packed=True),
        hooks=[
            *projection,
            policy,
            TimeLeft(args),
        ],  # references first: those with the loss dpo bring pairs of their own
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags with which training would be wrong or would fail late.

    Raises:
        UserError: naming the flag and the remedy.
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
    if args.train_samples is not None and args.train_samples < args.global_batch_size:
        raise UserError(
            f"--train-samples {args.train_samples} is less than --global-batch-size {args.global_batch_size}, so that there "
            "would be no step: use as many, or more"
        )
    check_loop_arguments(args)
    check_context_parallel(args)
    if args.ogpsa_stage == "dpo":
        _check_dpo(args)
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
            raise UserError(f"{flag}: {error}") from None


def _check_dpo(args: argparse.Namespace) -> None:
    # Megatron would scale these losses by tokens and divide by pairs (core/transformer/moe/router.py).
    for flag, value in (
        ("--moe-aux-loss-coeff", args.moe_aux_loss_coeff if args.num_experts else 0),
        ("--moe-z-loss-coeff", args.moe_z_loss_coeff if args.num_experts else 0),
        ("--mtp-num-layers", args.mtp_num_layers),
        ("--dsa-indexer-loss-coeff", args.dsa_indexer_loss_coeff),
    ):
        if any(value) if isinstance(value, list) else value:
            raise UnsupportedError(
                f"{flag} with --ogpsa-stage dpo is not supported: it counts tokens, not pairs; set it to 0"
            )
    if args.skip_train or args.train_iters == 0:
        flag = "--skip-train" if args.skip_train else "--train-iters 0"
        raise UnsupportedError(f"{flag} with --ogpsa-stage dpo: the reference policy is known after a first step only")
