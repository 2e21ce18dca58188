"""Rows dealt out to data-parallel ranks and micro-batches, for passes outside Megatron's own data loaders."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

Row = dict[str, Tensor]


class Rows(Protocol):
    """Rows by index, as a list or a map-style data set gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


def micro_batches_at_once(settings: Any) -> int:
    """The number of which a pass through Megatron's schedule must have a multiple.

    Interleaved schedules take micro-batches in groups (``--microbatch-group-size-per-virtual-pipeline-stage``, the number of
    stages if it is not given); the last group may be smaller, but not smaller than the number of stages.

    Args:
        settings: Megatron's arguments, or a model's configuration.
    """
    if settings.virtual_pipeline_model_parallel_size is None:
        return 1
    return int(settings.microbatch_group_size_per_vp_stage or settings.pipeline_model_parallel_size)


def deal_out(rows: Rows, *, micro_batch_size: int, rank: int, size: int, multiple: int = 1) -> list[Row]:
    """This rank's micro-batches; every rank gets the same number.

    Sums over all rows do not depend on how rows are dealt out. Where they do not come out even, rows without a supervised
    token and without a pair fill the last micro-batches. They add nothing to any sum of losses over tokens or pairs; routers
    do route their tokens, so that losses that balance experts see a few more.

    Args:
        rows: at least one; tensors of one shape for each name. Only this rank's are read, and the first where rows fill up.
        rank, size: of the data-parallel group.
        multiple: micro-batches per rank must be a multiple of this (:func:`micro_batches_at_once`).

    Returns:
        collated rows, [micro-batch, ...] each.
    """
    number = len(rows)
    indices = range(rank, number + -number % (micro_batch_size * size * multiple), size)
    filler = filler_like(rows[0]) if indices[-1] >= number else {}
    mine = [rows[index] if index < number else filler for index in indices]
    return [
        {name: torch.stack([row[name] for row in mine[start : start + micro_batch_size]]) for name in mine[0]}
        for start in range(0, len(mine), micro_batch_size)
    ]


def filler_like(row: Row) -> Row:
    """A row without a supervised token and without a pair, of the shape of ``row``."""
    filler = {name: tensor.clone() for name, tensor in row.items()}
    filler["loss_mask"].zero_()
    if "pair_ids" in filler:
        filler["pair_ids"].fill_(-1)
    return filler
