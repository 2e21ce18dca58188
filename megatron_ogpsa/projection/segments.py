"""Block-wise products of long vectors that lie contiguously in memory.

A gradient shard is a handful of contiguous *spans* (Megatron's gradient buffers). A span is covered by *segments*: runs
of elements that belong to one block. Work is cut into *tiles*: pieces of one span that are small enough for a
processor's cache (or few enough launches on an accelerator). A tile inside one segment is a plain matrix-vector
product; neighbouring short segments (norm weights, biases, the cuts of a data-parallel shard) share a tile and are
summed by one segmented reduction. The number of tiles therefore depends on the number of elements and not on the
number of parameters.

Shape legend: N = elements of this rank's shard, T = elements of a tile, S = segments in a tile, B = blocks of the whole
model, K = basis vectors. Sums are accumulated in fp64 whatever the tensors' dtypes: an fp32 sum leaks 4e-5 of a
gradient of 1M elements back into the protected subspace, fp64 leaves 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of elements of one block.

    Attributes:
        length: number of elements.
        block: index of the block in the whole model.
        counted: whether this rank's copy is the one that enters sums over ranks.
    """

    length: int
    block: int
    counted: bool


@dataclass(frozen=True)
class TileLimits:
    """How a device wants its work cut.

    Attributes:
        tile: most elements of a tile; on CPU the fp64 copies of a tile should stay in the L2 cache.
        short: segments below this many elements share a tile with their neighbours.
    """

    tile: int
    short: int

    @classmethod
    def for_device(cls, device: torch.device) -> TileLimits:
        """Measured on CPU; on an accelerator few launches matter more than the cache."""
        return cls(tile=2**15, short=2**12) if device.type == "cpu" else cls(tile=2**24, short=2**20)


@dataclass(frozen=True)
class Tile:
    """A piece of one span, with the segments that it holds.

    Attributes:
        span: index of the span.
        start, stop: elements within the span.
        column: where the tile begins in the shard, and so in the basis' columns.
        block: the block, where the tile holds one segment; otherwise -1 and the tensors below are set.
        counted: likewise.
        lengths_S, blocks_S: int64.
        weights_S: fp64, 1 for what is counted and 0 for what is not.
    """

    span: int
    start: int
    stop: int
    column: int
    block: int
    counted: bool
    lengths_S: Tensor | None = None
    blocks_S: Tensor | None = None
    weights_S: Tensor | None = None

    @property
    def columns(self) -> slice:
        """The tile's columns of the basis."""
        return slice(self.column, self.column + self.stop - self.start)


class SegmentLayout:
    """Which block each element of a shard belongs to, cut into tiles.

    Args:
        spans: the segments of each span, in memory order.
        num_blocks: blocks of the whole model, on all ranks.
        device: where the spans live.
        limits: how to cut; by default what suits the device.
        columns: of the basis, where each span begins; by default spans follow each other.
        num_columns: of the basis, of which some may belong to no span; by default all do.
    """

    def __init__(
        self,
        spans: Sequence[Sequence[Segment]],
        num_blocks: int,
        device: torch.device,
        limits: TileLimits | None = None,
        columns: Sequence[int] | None = None,
        num_columns: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.device = device
        self.limits = limits or TileLimits.for_device(device)
        self.span_lengths = [sum(segment.length for segment in span) for span in spans]
        self.num_elements = sum(self.span_lengths)
        self.num_columns = self.num_elements if num_columns is None else num_columns
        self.tiles: list[Tile] = []
        if columns is None:
            columns = [0, *accumulate(self.span_lengths)][: len(spans)]
        for index, (span, column) in enumerate(zip(spans, columns, strict=True)):
            self.tiles.extend(self._cut(index, _merged(span), column))

    @property
    def multiple(self) -> int:
        """The largest number of elements that every tile, column and row begins at a multiple of: their alignment."""
        places = (number for tile in self.tiles for number in (tile.start, tile.column))
        return math.gcd(self.num_columns, self.limits.tile, *places)

    def _cut(self, span: int, segments: Sequence[Segment], column: int) -> Iterator[Tile]:
        """Long segments become tiles of their own, runs of short ones are packed together."""
        begin = 0  # start of the open group of short segments, within the span
        group: list[Segment] = []
        position = 0
        for segment in segments:
            is_long = segment.length >= self.limits.short
            if group and (is_long or position - begin + segment.length > self.limits.tile):
                yield self._tile(span, begin, group, column)
                group = []
            if is_long:
                for start in range(position, position + segment.length, self.limits.tile):
                    stop = min(start + self.limits.tile, position + segment.length)
                    yield Tile(span, start, stop, column + start, segment.block, segment.counted)
            else:
                begin = begin if group else position
                group.append(segment)
            position += segment.length
        if group:
            yield self._tile(span, begin, group, column)

    def _tile(self, span: int, start: int, group: Sequence[Segment], column: int) -> Tile:
        stop = start + sum(segment.length for segment in group)
        if len(group) == 1:
            return Tile(span, start, stop, column + start, group[0].block, group[0].counted)
        return Tile(
            span,
            start,
            stop,
            column + start,
            block=-1,
            counted=False,
            lengths_S=self._integers(s.length for s in group),
            blocks_S=self._integers(s.block for s in group),
            weights_S=torch.tensor([float(s.counted) for s in group], dtype=torch.float64, device=self.device),
        )

    def _integers(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)

    def table(self, *shape: int) -> Tensor:
        """A zero fp64 table with one row for each block: [B, *shape]."""
        return torch.zeros(self.num_blocks, *shape, dtype=torch.float64, device=self.device)


@runtime_checkable
class TileSource(Protocol):
    """K vectors over a shard that lie elsewhere and are brought to the layout's device, one tile at a time."""

    @property
    def shape(self) -> torch.Size:
        """[K, N]."""

    @property
    def dtype(self) -> torch.dtype:
        """As they are stored, and brought."""

    def tiles(self, layout: SegmentLayout) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile of ``layout`` in order, with its columns [K, T], which hold until the next tile is asked for."""


Rows = Tensor | TileSource
"""K vectors over a shard, any float dtype: a tensor [K, N] on the layout's device, or what brings them there."""


def tiles_of(layout: SegmentLayout, rows_KN: Rows) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile of ``layout`` in order, with its columns [K, T] on the layout's device."""
    if isinstance(rows_KN, Tensor):
        return ((tile, rows_KN[:, tile.columns]) for tile in layout.tiles)
    return rows_KN.tiles(layout)


def _merged(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbours of the same block and the same ownership."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and (merged[-1].block, merged[-1].counted) == (segment.block, segment.counted):
            merged[-1] = Segment(merged[-1].length + segment.length, segment.block, segment.counted)
        elif segment.length:
            merged.append(segment)
    return merged


def _accumulate(table_B: Tensor, tile: Tile, products_T: Tensor) -> None:
    """Add the sums of ``products`` (fp64, [..., T]) over each segment to the rows of their blocks."""
    assert tile.lengths_S is not None
    assert tile.blocks_S is not None
    assert tile.weights_S is not None
    # Each segment is summed on its own. Differences of one prefix sum over the tile would leave the rounding error of
    # large neighbours in a small block: 4 % of the Gram matrix of a block whose gradient is 1e-6 of theirs.
    sums = [
        torch.segment_reduce(product_T, "sum", lengths=tile.lengths_S, unsafe=True)
        for product_T in products_T.flatten(0, -2)
    ]
    sums_S = (torch.stack(sums, dim=-1) * tile.weights_S[:, None]).unflatten(-1, products_T.shape[:-1])
    if table_B.device.type == "cpu":  # which adds one after the other
        table_B.index_add_(0, tile.blocks_S, sums_S)
        return
    # A GPU adds as its threads come, which gives other bits in each run where a block has several segments: sum those first.
    order_S = tile.blocks_S.argsort(stable=True)
    blocks, numbers = tile.blocks_S[order_S].unique_consecutive(return_counts=True)
    flat = sums_S[order_S].flatten(1)
    table_B[blocks] += torch.segment_reduce(flat, "sum", lengths=numbers, axis=0, unsafe=True).view(
        -1, *sums_S.shape[1:]
    )


def cross_products(layout: SegmentLayout, rows_KN: Rows, others_JN: Rows) -> Tensor:
    """Local inner products, block by block, of K vectors with J others: R·Oᵀ.

    Returns:
        fp64 [B, K, J]: this rank's share, elements that are not counted left out. Sum over ranks next.
    """
    table = layout.table(rows_KN.shape[0], others_JN.shape[0])
    for (tile, rows_KT), (_, others_JT) in zip(tiles_of(layout, rows_KN), tiles_of(layout, others_JN), strict=True):
        if not tile.counted and tile.lengths_S is None:
            continue
        rows_KT, others_JT = rows_KT.double(), others_JT.double()
        if tile.lengths_S is None:
            table[tile.block] += rows_KT @ others_JT.mT
        else:
            _accumulate(table, tile, rows_KT[:, None, :] * others_JT[None, :, :])
    return table


def gram_and_dots(layout: SegmentLayout, rows_KN: Rows, spans: Sequence[Tensor] | None = None) -> Tensor:
    """Local inner products, block by block, of K vectors with each other or with one more vector.

    Without ``spans``: M = R·Rᵀ, the Gram matrices of the rows. With ``spans`` (a gradient g in Megatron's buffers): the
    coefficients c = R·g and, in the last column, ‖g‖².

    Args:
        rows_KN: K vectors over the shard.
        spans: 1-D tensors, one for each span of the layout.

    Returns:
        fp64 [B, K, K], or [B, K+1]: this rank's share. Sum over ranks next. Elements that are not counted add zero times
        themselves, which is NaN where they are not finite: a copy that differs from the counted one must not go unseen.
    """
    num_rows = rows_KN.shape[0]
    table = layout.table(num_rows, num_rows) if spans is None else layout.table(num_rows + 1)
    for tile, stored_KT in tiles_of(layout, rows_KN):
        weight = float(tile.counted)  # of a tile with one segment
        rows_KT = stored_KT.double()
        if spans is None:
            if tile.lengths_S is None:
                table[tile.block] += weight * (rows_KT @ rows_KT.mT)
            else:
                _accumulate(table, tile, rows_KT[:, None, :] * rows_KT[None, :, :])
            continue
        vector_T = spans[tile.span][tile.start : tile.stop].double()
        if tile.lengths_S is None:
            table[tile.block, :num_rows] += weight * (rows_KT @ vector_T)
            table[tile.block, num_rows] += weight * (vector_T @ vector_T)
        else:
            _accumulate(table, tile, torch.cat((rows_KT, vector_T[None])) * vector_T)
    return table


def _per_element(tile: Tile, values_B: Tensor) -> Tensor:
    """The value of each element's block: 0-D if the tile lies in one block, else [T]."""
    if tile.lengths_S is None:
        return values_B[tile.block]
    assert tile.blocks_S is not None
    # Without the size of what comes out, the host would wait for the lengths.
    return values_B[tile.blocks_S].repeat_interleave(tile.lengths_S, output_size=tile.stop - tile.start)


def _combination(tile: Tile, weights_BK: Tensor, rows_KT: Tensor) -> Tensor:
    """Σ_k w_bk·row_k, b being the block of each element: [T] in the dtype of both.

    Copies of a weight on several ranks must stay bitwise the same, and lie in tiles of other sizes there, because only
    one copy is counted. A matrix product chooses the order of its sums and whether to fuse them by the size and place
    of its operands. Products and sums that are rounded one by one, in the order of k, come out the same everywhere.
    """
    total_T = rows_KT[0] * _per_element(tile, weights_BK[:, 0])
    for k in range(1, rows_KT.shape[0]):
        total_T += rows_KT[k] * _per_element(tile, weights_BK[:, k])
    return total_T


def subtract_combination(
    layout: SegmentLayout, spans: Sequence[Tensor], rows_KN: Rows, coefficients_BK: Tensor
) -> None:
    """g ← g − Σ_k r_bk·q_k in place, b being the block of each element; copies that are not counted are changed alike.

    Args:
        spans: the gradient, 1-D tensors in any float dtype; sums are formed in fp32 and rounded once.
        rows_KN: the basis.
        coefficients_BK: r, on the layout's device.
    """
    coefficients_BK = coefficients_BK.float()
    for tile, rows_KT in tiles_of(layout, rows_KN):
        spans[tile.span][tile.start : tile.stop].sub_(_combination(tile, coefficients_BK, rows_KT.float()))


def combine_rows(layout: SegmentLayout, rows_KN: Rows, weights_BKJ: Tensor, out_JN: Tensor) -> None:
    """out = Wᵀ·rows, block by block: turns reference gradients into basis vectors. ``out`` may be ``rows`` itself, or the
    host memory that they come from.

    The product is formed in fp64: with nearly parallel references W is large and its terms cancel.
    """
    for tile, stored_KT in tiles_of(layout, rows_KN):
        rows_KT = stored_KT.double()
        combined = [_combination(tile, weights_BK, rows_KT) for weights_BK in weights_BKJ.unbind(-1)]
        for out_N, combined_T in zip(out_JN, combined, strict=True):
            out_N[tile.columns] = combined_T.to(out_JN.dtype)
