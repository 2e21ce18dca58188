"""Context parallelism on the CPU: an attention that gathers keys and values, and this rank's part of a batch.

Latent attention goes through it too, since Megatron's own does not take the sizes of its heads.

Megatron cuts each sequence into 2·cp chunks and gives rank r the chunks r and 2·cp − 1 − r, so that all ranks have as much
causal attention to do. Its own attention for that is Transformer Engine's.

Shape legend: S = positions of this rank, T = positions of all ranks, B = rows, H = query heads, G = query groups, E = head
size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor


def own_part(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's positions of a batch; each tensor is [B, positions]."""
    group = parallel_state.get_context_parallel_group()
    part: dict[str, Tensor] = get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=group)
    return part


def positions_of(rank: int, size: int, length: int) -> Tensor:
    """int64 [S]: the positions that a rank holds of a sequence of ``length``, in its order."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


class _Gather(torch.autograd.Function):
    """[S, ...] of each rank → [T, ...] in the order of ranks; a rank's gradient is the sum of what all ranks make of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class GatheringAttention(torch.nn.Module):
    """A core attention, built as Megatron builds its own: causal, without dropout, over all context-parallel ranks."""

    def __init__(
        self, config: Any, layer_number: int, *, softmax_scale: float | None, pg_collection: Any, **others: Any
    ) -> None:
        super().__init__()
        assert config.attention_dropout == 0.0
        head_size = getattr(config, "qk_head_dim", 0) + getattr(config, "qk_pos_emb_head_dim", 0)
        assert softmax_scale is None or math.isclose(softmax_scale, head_size**-0.5)
        self._group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self, query_SBHE: Tensor, key_SBGE: Tensor, value_SBGE: Tensor, attention_mask: None, **others: Any
    ) -> Tensor:
        """Returns [S, B, H·E]."""
        repeats = query_SBHE.shape[2] // key_SBGE.shape[2]
        key_TBHE, value_TBHE = (
            _Gather.apply(own, self._group).repeat_interleave(repeats, dim=2) for own in (key_SBGE, value_SBGE)
        )
        size, length = self._group.size(), key_TBHE.shape[0]
        own_S = positions_of(self._group.rank(), size, length)
        all_T = torch.cat([positions_of(rank, size, length) for rank in range(size)])
        scores_BHST = torch.einsum("sbhe,tbhe->bhst", query_SBHE, key_TBHE) / query_SBHE.shape[-1] ** 0.5
        weights_BHST = scores_BHST.masked_fill(all_T > own_S[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhst,tbhe->sbhe", weights_BHST, value_TBHE).flatten(2)
