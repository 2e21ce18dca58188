"""What ``megatron-ogpsa train`` can do, by ``--ogpsa-stage``: each stage is data, a loss, and hooks in the loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_ogpsa.integration.arguments.stage import check_arguments
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
