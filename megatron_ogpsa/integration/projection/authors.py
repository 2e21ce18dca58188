"""What the authors' released code does (SunGL001/OGPSA at 21093c2), for comparisons with it.

``--ogpsa-authors-rule`` is their rule as published: one block for each tensor, both signs removed, at most two
references, and in DPO the likelihood of chosen and rejected answers together as the references' loss. Sums stay ours
(fp64 where they add in bf16), and so does the objective of a reference (the mean over tokens, where they take the mean
of micro-batches' means).

``--ogpsa-authors-leak`` is a mistake of theirs. Under ZeRO the reference passes leave their gradient in the optimizer's
accumulators, which nothing clears, so that each refresh but the first adds it, divided by the micro-batches of a step and
not projected, to the next update: hidden training on the reference data.
"""

from __future__ import annotations

import argparse

from megatron_ogpsa.refusal import Refusal, refuse

MAX_REFERENCES = 2
"""Their code cuts a longer list short without a word."""

REFERENCE_LOSS = {"sft": "nll", "dpo": "nll_pair"}
"""By stage."""

LEAK_NOTICE = (
    "OGPSA: --ogpsa-authors-leak is on, for comparisons only: after each refresh but the first the reference gradients are "
    "added to the next update, unprojected, as the authors' released code does by mistake. This trains on the reference "
    "data."
)


_DROP_ONE = "drop one of the two flags"

NOT_THEIRS = (
    Refusal(
        "--ogpsa-granularity {0.ogpsa_granularity}",
        "the authors' is tensor",
        _DROP_ONE,
        lambda args: args.ogpsa_granularity != "tensor",
    ),
    Refusal(
        "--ogpsa-mode {0.ogpsa_mode}",
        "the authors' is orthogonal",
        _DROP_ONE,
        lambda args: args.ogpsa_mode != "orthogonal",
    ),
    Refusal(
        "--ogpsa-space {0.ogpsa_space}",
        "the authors' is gradient",
        _DROP_ONE,
        lambda args: args.ogpsa_space != "gradient",
    ),
    Refusal(
        "--ogpsa-rank-per-reference {0.ogpsa_rank_per_reference}",
        "the authors' is one gradient for each reference",
        _DROP_ONE,
        lambda args: args.ogpsa_rank_per_reference > 1,
    ),
    Refusal("--ogpsa-energy {0.ogpsa_energy}", "the authors' is 1", _DROP_ONE, lambda args: args.ogpsa_energy < 1.0),
    Refusal("--ogpsa-early-refreshes", "the authors' is one interval", _DROP_ONE),
    Refusal("--ogpsa-refresh-warmup-iters", "the authors' is one interval", _DROP_ONE),
    Refusal("--ogpsa-stagger-references", "the authors' is all references at once", _DROP_ONE),
    Refusal(
        "--ogpsa-adaptive-interval {0.ogpsa_adaptive_interval}",
        "the authors' is one interval",
        _DROP_ONE,
        lambda args: args.ogpsa_adaptive_interval is not None,
    ),
    Refusal(
        "--ogpsa-reference-loss {0.other_loss}",
        "the authors' is {0.their_loss}",
        _DROP_ONE,
        lambda args: args.other_loss,
    ),
    Refusal(
        "{0.num_references} times --ogpsa-reference",
        f"the authors' is {MAX_REFERENCES} at most",
        _DROP_ONE,
        lambda args: args.num_references > MAX_REFERENCES,
    ),
)
"""Settings that are not their rule's."""

_LEAK = "--ogpsa-authors-leak with "

NOT_THE_LEAKS = (
    Refusal(
        _LEAK + "--ogpsa-space {0.ogpsa_space}",
        "it leaks into the gradient",
        _DROP_ONE,
        lambda args: args.ogpsa_space != "gradient",
    ),
    Refusal(
        _LEAK + "--ogpsa-stagger-references",
        "all references leak at once",
        _DROP_ONE,
        lambda args: args.ogpsa_stagger_references,
    ),
    Refusal(
        _LEAK + "--ogpsa-early-refreshes",
        "it leaks at multiples of one interval",
        _DROP_ONE,
        lambda args: args.ogpsa_early_refreshes,
    ),
    Refusal(
        _LEAK + "--ogpsa-refresh-warmup-iters",
        "it leaks at multiples of one interval",
        _DROP_ONE,
        lambda args: args.ogpsa_refresh_warmup_iters,
    ),
    Refusal(
        _LEAK + "--ogpsa-adaptive-interval",
        "it leaks at multiples of one interval",
        _DROP_ONE,
        lambda args: args.ogpsa_adaptive_interval is not None,
    ),
    Refusal(
        _LEAK + "--ogpsa-energy {0.ogpsa_energy}",
        "what leaks is the whole references",
        _DROP_ONE,
        lambda args: args.ogpsa_energy < 1.0,
    ),
    Refusal(
        "--ogpsa-authors-leak without --calculate-per-token-loss",
        "references and training would be scaled differently",
        "add that flag",
        lambda args: not args.calculate_per_token_loss,
    ),
)
"""Settings with which their mistake would be another one."""


def check_authors_arguments(args: argparse.Namespace) -> None:
    """Refuse settings that are not the authors'.

    Raises:
        UnsupportedError: naming both flags.
    """
    theirs = REFERENCE_LOSS[args.ogpsa_stage]
    others = sorted({loss for _, loss in args.ogpsa_reference_loss} - {theirs})
    if args.ogpsa_authors_rule:
        asked = argparse.Namespace(
            **vars(args),
            num_references=len(args.ogpsa_reference),
            their_loss=theirs,
            other_loss=others[0] if others else None,
        )
        refuse(NOT_THEIRS, asked, " with --ogpsa-authors-rule")
    if args.ogpsa_authors_leak:
        refuse(NOT_THE_LEAKS, args, scope="")


def leak_weight(args: argparse.Namespace, step: int, interval: int) -> float:
    """What the reference gradients are multiplied with when they leak into a step, or 0 if they do not.

    A function of the step alone: a resumed run, and a run that refreshes after a checkpoint, leak at the same steps.

    Args:
        step: steps already taken.
        interval: of refreshes, in steps.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    is_leaking = args.ogpsa_authors_leak and step > 0 and step % interval == 0
    return 1.0 / get_num_microbatches() if is_leaking else 0.0
