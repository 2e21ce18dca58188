"""Sequences split over context-parallel ranks: what cannot be split is refused, the rest is cut as Megatron cuts it."""

from __future__ import annotations

import argparse

import torch

from megatron_ogpsa.refusal import Refusal, refuse

_WITH = "--context-parallel-size {0.context_parallel_size} with "
_APART = "leave one of them out, or use --tensor-model-parallel-size with --sequence-parallel for long sequences"

SPLIT = (
    Refusal(
        _WITH + "--ogpsa-stage dpo",
        "an answer's log-probability is a sum over its whole sequence",
        _APART,
        lambda args: args.ogpsa_stage == "dpo",
    ),
    Refusal(_WITH + "--ogpsa-packing", "documents would be cut apart", _APART, lambda args: args.ogpsa_packing),
)
"""What cannot be done with parts of sequences."""

LOCAL_ATTENTION = Refusal(
    _WITH + "--transformer-impl {0.transformer_impl}",
    "Megatron's own attention does not look at the other ranks' positions",
    "use --transformer-impl transformer_engine",
    lambda args: args.transformer_impl != "transformer_engine",
)


def check_context_parallel(args: argparse.Namespace) -> None:
    """Refuse what fine-tuning cannot do with ``--context-parallel-size`` above 1.

    Raises:
        UnsupportedError: naming the flag and the remedy.
    """
    if args.context_parallel_size > 1:
        refuse(SPLIT, args)
        check_attention(args)


def check_attention(args: argparse.Namespace) -> None:
    """Refuse an attention that sees only its own rank's part of a sequence.

    Raises:
        UnsupportedError: naming the flag and the remedy.
    """
    refuse((LOCAL_ATTENTION,), args)


def own_positions(fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This context-parallel rank's part of a micro-batch, as Megatron cuts it; without the axis, all of it.

    Of 2·cp chunks rank r has chunks r and 2·cp − 1 − r, so that all ranks have as much causal attention to do.

    Args:
        fields: [b, s] each; s is a multiple of 2·cp (Megatron checks ``--seq-length``).

    Returns:
        [b, s/cp] each.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    group = parallel_state.get_context_parallel_group()
    own: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(fields, is_hybrid_cp=False, cp_group=group)
    return own
