"""The Triton kernels that :mod:`megatron_ogpsa.projection.gpu_kernels` launches.

Each program takes one piece of up to 2¹⁵ elements and keeps its sums in registers, in fp64; sums of pieces are added in one
order, without atomics. Profilers show the kernels by their names, ``ogpsa_…``.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard, T = of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads the annotations of a kernel's arguments. Those of strides are there because it takes an integer for one of 32
# bits where it fits, and k·N does not need to. It joins loads of neighbours into one only where it knows that their address
# is a multiple and that no mask cuts them apart, which is why ``unit`` is told, and why edges are apart from whole blocks.


@triton.jit
def _loaded(pointers: tl.tensor, inside: tl.tensor | None) -> tl.tensor:
    """What lies there; zero outside."""
    if inside is None:
        found = tl.load(pointers)
    else:
        found = tl.load(pointers, mask=inside, other=0.0)
    return found


@triton.jit
def _whole_blocks(
    start: tl.tensor, stop: tl.tensor, line: tl.constexpr, block: tl.constexpr, unit: tl.constexpr
) -> tl.tuple:
    """Where the first whole block of a piece begins, and how many there are."""
    first = tl.minimum((start + line - 1) // line * line, stop)
    return tl.multiple_of(first, unit), (stop - first) // block


@triton.jit
def _edge(
    begin: tl.tensor, start: tl.tensor, stop: tl.tensor, first: tl.tensor, rest: tl.tensor, block: tl.constexpr
) -> tl.tuple:
    """Up to a block of the elements before ``first`` and from ``rest`` on, and which of them there are.

    Args:
        begin: of the block, counted over both.
    """
    number = begin + tl.arange(0, block)
    before = first - start
    return number + tl.where(number < before, start, rest - before), number < before + stop - rest


@triton.jit
def _with_products(
    sums: tl.tuple,
    vector: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    offsets: tl.tensor,
    inside: tl.tensor | None,
    num_rows: tl.constexpr,
) -> tl.tuple:
    """Sums with g·q_k and, last, g² of some elements, in fp64."""
    value = _loaded(vector + offsets, inside).to(tl.float64)
    added = tl.tuple([])
    for k in tl.static_range(num_rows):
        row = _loaded(rows + k * row_stride + offsets, inside).to(tl.float64)
        added += (sums[k] + row * value,)
    added += (sums[num_rows] + value * value,)
    return added


@triton.jit(do_not_specialize=["first_element", "first_piece", "first_column"])
def ogpsa_dots(
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
    block: tl.constexpr,
    line: tl.constexpr,
    unit: tl.constexpr,
    vector_bytes: tl.constexpr,
) -> None:
    """sums[p, k] = weight_p·Σ g·q_k over the piece p; sums[p, K] = weight_p·Σ g²."""
    piece = first_piece + tl.program_id(0)
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    vector = tl.load(addresses + tl.load(spans + piece)).to(tl.pointer_type(vector_type)) - first_element
    rows += tl.multiple_of(tl.load(columns + piece) - first_column - start, unit)
    row_stride = row_stride // unit * unit  # what is said of an argument itself goes unheard
    vector = tl.multiple_of(vector, vector_bytes)
    found = tl.tuple([])
    for _ in tl.static_range(num_rows + 1):
        found += (tl.zeros((block,), dtype=tl.float64),)
    first, number = _whole_blocks(start, stop, line, block, unit)
    for index in range(number):
        offsets = first + index * block + tl.arange(0, block)
        found = _with_products(found, vector, rows, row_stride, offsets, None, num_rows)
    rest = first + number * block
    for begin in range(0, first - start + stop - rest, block):
        offsets, inside = _edge(begin, start, stop, first, rest, block)
        found = _with_products(found, vector, rows, row_stride, offsets, inside, num_rows)
    weight = tl.load(weights + piece)
    for k in tl.static_range(num_rows + 1):
        tl.store(sums + piece * (num_rows + 1) + k, weight * tl.sum(found[k], axis=0))


@triton.jit
def ogpsa_add_pieces(
    sums: tl.tensor,
    order: tl.tensor,
    firsts: tl.tensor,
    out: tl.tensor,
    num_sums: tl.constexpr,
    padded_sums: tl.constexpr,
    together: tl.constexpr,
) -> None:
    """out[b] = Σ sums[p] over the pieces of the block b, which are order[firsts[b] : firsts[b + 1]]; fp64."""
    block = tl.program_id(0)
    stop = tl.load(firsts + block + 1)
    column = tl.arange(0, padded_sums)
    is_sum = column < num_sums
    total = tl.zeros((together, padded_sums), dtype=tl.float64)
    for begin in range(tl.load(firsts + block), stop, together):
        place = begin + tl.arange(0, together)
        piece = tl.load(order + place, mask=place < stop, other=0)
        held = (place < stop)[:, None] & is_sum[None, :]
        total += tl.load(sums + piece[:, None] * num_sums + column[None, :], mask=held, other=0.0)
    tl.store(out + block * num_sums + column, tl.sum(total, axis=0), mask=is_sum)


@triton.jit
def _subtract_some(
    vector: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    coefficients: tl.tensor,
    offsets: tl.tensor,
    inside: tl.tensor | None,
    vector_type: tl.constexpr,
    num_rows: tl.constexpr,
) -> None:
    """g ← g − Σ_k r_k·q_k for some elements of one block."""
    value = _loaded(vector + offsets, inside).to(tl.float32)
    total = tl.zeros_like(value)
    for k in tl.static_range(num_rows):
        total += tl.load(coefficients + k) * _loaded(rows + k * row_stride + offsets, inside).to(tl.float32)
    tl.store(vector + offsets, (value - total).to(vector_type), mask=inside)


@triton.jit(do_not_specialize=["first_piece", "first_column"])
def ogpsa_subtract(
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
    line: tl.constexpr,
    unit: tl.constexpr,
    vector_bytes: tl.constexpr,
) -> None:
    """g ← g − Σ_k r_bk·q_k over a piece, in the order of k for every element, wherever it lies."""
    piece = first_piece + tl.program_id(0)
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    vector = tl.load(addresses + tl.load(spans + piece)).to(tl.pointer_type(vector_type))
    rows += tl.multiple_of(tl.load(columns + piece) - first_column - start, unit)
    row_stride = row_stride // unit * unit  # what is said of an argument itself goes unheard
    vector = tl.multiple_of(vector, vector_bytes)
    own = coefficients + tl.load(blocks + piece) * num_rows
    first, number = _whole_blocks(start, stop, line, block, unit)
    for index in range(number):
        offsets = first + index * block + tl.arange(0, block)
        _subtract_some(vector, rows, row_stride, own, offsets, None, vector_type, num_rows)
    rest = first + number * block
    for begin in range(0, first - start + stop - rest, block):
        offsets, inside = _edge(begin, start, stop, first, rest, block)
        _subtract_some(vector, rows, row_stride, own, offsets, inside, vector_type, num_rows)


@triton.jit(do_not_specialize=["first_piece", "first_column", "first_out"])
def ogpsa_combine(
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
