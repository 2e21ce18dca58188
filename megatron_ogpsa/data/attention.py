"""The attention mask of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask_from_documents(document_ids: Tensor) -> Tensor:
    """Which (query, key) pairs attention must not see, in Megatron's convention: ``True`` is masked out.

    A query sees the keys of its own document up to itself. Padding (-1) counts as one more document, so that every
    query sees at least itself and no softmax is taken over nothing, which would be NaN.

    Args:
        document_ids: int64 ``[b, s]``, the document of each position, -1 on padding.

    Returns:
        bool ``[b, 1, s, s]``, dimensions (sample, head, query, key), on the device of ``document_ids``.
    """
    seq_length = document_ids.shape[-1]
    is_future = torch.ones(seq_length, seq_length, dtype=torch.bool, device=document_ids.device).triu(diagonal=1)
    is_foreign = document_ids[:, :, None] != document_ids[:, None, :]
    return (is_foreign | is_future)[:, None]
