"""The inner loops of the passes on CPU, compiled with Numba: each reads what it needs from memory once.

Loops go over chunks that stay in the first-level cache, and over four rows at a time, because more than a few streams at
once outrun a processor's prefetching. All functions are inlined into the one that is called, and none counts references:
of every slice of an array Numba would count them up and down, atomically, which for chunks as short as these takes up to a
quarter of the time. That is why nothing is allocated here; what is needed is handed in.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard.
"""

from __future__ import annotations

import os
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

CHUNK = 1024
"""Elements of a chunk: four rows of it in fp32 are half of a first-level cache."""

KEEPS_CODE = os.access(os.path.dirname(__file__), os.W_OK)
"""Whether machine code can be kept beside this file."""

_JIT: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "cache": KEEPS_CODE,
    "forceinline": True,
    "_nrt": False,  # no counting of references; what would allocate does not compile
}
_REASSOCIATED = {"reassoc", "contract", "nsz"}
"""Sums in fp64 may be taken in the order of vector lanes. NaN and infinity stay what they are."""


@intrinsic
def _fp32(context: Any, element: Any) -> Any:
    """An element of the basis: fp32 as it is, bf16, which NumPy has only as 16-bit integers, with zeros behind its bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if isinstance(element, types.Float):
            return arguments[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(element), generate


@intrinsic
def _as_element(context: Any, value: Any, like: Any) -> Any:
    """fp32 as an element such as ``like``: as it is, or rounded to the nearest bf16, to even in between; NaN stays NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if isinstance(like, types.Float):
            return number
        word = ir.IntType(32)
        bits = builder.bitcast(number, word)
        is_odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        nearest = builder.lshr(builder.add(bits, builder.add(is_odd, word(0x7FFF))), word(16))
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.select(is_nan, word(0x7FC0), nearest), ir.IntType(16))

    return like(types.float32, like), generate


@intrinsic
def _vector_at(context: Any, address: Any, length: Any) -> Any:
    """``length`` elements in fp32 from ``address`` on, which the caller keeps; :func:`numba.carray` takes no numbers."""
    vector = types.Array(types.float32, 1, "C")

    def generate(of: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        array = of.make_array(vector)(of, builder)
        size = of.get_constant(types.intp, 4)
        start = builder.inttoptr(arguments[0], array.data.type)
        populate_array(array, data=start, shape=[arguments[1]], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return vector(types.intp, types.intp), generate


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _dot_4(x: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[float, float, float, float]:
    with_a = with_b = with_c = with_d = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        with_a += value * np.float64(_fp32(a[i]))
        with_b += value * np.float64(_fp32(b[i]))
        with_c += value * np.float64(_fp32(c[i]))
        with_d += value * np.float64(_fp32(d[i]))
    return with_a, with_b, with_c, with_d


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _norm_and_dot_4(x: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[float, float, float, float, float]:
    norm = with_a = with_b = with_c = with_d = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        norm += value * value
        with_a += value * np.float64(_fp32(a[i]))
        with_b += value * np.float64(_fp32(b[i]))
        with_c += value * np.float64(_fp32(c[i]))
        with_d += value * np.float64(_fp32(d[i]))
    return norm, with_a, with_b, with_c, with_d


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _norm_and_dot_3(x: Any, a: Any, b: Any, c: Any) -> tuple[float, float, float, float]:
    norm = with_a = with_b = with_c = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        norm += value * value
        with_a += value * np.float64(_fp32(a[i]))
        with_b += value * np.float64(_fp32(b[i]))
        with_c += value * np.float64(_fp32(c[i]))
    return norm, with_a, with_b, with_c


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _norm_and_dot_2(x: Any, a: Any, b: Any) -> tuple[float, float, float]:
    norm = with_a = with_b = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        norm += value * value
        with_a += value * np.float64(_fp32(a[i]))
        with_b += value * np.float64(_fp32(b[i]))
    return norm, with_a, with_b


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _norm_and_dot_1(x: Any, a: Any) -> tuple[float, float]:
    norm = with_a = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        norm += value * value
        with_a += value * np.float64(_fp32(a[i]))
    return norm, with_a


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _norm(x: Any) -> float:
    norm = 0.0
    for i in range(x.size):
        norm += np.float64(x[i]) * np.float64(x[i])
    return norm


@numba.njit(**_JIT)
def _add_dots(x: Any, rows: Any, start: int, stop: int, sums: Any) -> None:
    """Add ⟨x, rows[k, start:stop]⟩ to sums[k], and ⟨x, x⟩ to the last of them.

    The norm comes with the last rows: as a row of its own x would be widened to fp64 twice, and widening takes about as long
    as reading a basis in bf16.
    """
    num_rows = rows.shape[0]
    k = 0
    while num_rows - k > 4:
        a, b, c, d = _dot_4(
            x, rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop], rows[k + 3, start:stop]
        )
        sums[k] += a
        sums[k + 1] += b
        sums[k + 2] += c
        sums[k + 3] += d
        k += 4
    if num_rows - k == 4:
        norm, a, b, c, d = _norm_and_dot_4(
            x, rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop], rows[k + 3, start:stop]
        )
        sums[k] += a
        sums[k + 1] += b
        sums[k + 2] += c
        sums[k + 3] += d
    elif num_rows - k == 3:
        norm, a, b, c = _norm_and_dot_3(x, rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop])
        sums[k] += a
        sums[k + 1] += b
        sums[k + 2] += c
    elif num_rows - k == 2:
        norm, a, b = _norm_and_dot_2(x, rows[k, start:stop], rows[k + 1, start:stop])
        sums[k] += a
        sums[k + 1] += b
    elif num_rows - k == 1:
        norm, a = _norm_and_dot_1(x, rows[k, start:stop])
        sums[k] += a
    else:
        norm = _norm(x)
    sums[num_rows] += norm


@numba.njit(**_JIT)
def _subtract(x: Any, rows: Any, start: int, stop: int, weights: Any, total: Any) -> None:
    """x −= Σ_k w_k·rows[k, start:stop], each product and each sum rounded on its own, in the order of k."""
    num_rows = rows.shape[0]
    for i in range(total.size):
        total[i] = 0.0
    k = 0
    while k + 4 < num_rows:
        a, b, c, d = rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop], rows[k + 3, start:stop]
        w_a, w_b, w_c, w_d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(x.size):
            total[i] = (((total[i] + w_a * _fp32(a[i])) + w_b * _fp32(b[i])) + w_c * _fp32(c[i])) + w_d * _fp32(d[i])
        k += 4
    if num_rows - k == 4:
        a, b, c, d = rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop], rows[k + 3, start:stop]
        w_a, w_b, w_c, w_d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(x.size):
            x[i] -= (((total[i] + w_a * _fp32(a[i])) + w_b * _fp32(b[i])) + w_c * _fp32(c[i])) + w_d * _fp32(d[i])
    elif num_rows - k == 3:
        a, b, c = rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop]
        w_a, w_b, w_c = weights[k], weights[k + 1], weights[k + 2]
        for i in range(x.size):
            x[i] -= ((total[i] + w_a * _fp32(a[i])) + w_b * _fp32(b[i])) + w_c * _fp32(c[i])
    elif num_rows - k == 2:
        a, b = rows[k, start:stop], rows[k + 1, start:stop]
        w_a, w_b = weights[k], weights[k + 1]
        for i in range(x.size):
            x[i] -= (total[i] + w_a * _fp32(a[i])) + w_b * _fp32(b[i])
    elif num_rows - k == 1:
        a, w_a = rows[k, start:stop], weights[k]
        for i in range(x.size):
            x[i] -= total[i] + w_a * _fp32(a[i])


@numba.njit(**_JIT)
def _scale(sums: Any, weight: float) -> None:
    for j in range(sums.size):
        sums[j] *= weight


@numba.njit(**_JIT)
def dots(rows: Any, addresses: Any, lengths: Any, columns: Any, weights: Any, sums: Any) -> None:
    """⟨x, rows⟩ and ⟨x, x⟩ of the piece x at each address: sums fp64 [P, K+1], zero before."""
    for p in range(addresses.size):
        vector = _vector_at(addresses[p], lengths[p])
        for start in range(0, lengths[p], CHUNK):
            stop = min(start + CHUNK, lengths[p])
            _add_dots(vector[start:stop], rows, columns[p] + start, columns[p] + stop, sums[p])
        _scale(sums[p], weights[p])


@numba.njit(**_JIT)
def subtract(rows: Any, addresses: Any, lengths: Any, columns: Any, weights: Any, total: Any) -> None:
    """x −= Σ_k w_pk·rows[k] of the piece x at each address; ``total``: fp32, a chunk to work in."""
    for p in range(addresses.size):
        vector = _vector_at(addresses[p], lengths[p])
        for start in range(0, lengths[p], CHUNK):
            stop = min(start + CHUNK, lengths[p])
            part = total[: stop - start]
            _subtract(vector[start:stop], rows, columns[p] + start, columns[p] + stop, weights[p], part)


@numba.njit(**_JIT)
def gram(rows: Any, starts: Any, stops: Any, weights: Any, sums: Any) -> None:
    """The lower triangle of R·Rᵀ, row by row, of each piece: fp64 [P, K·(K+1)/2], zero before."""
    for p in range(starts.size):
        for start in range(starts[p], stops[p], CHUNK):
            stop = min(start + CHUNK, stops[p])
            first = 0
            for k in range(rows.shape[0]):
                _add_dots(rows[k, start:stop], rows[:k], start, stop, sums[p, first : first + k + 1])
                first += k + 1
        _scale(sums[p], weights[p])


@numba.njit(**_JIT)
def products(rows: Any, others: Any, starts: Any, stops: Any, weights: Any, sums: Any) -> None:
    """R·Oᵀ, and in the last column the squared norms of R, of each piece: fp64 [P, K, J+1], zero before."""
    for p in range(starts.size):
        for start in range(starts[p], stops[p], CHUNK):
            stop = min(start + CHUNK, stops[p])
            for k in range(rows.shape[0]):
                _add_dots(rows[k, start:stop], others, start, stop, sums[p, k])
        for k in range(rows.shape[0]):
            _scale(sums[p, k], weights[p])


@numba.njit(**_JIT)
def combine(rows: Any, out: Any, starts: Any, stops: Any, weights: Any, totals: Any) -> None:
    """out[r] = Σ_k w_pkr·rows[k], in fp64, each product and each sum rounded on its own, in the order of k.

    ``totals``: fp64, a chunk for each row of ``out`` to work in.
    """
    num_rows, num_out = rows.shape[0], out.shape[0]
    for p in range(starts.size):
        for start in range(starts[p], stops[p], CHUNK):
            length = min(start + CHUNK, stops[p]) - start
            for r in range(num_out):
                total, row, weight = totals[r], rows[0, start : start + length], weights[p, 0, r]
                for i in range(length):
                    total[i] = np.float64(row[i]) * weight
                for k in range(1, num_rows):
                    row, weight = rows[k, start : start + length], weights[p, k, r]
                    for i in range(length):
                        total[i] += np.float64(row[i]) * weight
            for r in range(num_out):  # all are read by now: ``out`` may be ``rows``
                total, target = totals[r], out[r, start : start + length]
                for i in range(length):
                    target[i] = _as_element(np.float32(total[i]), target[i])


@numba.njit(**_JIT)
def add_pieces(blocks: Any, sums: Any, out: Any) -> None:
    """out[b] = Σ_p sums[p] over the pieces p of block b, in their order: fp64 [B, J], zero before."""
    for p in range(blocks.size):
        row, own = out[blocks[p]], sums[p]
        for j in range(own.size):
            row[j] += own[j]
