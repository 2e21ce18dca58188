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

from megatron_ogpsa.errors import UserError

MAX_REFERENCES = 2
"""Their code cuts a longer list short without a word."""

REFERENCE_LOSS = {"sft": "nll", "dpo": "nll_pair"}
"""By stage."""

LEAK_NOTICE = (
    "OGPSA: --ogpsa-authors-leak is on, for comparisons only: after each refresh but the first the reference gradients are "
    "added to the next update, unprojected, as the authors' released code does by mistake. This trains on the reference "
    "data."
)


def check_authors_arguments(args: argparse.Namespace) -> None:
    """Refuse settings that are not the authors'.

    Raises:
        UserError: naming both flags.
    """
    if args.ogpsa_authors_rule:
        losses = sorted({loss for _, loss in args.ogpsa_reference_loss} - {REFERENCE_LOSS[args.ogpsa_stage]})
        for is_other, flag, theirs in (
            (args.ogpsa_granularity != "tensor", f"--ogpsa-granularity {args.ogpsa_granularity}", "tensor"),
            (args.ogpsa_mode != "orthogonal", f"--ogpsa-mode {args.ogpsa_mode}", "orthogonal"),
            (args.ogpsa_space != "gradient", f"--ogpsa-space {args.ogpsa_space}", "gradient"),
            (
                args.ogpsa_rank_per_reference > 1,
                f"--ogpsa-rank-per-reference {args.ogpsa_rank_per_reference}",
                "one gradient for each reference",
            ),
            (args.ogpsa_energy < 1.0, f"--ogpsa-energy {args.ogpsa_energy}", "1"),
            (args.ogpsa_stagger_references, "--ogpsa-stagger-references", "all references at once"),
            (
                args.ogpsa_adaptive_interval is not None,
                f"--ogpsa-adaptive-interval {args.ogpsa_adaptive_interval}",
                "one interval",
            ),
            (losses, f"--ogpsa-reference-loss {losses and losses[0]}", REFERENCE_LOSS[args.ogpsa_stage]),
            (
                len(args.ogpsa_reference) > MAX_REFERENCES,
                f"{len(args.ogpsa_reference)} times --ogpsa-reference",
                f"{MAX_REFERENCES} at most",
            ),
        ):
            if is_other:
                raise UserError(
                    f"{flag} with --ogpsa-authors-rule: the authors' is {theirs}; drop one of the two flags"
                )
    for is_other, flag, reason in (
        (args.ogpsa_space != "gradient", f"--ogpsa-space {args.ogpsa_space}", "it leaks into the gradient"),
        (args.ogpsa_stagger_references, "--ogpsa-stagger-references", "all references leak at once"),
        (
            args.ogpsa_adaptive_interval is not None,
            "--ogpsa-adaptive-interval",
            "it leaks at multiples of one interval",
        ),
        (args.ogpsa_energy < 1.0, f"--ogpsa-energy {args.ogpsa_energy}", "what leaks is the whole references"),
    ):
        if args.ogpsa_authors_leak and is_other:
            raise UserError(f"--ogpsa-authors-leak with {flag}: {reason}; drop one of them")
    if args.ogpsa_authors_leak and not args.calculate_per_token_loss:
        raise UserError(
            "--ogpsa-authors-leak without --calculate-per-token-loss: references and training would be scaled differently; "
            "add that flag"
        )


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
