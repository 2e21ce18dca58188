"""Tiles of a layout as tables of numbers, which is how compiled kernels want their work told.

A *piece* is a run of elements of one block in one span. A tile with one segment is a piece, a tile of short segments is
several. Kernels leave one row of sums for each piece; those of a block are added in one order, whatever ran first, so that a
step is bitwise reproducible on any number of threads.

Shape legend: P = pieces of a span or of all spans, B = blocks, J = sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from megatron_ogpsa.projection.segments import SegmentLayout, Tile


@dataclass(frozen=True)
class Pieces:
    """The pieces of one span, or of all of them.

    Attributes:
        starts_P, stops_P: elements within the span, int64.
        columns_P: of the basis, where each piece begins, int64.
        blocks_P: int64.
        weights_P: fp64, 1 where this rank's copy enters sums over ranks and 0 where it does not.
        spans_P: index of the span, int64.
    """

    starts_P: Tensor
    stops_P: Tensor
    columns_P: Tensor
    blocks_P: Tensor
    weights_P: Tensor
    spans_P: Tensor

    def __len__(self) -> int:
        return self.starts_P.numel()


def pieces_by_span(layout: SegmentLayout, *, most: int) -> list[Pieces]:
    """The pieces of each span of ``layout``, none of more than ``most`` elements, in memory order, on its device."""
    rows: list[list[tuple[int, int, int, int, float]]] = [[] for _ in layout.span_lengths]
    for tile in layout.tiles:
        for offset, length, block, weight in _runs(tile):
            for begin in range(offset, offset + length, most):
                start, stop = tile.start + begin, tile.start + min(begin + most, offset + length)
                rows[tile.span].append((start, stop, tile.column + begin, block, weight))
    return [_table(span, index, layout.device) for index, span in enumerate(rows)]


def num_pieces(tile: Tile, *, most: int) -> int:
    """How many of the pieces lie in ``tile``."""
    return sum(-(-length // most) for _, length, _, _ in _runs(tile))


def in_memory(spans: Sequence[Pieces]) -> Pieces:
    """All pieces of a layout, span after span."""
    return Pieces(*(torch.cat([getattr(span, field.name) for span in spans]) for field in fields(Pieces)))


def in_columns(spans: Sequence[Pieces]) -> Pieces:
    """All pieces of a layout, by where they lie in the columns of the basis, as if that were their one span."""
    columns_P = torch.cat([pieces.columns_P for pieces in spans])
    return Pieces(
        starts_P=columns_P,
        stops_P=columns_P + torch.cat([pieces.stops_P - pieces.starts_P for pieces in spans]),
        columns_P=columns_P,
        blocks_P=torch.cat([pieces.blocks_P for pieces in spans]),
        weights_P=torch.cat([pieces.weights_P for pieces in spans]),
        spans_P=torch.zeros_like(columns_P),
    )


def _runs(tile: Tile) -> list[tuple[int, int, int, float]]:
    """(offset in the tile, elements, block, weight) of each segment of a tile."""
    if tile.lengths_S is None:
        return [(0, tile.stop - tile.start, tile.block, float(tile.counted))]
    assert tile.blocks_S is not None
    assert tile.weights_S is not None
    lengths = tile.lengths_S.tolist()
    offsets = accumulate(lengths[:-1], initial=0)
    return list(zip(offsets, lengths, tile.blocks_S.tolist(), tile.weights_S.tolist(), strict=True))


def _table(rows: Sequence[tuple[int, int, int, int, float]], span: int, device: torch.device) -> Pieces:
    table = torch.tensor([row[:4] for row in rows], dtype=torch.int64).view(-1, 4).to(device)
    return Pieces(
        starts_P=table[:, 0].contiguous(),
        stops_P=table[:, 1].contiguous(),
        columns_P=table[:, 2].contiguous(),
        blocks_P=table[:, 3].contiguous(),
        weights_P=torch.tensor([row[4] for row in rows], dtype=torch.float64, device=device),
        spans_P=torch.full((len(rows),), span, dtype=torch.int64, device=device),
    )
