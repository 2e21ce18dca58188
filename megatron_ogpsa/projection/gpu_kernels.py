"""The passes of a step on a GPU, as Triton kernels: each reads the gradient and the basis from memory once.

Each program takes one piece of up to 2¹⁵ elements, some hundred at a time, and keeps its sums in registers, in fp64. Eager
PyTorch writes fp64 copies of the operands to memory first. The sums of pieces are added in one order, without atomics, so
that a step is bitwise reproducible.

The width of a thread's loads, up to 16 bytes, is the common alignment of spans, columns and rows; loads of single elements
take up to three times as long. Shards of Megatron's distributed optimizer lie at multiples of eight elements
with up to 16 data-parallel ranks, of four with 32, of two with 64, and with any number of them under
``--ddp-pad-buckets-for-high-nccl-busbw`` (``bucket_end_divisor`` in megatron/core/optimizer/param_layout.py). The width
decides the order of a piece's sums, so it is chosen for a layout, not for the place where its basis lies.

Spans lie anywhere in memory, in an update as many as there are parameters: kernels find them in a table of addresses, so
that a pass is one launch. A basis in host memory comes tile by tile, a launch for each, and the sums are those of a basis
beside the gradient, because the pieces are the same. A refresh multiplies references with each other and with the basis by
the same kernel, one reference at a time.

What is written is rounded after each product and each sum, never fused, so that it is the same to the bit as PyTorch's.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard, T = of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import proxy

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ogpsa.projection import triton_kernels
from megatron_ogpsa.projection.pieces import Pieces, in_columns, in_memory, num_pieces, pieces_by_span
from megatron_ogpsa.projection.segments import Rows, SegmentLayout, tiles_of

LONGEST_PIECE = 2**15
_BYTES = 16
"""Of one load, where alignment allows it."""
_UNIT = 8
"""Elements that a thread reads at once: of 16 bits in one load, of 32 bits in two."""
_LINE = 64
"""Elements of fp32 in two lines of the cache, of 16 bits in one: where whole blocks begin."""
_BLOCK = 1024
"""Elements that a program of ``ogpsa_subtract`` takes at a time."""
_DOTS_BLOCK = 512
"""The same of ``ogpsa_dots``, with up to 15 rows."""
_SHORTEST_BLOCK = 128
_SUMS = 8192
"""Sums that a program of ``ogpsa_dots`` holds at most, in fp64: 64 for each of its 128 threads."""
_PRODUCTS = 2048
"""Numbers in fp64 that programs of the other kernels hold: 16 for each thread."""
_MOST_TABLES = 64
"""Of addresses that are kept: gradients, parameters, references and staging buffers stay where they are."""

VECTOR_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


@dataclass(frozen=True)
class _Vectors:
    """What the rows are multiplied with.

    Attributes:
        addresses: a table on the device, int64.
        unit: elements that can be read at once of each.
    """

    addresses: Tensor
    dtype: torch.dtype
    unit: int


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
        self._order_P = self._columns.blocks_P.argsort(stable=True)
        lengths_B = torch.bincount(self._columns.blocks_P, minlength=layout.num_blocks)
        self._firsts = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
        # Tiles count although a basis beside the gradient has none: its sums are to be those of one in host memory.
        self._unit = math.gcd(_UNIT, layout.multiple)
        self._addresses: dict[tuple[int, ...], Tensor] = {}

    def dots(self, spans: Sequence[Tensor], rows_KN: Rows) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64.
        """
        vectors, sums_PJ = self._where(spans), self._sums(rows_KN.shape[0])
        for part in self._parts(rows_KN):
            self._add_up(vectors, self._pieces, part, sums_PJ, first_element=0)
        return self._sums_of_blocks(sums_PJ)

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
        vectors, pieces = self._where(spans), self._pieces
        for part in self._parts(rows_KN):
            triton_kernels.ogpsa_subtract[(part.num_pieces,)](
                vectors.addresses,
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
                vector_type=VECTOR_TYPES[vectors.dtype],
                num_rows=len(part.rows_KT),
                block=_BLOCK,
                line=_LINE,
                **self._at_once(vectors, part),
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
        triton_kernels.ogpsa_combine[(part.num_pieces,)](
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
            rows = self._where(part.rows_KT.unbind())
            for index, sums_PJ in enumerate(sums):
                row = replace(rows, addresses=rows.addresses[index:])
                self._add_up(row, self._columns, other, sums_PJ, first_element=part.first_column)
        tables = [self._sums_of_blocks(sums_PJ) for sums_PJ in sums]
        return torch.stack(tables, dim=1)[..., :-1]

    def _sums(self, num_rows: int) -> Tensor:
        """Room for the sums of each piece: fp64 [P, K+1]."""
        return torch.empty(len(self._columns), num_rows + 1, dtype=torch.float64, device=self._layout.device)

    def _sums_of_blocks(self, sums_PJ: Tensor) -> Tensor:
        """fp64 [P, J] → [B, J]; zero for blocks without pieces."""
        num_blocks, num_sums = self._layout.num_blocks, sums_PJ.shape[1]
        sums_BJ = torch.empty(num_blocks, num_sums, dtype=torch.float64, device=sums_PJ.device)
        padded = triton.next_power_of_2(num_sums)
        triton_kernels.ogpsa_add_pieces[(num_blocks,)](
            sums_PJ,
            self._order_P,
            self._firsts,
            sums_BJ,
            num_sums=num_sums,
            padded_sums=padded,
            together=max(_PRODUCTS // padded, 1),
        )
        return sums_BJ

    def _add_up(self, vectors: _Vectors, pieces: Pieces, part: _Part, sums_PJ: Tensor, *, first_element: int) -> None:
        """R·v and ‖v‖² of the part's pieces of v, which begins at ``first_element`` of its span."""
        num_rows = len(part.rows_KT)
        triton_kernels.ogpsa_dots[(part.num_pieces,)](
            vectors.addresses,
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
            vector_type=VECTOR_TYPES[vectors.dtype],
            num_rows=num_rows,
            block=min(max(_SUMS // triton.next_power_of_2(num_rows + 1), _SHORTEST_BLOCK), _DOTS_BLOCK),
            line=_LINE,
            **self._at_once(vectors, part),
        )

    def _at_once(self, vectors: _Vectors, part: _Part) -> dict[str, int]:
        """``unit``: elements that may be read at once; ``vector_bytes``: what vectors' addresses are multiples of, then."""
        rows_KT = part.rows_KT
        size = rows_KT.element_size()
        of_rows = _elements_at_once(size, rows_KT.data_ptr(), rows_KT.stride(0) * size)
        unit = min(self._unit, vectors.unit, of_rows)
        return {"unit": unit, "vector_bytes": min(_BYTES, unit * vectors.dtype.itemsize)}

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

    def _where(self, vectors: Sequence[Tensor]) -> _Vectors:
        """Where each of ``vectors`` begins in memory."""
        found = tuple(vector.data_ptr() for vector in vectors)
        if found not in self._addresses:
            if len(self._addresses) == _MOST_TABLES:
                self._addresses.clear()
            self._addresses[found] = torch.tensor(found, dtype=torch.int64).to(self._layout.device)
        dtype = vectors[0].dtype
        return _Vectors(self._addresses[found], dtype, _elements_at_once(dtype.itemsize, *found))


def _elements_at_once(size: int, *places: int) -> int:
    """Up to :data:`_UNIT`, of ``size`` bytes each, that all ``places``, in bytes, are multiples of."""
    num_bytes = math.gcd(_BYTES, *places)
    return _UNIT if num_bytes == _BYTES else max(num_bytes // size, 1)
