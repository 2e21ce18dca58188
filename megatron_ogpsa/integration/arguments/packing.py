"""Rows that hold several documents: what would let these attend to each other is refused."""

from __future__ import annotations

import argparse

from megatron_ogpsa.errors import UnsupportedError, UserError


def check_packing(args: argparse.Namespace, flag: str, *, of_validation: bool) -> None:
    """Refuse flags with which documents in one row would attend to each other.

    Args:
        flag: what puts several documents into a row, for the message.
        of_validation: whether rows of ``--ogpsa-valid-data`` hold several documents too.

    Raises:
        UserError, UnsupportedError: naming the flag and the remedy.
    """
    if args.transformer_impl == "transformer_engine":
        for name, size, is_packed in (
            ("--micro-batch-size", args.micro_batch_size, True),
            ("--eval-micro-batch-size", getattr(args, "eval_micro_batch_size", None), of_validation),
        ):
            if is_packed and size not in (None, 1):
                raise UserError(
                    f"{name} {size} with {flag}: Transformer Engine takes rows of several documents one at a time, use "
                    f"{name} 1 and a larger --seq-length"
                )
        return
    # Megatron's own attention honours an explicit mask only on its plain path (fused_softmax.py).
    if args.masked_softmax_fusion:
        raise UserError(f"{flag} with --transformer-impl local needs --no-masked-softmax-fusion")
    if args.window_size is not None:
        raise UnsupportedError(f"{flag} with --window-size and --transformer-impl local would mix documents")
