"""The passes of a step on a GPU, as Triton kernels: each reads the gradient and the basis from memory once.

Each program takes one piece of up to 2¹⁵ elements, some hundred at a time, and keeps its sums in registers, in fp64. Eager
PyTorch writes fp64 copies of the operands to memory first. The sums of pieces are added in one order, without atomics, so
that a step is bitwise reproducible.

Spans lie anywhere in memory, in an update as many as there are parameters: kernels find them in a table of addresses, so
that a pass is one launch. A basis in host memory comes tile by tile, a launch for each, and the sums are those of a basis
beside the gradient, because the pieces are the same. A refresh multiplies references with each other and with the basis by
the same kernel, one reference at a time.

What is written is rounded after each product and each sum, never fused, so that it is the same to the bit as PyTorch's.

Has run under Triton's interpreter, which checks what it computes, and is compiled for a GPU by its tests; has not run on one.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard, T = of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import proxy

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ogpsa.projection.pieces import BlockOrder, Pieces, in_columns, in_memory, num_pieces, pieces_by_span
from megatron_ogpsa.projection.segments import Rows, SegmentLayout, tiles_of

LONGEST_PIECE = 2**15
_PRODUCTS = 2048
"""Products that a program holds at a time, in fp64: 16 for each of its 128 threads."""
_BLOCK = 1024
_MOST_TABLES = 64
"""Of addresses that are kept: gradients, parameters, references and staging buffers stay where they are."""

# Triton reads the annotations of a kernel's arguments. Those of strides are there because it takes an integer for one of 32
# bits where it fits, and k·N does not need to.

VECTOR_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["first_element", "first_piece", "first_column"])
def _dots(
    addresses: tl.tensor,
    spans: tl.tensor,
    first_element: tl.int64,
    rows: tl.tensor,
    row_stride: tl.int64,
    first_piece: tl.int64,
    first_column: tl.int64,
    starts: tl.tensor,
    stops: tl.tensor,
    columns: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    vector_type: tl.constexpr,
    num_rows: tl.constexpr,
    padded_rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """sums[p, k] = weight_p·Σ g·q_k over the piece p; sums[p, K] = weight_p·Σ g²."""
    piece = first_piece + tl.program_id(0)
    vector = tl.load(addresses + tl.load(spans + piece)).to(tl.pointer_type(vector_type))
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    shift = tl.load(columns + piece) - first_column - start
    weight = tl.load(weights + piece)
    row = tl.arange(0, padded_rows)
    with_rows = tl.zeros((padded_rows, block), dtype=tl.float64)
    with_itself = tl.zeros((block,), dtype=tl.float64)
    for begin in range(start, stop, block):
        offsets = begin + tl.arange(0, block)
        inside = offsets < stop
        value = tl.load(vector + (offsets - first_element), mask=inside, other=0.0).to(tl.float64)
        with_itself += value * value
        at = rows + row[:, None] * row_stride + (offsets + shift)[None, :]
        held = (row < num_rows)[:, None] & inside[None, :]
        with_rows += tl.load(at, mask=held, other=0.0).to(tl.float64) * value[None, :]
    out = sums + piece * (num_rows + 1)
    tl.store(out + row, weight * tl.sum(with_rows, axis=1), mask=row < num_rows)
    tl.store(out + num_rows, weight * tl.sum(with_itself, axis=0))


@triton.jit(do_not_specialize=["first_piece", "first_column"])
def _subtract(
    addresses: tl.tensor,
    spans: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.int64,
    first_piece: tl.int64,
    first_column: tl.int64,
    starts: tl.tensor,
    stops: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    coefficients: tl.tensor,
    vector_type: tl.constexpr,
    num_rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """g ← g − Σ_k r_bk·q_k over a piece, in the order of k for every element, wherever it lies."""
    piece = first_piece + tl.program_id(0)
    vector = tl.load(addresses + tl.load(spans + piece)).to(tl.pointer_type(vector_type))
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    shift = tl.load(columns + piece) - first_column - start
    own = coefficients + tl.load(blocks + piece) * num_rows
    for begin in range(start, stop, block):
        offsets = begin + tl.arange(0, block)
        inside = offsets < stop
        total = tl.zeros((block,), dtype=tl.float32)
        for k in tl.static_range(num_rows):
            row = tl.load(rows + k * row_stride + offsets + shift, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(own + k) * row
        value = tl.load(vector + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(vector + offsets, (value - total).to(vector_type), mask=inside)


@triton.jit(do_not_specialize=["first_piece", "first_column", "first_out"])
def _combine(
    rows: tl.tensor,
    row_stride: tl.int64,
    out: tl.tensor,
    out_stride: tl.int64,
    first_piece: tl.int64,
    first_column: tl.int64,
    first_out: tl.int64,
    starts: tl.tensor,
    stops: tl.tensor,
    blocks: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.constexpr,
    num_out: tl.constexpr,
    padded_out: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """out[j] = Σ_k w_bkj·rows[k] over a piece of columns, in fp64, in the order of k for every element."""
    piece = first_piece + tl.program_id(0)
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
            row = tl.load(rows + k * row_stride + offsets - first_column, mask=inside, other=0.0).to(tl.float64)
            totals += weight[:, None] * row[None, :]
        tl.debug_barrier()  # ``out`` may be ``rows``, and another thread may still have to read
        at = out + column[:, None] * out_stride + (offsets - first_out)[None, :]
        tl.store(at, totals.to(tl.float32), mask=is_column[:, None] & inside[None, :])


@dataclass(frozen=True)
class _Part:
    """Rows on the device, and which pieces lie in their columns.

    Attributes:
        rows_KT: fp32 or bf16; rows may lie apart.
        first_column: of the shard, where they begin.
    """

    rows_KT: Tensor
    first_column: int
    first_piece: int
    num_pieces: int


class GpuKernels:
    """The passes over the spans of one layout, and over the columns of its basis.

    Args:
        layout: on the device of its spans, which are of one of :data:`VECTOR_TYPES`; the basis is fp32 or bf16.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        by_span = pieces_by_span(layout, most=LONGEST_PIECE)
        self._layout = proxy(layout)  # these live as long as the layout does, and would keep it alive
        self._num_pieces = [num_pieces(tile, most=LONGEST_PIECE) for tile in layout.tiles]  # asks the device
        self._pieces, self._columns = in_memory(by_span), in_columns(by_span)
        self._order = BlockOrder(self._columns.blocks_P, layout.num_blocks)
        self._addresses: dict[tuple[int, ...], Tensor] = {}

    def dots(self, spans: Sequence[Tensor], rows_KN: Rows) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64.
        """
        addresses, sums_PJ = self._where(spans), self._sums(rows_KN.shape[0])
        for part in self._parts(rows_KN):
            self._add_up(addresses, spans[0].dtype, self._pieces, part, sums_PJ, first_element=0)
        return self._order.sums_of_blocks(sums_PJ)

    def gram(self, rows_KN: Rows) -> Tensor:
        """R·Rᵀ of each block: fp64 [B, K, K], this rank's share. The same bits on both sides of the diagonal."""
        gram_BKK = self._products(((part, part) for part in self._parts(rows_KN)), rows_KN, rows_KN).tril()
        return gram_BKK + gram_BKK.tril(-1).mT

    def products(self, rows_KN: Rows, others_JN: Rows) -> Tensor:
        """R·Oᵀ of each block: fp64 [B, K, J], this rank's share. O is read once for each row of R.

        Of R and O either both lie on the device or both come tile by tile.
        """
        parts = zip(self._parts(rows_KN), self._parts(others_JN), strict=True)
        return self._products(parts, rows_KN, others_JN)

    def subtract(self, spans: Sequence[Tensor], rows_KN: Rows, coefficients_BK: Tensor) -> None:
        """g ← g − Σ_k r_bk·q_k, b being the block of each element; sums in fp32, rounded to the gradient's dtype."""
        coefficients_BK = coefficients_BK.float().contiguous()
        addresses, pieces = self._where(spans), self._pieces
        for part in self._parts(rows_KN):
            _subtract[(part.num_pieces,)](
                addresses,
                pieces.spans_P,
                part.rows_KT,
                part.rows_KT.stride(0),
                part.first_piece,
                part.first_column,
                pieces.starts_P,
                pieces.stops_P,
                pieces.columns_P,
                pieces.blocks_P,
                coefficients_BK,
                vector_type=VECTOR_TYPES[spans[0].dtype],
                num_rows=len(part.rows_KT),
                block=_BLOCK,
                enable_fp_fusion=False,
            )

    def combine(self, rows_KN: Rows, weights_BKJ: Tensor, out_JN: Tensor) -> None:
        """out = Wᵀ·R, block by block, in fp64; R may be ``out``, or come tile by tile from where ``out`` lies."""
        weights_BKJ = weights_BKJ.contiguous()
        for part in self._parts(rows_KN):
            if out_JN.device == part.rows_KT.device:
                self._combine(part, weights_BKJ, out_JN, first_out=0)
                continue
            columns = slice(part.first_column, part.first_column + part.rows_KT.shape[1])
            near_JT = torch.empty(len(out_JN), part.rows_KT.shape[1], dtype=out_JN.dtype, device=part.rows_KT.device)
            self._combine(part, weights_BKJ, near_JT, first_out=part.first_column)
            for out_N, near_T in zip(out_JN, near_JT, strict=True):
                out_N[columns] = near_T

    def _combine(self, part: _Part, weights_BKJ: Tensor, out_JN: Tensor, *, first_out: int) -> None:
        padded = triton.next_power_of_2(len(out_JN))
        _combine[(part.num_pieces,)](
            part.rows_KT,
            part.rows_KT.stride(0),
            out_JN,
            out_JN.stride(0),
            part.first_piece,
            part.first_column,
            first_out,
            self._columns.starts_P,
            self._columns.stops_P,
            self._columns.blocks_P,
            weights_BKJ,
            num_rows=len(part.rows_KT),
            num_out=len(out_JN),
            padded_out=padded,
            block=max(_PRODUCTS // padded, 64),
            enable_fp_fusion=False,
        )

    def _products(self, parts: Iterable[tuple[_Part, _Part]], rows_KN: Rows, others_JN: Rows) -> Tensor:
        sums = [self._sums(others_JN.shape[0]) for _ in range(rows_KN.shape[0])]
        for part, other in parts:
            rows = part.rows_KT.unbind()
            addresses = self._where(rows)
            for index, (row, sums_PJ) in enumerate(zip(rows, sums, strict=True)):
                first = part.first_column
                self._add_up(addresses[index:], row.dtype, self._columns, other, sums_PJ, first_element=first)
        tables = [self._order.sums_of_blocks(sums_PJ) for sums_PJ in sums]
        return torch.stack(tables, dim=1)[..., :-1]

    def _sums(self, num_rows: int) -> Tensor:
        """Room for the sums of each piece: fp64 [P, K+1]."""
        return torch.empty(len(self._columns), num_rows + 1, dtype=torch.float64, device=self._layout.device)

    @staticmethod
    def _add_up(
        addresses: Tensor, dtype: torch.dtype, pieces: Pieces, part: _Part, sums_PJ: Tensor, *, first_element: int
    ) -> None:
        """R·v and ‖v‖² of the part's pieces of v, which begins at ``first_element`` of its span."""
        num_rows = len(part.rows_KT)
        padded = triton.next_power_of_2(max(num_rows, 1))
        _dots[(part.num_pieces,)](
            addresses,
            pieces.spans_P,
            first_element,
            part.rows_KT,
            part.rows_KT.stride(0),
            part.first_piece,
            part.first_column,
            pieces.starts_P,
            pieces.stops_P,
            pieces.columns_P,
            pieces.weights_P,
            sums_PJ,
            vector_type=VECTOR_TYPES[dtype],
            num_rows=num_rows,
            padded_rows=padded,
            block=max(_PRODUCTS // padded, 64),
        )

    def _parts(self, rows_KN: Rows) -> Iterator[_Part]:
        """The rows as they lie, or tile by tile, each with its pieces; none without pieces."""
        if isinstance(rows_KN, Tensor):
            if len(self._columns):
                yield _Part(rows_KN, 0, 0, len(self._columns))
            return
        first = 0
        for (tile, rows_KT), number in zip(tiles_of(self._layout, rows_KN), self._num_pieces, strict=True):
            yield _Part(rows_KT, tile.column, first, number)
            first += number

    def _where(self, vectors: Sequence[Tensor]) -> Tensor:
        """Where each of ``vectors`` begins in memory, as a table on the device."""
        found = tuple(vector.data_ptr() for vector in vectors)
        if found not in self._addresses:
            if len(self._addresses) == _MOST_TABLES:
                self._addresses.clear()
            self._addresses[found] = torch.tensor(found, dtype=torch.int64).to(self._layout.device)
        return self._addresses[found]
