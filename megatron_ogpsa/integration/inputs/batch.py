"""One micro-batch on its way from the data set into the model, with attention kept inside each document.

Shapes: b micro-batch, s sequence, d documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ogpsa.integration.inputs.context_parallel import own_positions


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the model and the loss take; tensors on this rank's device, s its share under context parallelism."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    """int64 [b, s], from 0 in each row, -1 on padding."""
    pair_ids: torch.Tensor | None = None
    """int64 [b, p], the pairs of each row; -1 where a row has fewer. ``None`` for conversations."""
    attention_mask: torch.Tensor | None = None
    """bool [b, 1, s, s], True where attention is forbidden; ``None`` lets the model build its causal mask."""
    packed_seq_params: Any = None
    """Megatron's ``PackedSeqParams``, with which Transformer Engine keeps documents apart."""


_FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "document_ids")


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]], *, packed: bool, transformer_engine: bool) -> Batch:
    """Draw one micro-batch and give it the form that the attention implementation takes.

    Args:
        data_iterator: yields items of :class:`~megatron_ogpsa.data.TokenizedChatDataset` or of
            :class:`~megatron_ogpsa.data.TokenizedPreferenceDataset`, collated: each [b, s].
        packed: rows hold several documents; not with context parallelism, over which other rows are split.
        transformer_engine: attention is Transformer Engine's, which takes document boundaries, not a mask.
    """
    item = next(data_iterator)
    fields = {name: item[name].cuda(non_blocking=True) for name in _FIELDS}
    pair_ids = item["pair_ids"].cuda(non_blocking=True) if "pair_ids" in item else None
    if not packed:
        return Batch(**own_positions(fields), pair_ids=pair_ids)
    if transformer_engine:  # one row at a time (checked at start), so that [b, s] is the end-to-end layout already
        # From what is still on the host: the number of documents is a shape, for which the host would wait for the GPU.
        return Batch(**fields, pair_ids=pair_ids, packed_seq_params=packed_parameters(item["document_ids"]))
    from megatron_ogpsa.data import attention_mask_from_documents

    mask = attention_mask_from_documents(fields["document_ids"])
    return Batch(**fields, pair_ids=pair_ids, attention_mask=mask)


def document_boundaries(document_ids: torch.Tensor) -> torch.Tensor:
    """Offsets at which documents begin and the last one ends, over rows laid end to end.

    A document never runs over the end of a row, and padding at the end of a row counts as a document of its own.

    Args:
        document_ids: int64 [b, s].

    Returns:
        int32 [d + 1], from 0 to b·s.
    """
    starts = _is_start(document_ids).nonzero().reshape(-1)
    return torch.cat([starts, starts.new_tensor([document_ids.numel()])]).to(torch.int32)


def document_numbers(document_ids: torch.Tensor) -> torch.Tensor:
    """Of each token the number of its document, from 0 over rows laid end to end, int32 [1, b·s].

    A sum over beginnings, not ``repeat_interleave`` of lengths: that wakes all of the host's threads, if PyTorch has several,
    and in some milliseconds of each micro-batch the GPU has nothing to do.
    """
    return _is_start(document_ids).cumsum(0, dtype=torch.int32)[None] - 1


def _is_start(document_ids: torch.Tensor) -> torch.Tensor:
    """Where a document begins, bool [b·s]."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return is_start.reshape(-1)


def packed_parameters(document_ids: torch.Tensor) -> Any:
    """Megatron's ``PackedSeqParams`` in the layout ``thd``: all rows of the micro-batch end to end, [1, b·s].

    Attention reads where documents begin; state-space layers (``core/ssm/mamba_mixer.py``) read of each token its document's
    number, int32 [1, b·s], without which their state would run on into the next document.

    Args:
        document_ids: int64 [b, s], on the host.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    boundaries = document_boundaries(document_ids)
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    numbers = document_numbers(document_ids).cuda(non_blocking=True)
    boundaries = boundaries.cuda(non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_idx=numbers,
    )
