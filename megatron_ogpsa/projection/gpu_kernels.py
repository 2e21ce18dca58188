"""The two passes of a step on a GPU, as Triton kernels: each reads the gradient and the basis from memory once.

Each program takes one piece of up to 2¹⁵ elements, block by block of 2¹⁰, and keeps its sums in registers, in fp64. Eager
PyTorch writes fp64 copies of the operands to memory first. The sums of pieces are added in one order, without atomics, so
that a step is bitwise reproducible.

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

from megatron_ogpsa.projection.pieces import BlockOrder, pieces_by_span
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


class GpuKernels:
    """The two passes over the spans of one layout.

    Args:
        layout: on the device of its spans, which are fp32, and of the basis.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        self._spans = pieces_by_span(layout, most=LONGEST_PIECE)
        blocks_P = torch.cat([pieces.blocks_P for pieces in self._spans])
        self._order = BlockOrder(blocks_P, layout.num_blocks)

    def dots(self, spans: Sequence[Tensor], rows_KN: Tensor) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64.
        """
        num_rows = rows_KN.shape[0]
        padded = triton.next_power_of_2(max(num_rows, 1))
        sums_by_span = []
        for pieces, span in zip(self._spans, spans, strict=True):
            sums_PJ = torch.empty(len(pieces), num_rows + 1, dtype=torch.float64, device=span.device)
            if len(pieces):
                _dots[(len(pieces),)](
                    span,
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
            sums_by_span.append(sums_PJ)
        return self._order.sums_of_blocks(torch.cat(sums_by_span))

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
