"""One micro-batch on its way from the data set into the model, with attention kept inside each document.

Shapes: b micro-batch, s sequence, d documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the model and the loss take; tensors on this rank's device."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    """bool [b, 1, s, s], True where attention is forbidden; ``None`` lets the model build its causal mask."""
    packed_seq_params: Any = None
    """Megatron's ``PackedSeqParams``, with which Transformer Engine keeps documents apart."""


_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]], *, packing: bool, transformer_engine: bool) -> Batch:
    """Draw one micro-batch and give it the form that the attention implementation takes.

    Args:
        data_iterator: yields items of :class:`~megatron_ogpsa.data.TokenizedChatDataset`, collated: each [b, s].
        packing: rows hold several documents.
        transformer_engine: attention is Transformer Engine's, which takes document boundaries, not a mask.
    """
    item = next(data_iterator)
    fields = {name: item[name].cuda(non_blocking=True) for name in _FIELDS}
    if not packing:
        return Batch(**fields)
    document_ids = item["document_ids"].cuda(non_blocking=True)
    if transformer_engine:
        flat = {name: tensor.reshape(1, -1) for name, tensor in fields.items()}
        return Batch(**flat, packed_seq_params=packed_parameters(document_ids))
    from megatron_ogpsa.data import attention_mask_from_documents

    return Batch(**fields, attention_mask=attention_mask_from_documents(document_ids))


def document_boundaries(document_ids: torch.Tensor) -> torch.Tensor:
    """Offsets at which documents begin and the last one ends, over rows laid end to end.

    A document never runs over the end of a row, and padding at the end of a row counts as a document of its own.

    Args:
        document_ids: int64 [b, s].

    Returns:
        int32 [d + 1], from 0 to b·s.
    """
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = is_start.reshape(-1).nonzero().reshape(-1)
    return torch.cat([starts, starts.new_tensor([document_ids.numel()])]).to(torch.int32)


def packed_parameters(document_ids: torch.Tensor) -> Any:
    """Megatron's ``PackedSeqParams`` in the layout ``thd``: all rows of the micro-batch end to end, [1, b·s]."""
    from megatron.core.packed_seq_params import PackedSeqParams

    boundaries = document_boundaries(document_ids)
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
