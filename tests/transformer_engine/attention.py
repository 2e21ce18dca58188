"""Fused attention: softmax(scale · q kᵀ) v with a mask by position and by sequence, in fp32, without dropout.

Layouts ``sbhd``, ``bshd`` and ``thd`` (several sequences end to end). Kept for the backward pass is log Σ exp of each query's
scores, *not* its probabilities: over context-parallel ranks the backward pass of a part of the keys takes the sum over all.

Shape legend: b sequences, h query heads, s queries, t keys, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.enums import NVTE_Mask_Type, NVTE_QKV_Layout

CAUSAL = ("NVTE_CAUSAL_MASK", "NVTE_PADDING_CAUSAL_MASK")
CAUSAL_BOTTOM_RIGHT = ("NVTE_CAUSAL_BOTTOM_RIGHT_MASK", "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK")


@dataclass(frozen=True)
class Problem:
    """One call's layout, mask and sequences.

    Attributes:
        form: ``sbhd``, ``bshd`` or ``thd``.
        mask: the name of the mask.
        queries, keys: boundaries of sequences, int32 [b + 1], where the mask or the layout goes by them.
        places: where they begin in memory, if there is padding between them.
    """

    form: str
    mask: str
    scale: float
    queries: Tensor
    keys: Tensor
    query_places: Tensor
    key_places: Tensor

    def sequences(self, q: Tensor, k: Tensor) -> Iterator[tuple[int, Any, Any]]:
        """(number, where its queries are in q, where its keys are in k) of each sequence."""
        if self.form == "thd":
            lengths = zip(self.queries.diff().tolist(), self.keys.diff().tolist(), strict=True)
            starts = zip(self.query_places.tolist(), self.key_places.tolist(), strict=False)
            for number, ((s, t), (at_q, at_k)) in enumerate(zip(lengths, starts, strict=False)):
                yield number, slice(at_q, at_q + s), slice(at_k, at_k + t)
            return
        padded = "PADDING" in self.mask
        for number in range(q.shape[self.form.index("b")]):
            s = int(self.queries.diff()[number]) if padded else q.shape[self.form.index("s")]
            t = int(self.keys.diff()[number]) if padded else k.shape[self.form.index("s")]
            for_rows = (slice(s), number) if self.form == "sbhd" else (number, slice(s))
            for_keys = (slice(t), number) if self.form == "sbhd" else (number, slice(t))
            yield number, for_rows, for_keys

    def scores(self, q_shd: Tensor, k_thd: Tensor) -> Tensor:
        """[h, s, t], minus infinity where the mask is."""
        scores = self.scale * torch.einsum("shd,thd->hst", q_shd, k_thd)
        s, t = scores.shape[1:]
        if self.mask in CAUSAL or self.mask in CAUSAL_BOTTOM_RIGHT:
            offset = t - s if self.mask in CAUSAL_BOTTOM_RIGHT else 0
            hidden = torch.ones(s, t, dtype=torch.bool).triu(1 + offset)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: int,
    o_format: int,
    scale_inv_format: int,
    bias_type: int,
    mask_type: int,
    softmax_type: int,
    window: tuple[int, int],
    bottom_right: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *others: Any,
) -> list[Tensor]:
    """The output in the form of q; log Σ exp of scores, fp32 [b, h, s, 1]; a state of random numbers that are not drawn."""
    if (dropout and is_training) or bias_type or softmax_type or window not in ((-1, -1), (-1, 0)):
        raise NotImplementedError("fused attention is emulated without dropout, bias, sinks and windows")
    problem = _problem(layout, mask_type, scale, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    sums = torch.full((len(cu_seqlens_q) - 1, q.shape[-2], max_seqlen_q, 1), -torch.inf)
    for number, rows, keys in problem.sequences(q, k):
        scores = problem.scores(q[rows].float(), _for_query_heads(k[keys], q))
        log_sums = scores.logsumexp(-1)
        probabilities = (scores - log_sums[..., None]).exp().nan_to_num()
        out[rows] = torch.einsum("hst,thd->shd", probabilities, _for_query_heads(v[keys], q)).to(out.dtype)
        sums[number, :, : log_sums.shape[1], 0] = log_sums
    return [out, sums, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: int,
    o_format: int,
    do_format: int,
    dqkv_layout: int,
    qkv_scale_inv_format: int,
    do_scale_inv_format: int,
    bias_type: int,
    mask_type: int,
    softmax_type: int,
    window: tuple[int, int],
    bottom_right: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    aux: list[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *others: Any,
) -> list[Tensor | None]:
    """Gradients of q, k and v: P = exp(scores - log Σ exp), dS = P (dO vᵀ - Σ dO O)."""
    problem = _problem(layout, mask_type, scale, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
    d_q, d_k, d_v = (torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v))
    groups = k.shape[-2]
    for number, rows, keys in problem.sequences(q, k):
        queries, all_keys, values = q[rows].float(), _for_query_heads(k[keys], q), _for_query_heads(v[keys], q)
        gradient, output = d_o[rows].float(), o[rows].float()
        log_sums = aux[0][number, :, : queries.shape[0]].reshape(queries.shape[1], queries.shape[0], 1)
        probabilities = (problem.scores(queries, all_keys) - log_sums).exp().nan_to_num()
        of_values = torch.einsum("hst,shd->thd", probabilities, gradient)
        of_probabilities = torch.einsum("shd,thd->hst", gradient, values)
        of_scores = scale * probabilities * (of_probabilities - (gradient * output).sum(-1).T[..., None])
        d_q[rows] = torch.einsum("hst,thd->shd", of_scores, all_keys).to(q.dtype)
        for target, full in ((d_k, torch.einsum("hst,shd->thd", of_scores, queries)), (d_v, of_values)):
            target[keys] = full.unflatten(1, (groups, -1)).sum(2).to(target.dtype)
    return [d_q, d_k, d_v, None]


def _problem(
    layout: int,
    mask_type: int,
    scale: float,
    queries: Tensor,
    keys: Tensor,
    query_places: Tensor | None,
    key_places: Tensor | None,
) -> Problem:
    name = NVTE_QKV_Layout(layout).name.removeprefix("NVTE_")
    return Problem(
        form="thd" if name.startswith("T") else "sbhd" if name.startswith("SB") else "bshd",
        mask=NVTE_Mask_Type(mask_type).name,
        scale=scale,
        queries=queries,
        keys=keys,
        query_places=queries if query_places is None else query_places,
        key_places=keys if key_places is None else key_places,
    )


def _for_query_heads(tensor_thd: Tensor, q: Tensor) -> Tensor:
    """Keys or values of each query head's group, fp32."""
    return tensor_thd.float().repeat_interleave(q.shape[-2] // tensor_thd.shape[-2], dim=-2)
