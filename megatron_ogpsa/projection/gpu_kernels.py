"""The passes of a step on a GPU, as Triton kernels: each reads the gradient and the basis from memory once.

Each program takes one piece of up to 2¹⁵ elements, block by block of 2¹⁰, and keeps its sums in registers, in fp64. Eager
PyTorch writes fp64 copies of the operands to memory first. The sums of pieces are added in one order, without atomics, so
that a step is bitwise reproducible.

A refresh multiplies references with each other and with the basis by the same kernel, one reference at a time.

Has run under Triton's interpreter only, which checks what it computes and not how fast.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ogpsa.projection.pieces import BlockOrder, Pieces, in_columns, pieces_by_span
from megatron_ogpsa.projection.segments import SegmentLayout

LONGEST_PIECE = 2**15
_PRODUCTS = 2048
"""Products that a program holds at a time, in fp64: 16 for each of its 128 threads."""
_BLOCK = 1024


@triton.jit
def _dots(
    vector: Any,
    rows: Any,
    row_stride: Any,
    starts: Any,
    stops: Any,
    columns: Any,
    weights: Any,
    sums: Any,
    num_rows: tl.constexpr,
    padded_rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """sums[p, k] = weight_p·Σ g·q_k over the piece p; sums[p, K] = weight_p·Σ g²."""
    piece = tl.program_id(0)
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    shift = tl.load(columns + piece) - start
    weight = tl.load(weights + piece)
    row = tl.arange(0, padded_rows)
    with_rows = tl.zeros((padded_rows, block), dtype=tl.float64)
    with_itself = tl.zeros((block,), dtype=tl.float64)
    for begin in range(start, stop, block):
        offsets = begin + tl.arange(0, block)
        inside = offsets < stop
        value = tl.load(vector + offsets, mask=inside, other=0.0).to(tl.float64)
        with_itself += value * value
        at = rows + row[:, None] * row_stride + (offsets + shift)[None, :]
        held = (row < num_rows)[:, None] & inside[None, :]
        with_rows += tl.load(at, mask=held, other=0.0).to(tl.float64) * value[None, :]
    out = sums + piece * (num_rows + 1)
    tl.store(out + row, weight * tl.sum(with_rows, axis=1), mask=row < num_rows)
    tl.store(out + num_rows, weight * tl.sum(with_itself, axis=0))


@triton.jit
def _subtract(
    vector: Any,
    rows: Any,
    row_stride: Any,
    starts: Any,
    stops: Any,
    columns: Any,
    blocks: Any,
    coefficients: Any,
    num_rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """g ← g − Σ_k r_bk·q_k over a piece, in the order of k for every element, wherever it lies."""
    piece = tl.program_id(0)
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    shift = tl.load(columns + piece) - start
    own = coefficients + tl.load(blocks + piece) * num_rows
    for begin in range(start, stop, block):
        offsets = begin + tl.arange(0, block)
        inside = offsets < stop
        total = tl.zeros((block,), dtype=tl.float32)
        for k in tl.static_range(num_rows):
            row = tl.load(rows + k * row_stride + offsets + shift, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(own + k) * row
        value = tl.load(vector + offsets, mask=inside, other=0.0)
        tl.store(vector + offsets, value - total, mask=inside)


@triton.jit
def _combine(
    rows: Any,
    row_stride: Any,
    out: Any,
    out_stride: Any,
    starts: Any,
    stops: Any,
    blocks: Any,
    weights: Any,
    num_rows: tl.constexpr,
    num_out: tl.constexpr,
    padded_out: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """out[r] = Σ_k w_bkr·rows[k] over a piece of columns, in fp64, in the order of k for every element."""
    piece = tl.program_id(0)
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    own = weights + tl.load(blocks + piece) * num_rows * num_out
    column = tl.arange(0, padded_out)
    is_column = column < num_out
    for begin in range(start, stop, block):
        offsets = begin + tl.arange(0, block)
        inside = offsets < stop
        totals = tl.zeros((padded_out, block), dtype=tl.float64)
        for k in tl.static_range(num_rows):
            weight = tl.load(own + k * num_out + column, mask=is_column, other=0.0)
            row = tl.load(rows + k * row_stride + offsets, mask=inside, other=0.0).to(tl.float64)
            totals += weight[:, None] * row[None, :]
        tl.debug_barrier()  # ``out`` may be ``rows``, and another thread may still have to read
        at = out + column[:, None] * out_stride + offsets[None, :]
        tl.store(at, totals.to(tl.float32), mask=is_column[:, None] & inside[None, :])


class GpuKernels:
    """The passes over the spans of one layout, and over the columns of its basis.

    Args:
        layout: on the device of its spans, which are fp32, and of the basis.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        self._spans = pieces_by_span(layout, most=LONGEST_PIECE)
        self._columns = in_columns(self._spans)
        self._order = BlockOrder(self._columns.blocks_P, layout.num_blocks)

    def dots(self, spans: Sequence[Tensor], rows_KN: Tensor) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64.
        """
        sums = [_sums(span, pieces, rows_KN) for pieces, span in zip(self._spans, spans, strict=True)]
        return self._order.sums_of_blocks(torch.cat(sums))

    def gram(self, rows_KN: Tensor) -> Tensor:
        """R·Rᵀ of each block: fp64 [B, K, K], this rank's share. The same bits on both sides of the diagonal."""
        gram_BKK = self.products(rows_KN, rows_KN).tril()
        return gram_BKK + gram_BKK.tril(-1).mT

    def products(self, rows_KN: Tensor, others_JN: Tensor) -> Tensor:
        """R·Oᵀ of each block: fp64 [B, K, J], this rank's share. O is read once for each row of R."""
        tables = [self._order.sums_of_blocks(_sums(row_N, self._columns, others_JN)) for row_N in rows_KN]
        return torch.stack(tables, dim=1)[..., :-1]

    def subtract(self, spans: Sequence[Tensor], rows_KN: Tensor, coefficients_BK: Tensor) -> None:
        """g ← g − Σ_k r_bk·q_k, b being the block of each element; sums in fp32."""
        coefficients_BK = coefficients_BK.float().contiguous()
        for pieces, span in zip(self._spans, spans, strict=True):
            if len(pieces):
                _subtract[(len(pieces),)](
                    span,
                    rows_KN,
                    rows_KN.stride(0),
                    pieces.starts_P,
                    pieces.stops_P,
                    pieces.columns_P,
                    pieces.blocks_P,
                    coefficients_BK,
                    num_rows=rows_KN.shape[0],
                    block=_BLOCK,
                )

    def combine(self, rows_KN: Tensor, weights_BKJ: Tensor, out_JN: Tensor) -> None:
        """out = Wᵀ·R, block by block, in fp64; R may be ``out``."""
        pieces = self._columns
        if len(pieces) == 0:
            return
        padded = triton.next_power_of_2(len(out_JN))
        _combine[(len(pieces),)](
            rows_KN,
            rows_KN.stride(0),
            out_JN,
            out_JN.stride(0),
            pieces.starts_P,
            pieces.stops_P,
            pieces.blocks_P,
            weights_BKJ.contiguous(),
            num_rows=len(rows_KN),
            num_out=len(out_JN),
            padded_out=padded,
            block=max(_PRODUCTS // padded, 64),
        )


def _sums(vector: Tensor, pieces: Pieces, rows_KN: Tensor) -> Tensor:
    """R·v and ‖v‖² of each piece of v: fp64 [P, K+1]."""
    num_rows = rows_KN.shape[0]
    padded = triton.next_power_of_2(max(num_rows, 1))
    sums_PJ = torch.empty(len(pieces), num_rows + 1, dtype=torch.float64, device=vector.device)
    if len(pieces):
        _dots[(len(pieces),)](
            vector,
            rows_KN,
            rows_KN.stride(0),
            pieces.starts_P,
            pieces.stops_P,
            pieces.columns_P,
            pieces.weights_P,
            sums_PJ,
            num_rows=num_rows,
            padded_rows=padded,
            block=max(_PRODUCTS // padded, 64),
        )
    return sums_PJ
