"""Rows that hold several documents: what would let these attend to each other is refused."""

from __future__ import annotations

import argparse

from megatron_ogpsa.refusal import Refusal, refuse

_ONE = "Transformer Engine takes rows of several documents one at a time"


def _has_engine(args: argparse.Namespace) -> bool:
    return args.transformer_impl == "transformer_engine"


PACKED = (
    Refusal(
        "--micro-batch-size {0.micro_batch_size} with {0.packs}",
        _ONE,
        "use --micro-batch-size 1 and a larger --seq-length",
        lambda args: _has_engine(args) and args.micro_batch_size not in (None, 1),
    ),
    Refusal(
        "--eval-micro-batch-size {0.eval_micro_batch_size} with {0.packs}",
        _ONE,
        "use --eval-micro-batch-size 1 and a larger --seq-length",
        lambda args: _has_engine(args) and args.of_validation and args.eval_micro_batch_size not in (None, 1),
    ),
    # Megatron's own attention honours an explicit mask only on its plain path (fused_softmax.py).
    Refusal(
        "{0.packs} with --transformer-impl {0.transformer_impl} needs --no-masked-softmax-fusion",
        "",
        "add it",
        lambda args: not _has_engine(args) and args.masked_softmax_fusion,
    ),
    Refusal(
        "{0.packs} with --window-size and --transformer-impl {0.transformer_impl}",
        "its mask would mix documents",
        "leave --window-size out, or use --transformer-impl transformer_engine",
        lambda args: not _has_engine(args) and args.window_size is not None,
    ),
)
"""``packs``: the flag that puts several documents into a row; ``of_validation``: whether rows of validation hold several."""


def check_packing(args: argparse.Namespace, flag: str, *, of_validation: bool) -> None:
    """Refuse flags with which documents in one row would attend to each other.

    Args:
        flag: what puts several documents into a row, for the message.
        of_validation: whether rows of ``--ogpsa-valid-data`` hold several documents too.

    Raises:
        UnsupportedError: naming the flag and the remedy.
    """
    refuse(PACKED, argparse.Namespace(**vars(args), packs=flag, of_validation=of_validation), scope="")
