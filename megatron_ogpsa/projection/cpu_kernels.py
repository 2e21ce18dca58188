"""The passes over gradient, references and basis on CPU, compiled with Numba: each reads what it needs from memory once.

PyTorch has no operation that multiplies fp32 vectors and adds the products in fp64, and copies of the operands in fp64
take four times as long as reading them (:mod:`megatron_ogpsa.benchmarks.projection` measures both). Loops go over chunks
that stay in the first-level cache, and over four rows at a time, because more than a few streams at once outrun a
processor's prefetching.

Machine code is kept beside this file, where that can be written; otherwise each process compiles for a second or two.
Processes compile one after the other: Numba writes its index of machine code without a lock, and two that add to it at once,
for other dtypes or processors, may leave one's code under the name of the other's.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from filelock import FileLock
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from megatron_ogpsa.projection.pieces import BlockOrder, in_columns, pieces_by_span
from megatron_ogpsa.projection.segments import SegmentLayout

LONGEST_PIECE = 2**15
_CHUNK = 1024
"""Elements of a chunk: four rows of it in fp32 are half of a first-level cache."""

_KEEPS_CODE = os.access(os.path.dirname(__file__), os.W_OK)
LOCK_SECONDS = 60.0
"""That a process waits for others to compile; it takes them two."""

_LOCK = Path(__file__).parent / "__pycache__" / "cpu_kernels.lock"
_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": _KEEPS_CODE}
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
def _dot_3(x: Any, a: Any, b: Any, c: Any) -> tuple[float, float, float]:
    with_a = with_b = with_c = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        with_a += value * np.float64(_fp32(a[i]))
        with_b += value * np.float64(_fp32(b[i]))
        with_c += value * np.float64(_fp32(c[i]))
    return with_a, with_b, with_c


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _dot_2(x: Any, a: Any, b: Any) -> tuple[float, float]:
    with_a = with_b = 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        with_a += value * np.float64(_fp32(a[i]))
        with_b += value * np.float64(_fp32(b[i]))
    return with_a, with_b


@numba.njit(fastmath=_REASSOCIATED, **_JIT)
def _dot_1(x: Any, a: Any) -> float:
    with_a = 0.0
    for i in range(x.size):
        with_a += np.float64(x[i]) * np.float64(_fp32(a[i]))
    return with_a


@numba.njit(**_JIT)
def _add_dots(x: Any, rows: Any, start: int, stop: int, sums: Any) -> None:
    """Add ⟨x, rows[k, start:stop]⟩ to sums[k], and ⟨x, x⟩ to the last of them."""
    num_rows = rows.shape[0]
    k = 0
    while k + 4 <= num_rows:
        a, b, c, d = _dot_4(
            x, rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop], rows[k + 3, start:stop]
        )
        sums[k] += a
        sums[k + 1] += b
        sums[k + 2] += c
        sums[k + 3] += d
        k += 4
    if num_rows - k == 3:
        a, b, c, d = _dot_4(x, rows[k, start:stop], rows[k + 1, start:stop], rows[k + 2, start:stop], x)
        sums[k] += a
        sums[k + 1] += b
        sums[k + 2] += c
        sums[num_rows] += d
    elif num_rows - k == 2:
        a, b, c = _dot_3(x, rows[k, start:stop], rows[k + 1, start:stop], x)
        sums[k] += a
        sums[k + 1] += b
        sums[num_rows] += c
    elif num_rows - k == 1:
        a, b = _dot_2(x, rows[k, start:stop], x)
        sums[k] += a
        sums[num_rows] += b
    else:
        sums[num_rows] += _dot_1(x, x)


@numba.njit(**_JIT)
def _subtract(x: Any, rows: Any, start: int, stop: int, weights: Any, total: Any) -> None:
    """x −= Σ_k w_k·rows[k, start:stop], each product and each sum rounded on its own, in the order of k."""
    num_rows = rows.shape[0]
    total[:] = 0.0
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
def _dots(vector: Any, rows: Any, starts: Any, stops: Any, columns: Any, weights: Any, sums: Any) -> None:
    for p in range(starts.size):
        shift = columns[p] - starts[p]
        for start in range(starts[p], stops[p], _CHUNK):
            stop = min(start + _CHUNK, stops[p])
            _add_dots(vector[start:stop], rows, start + shift, stop + shift, sums[p])
        sums[p] *= weights[p]


@numba.njit(**_JIT)
def _subtract_all(vector: Any, rows: Any, starts: Any, stops: Any, columns: Any, weights: Any) -> None:
    total = np.empty(_CHUNK, np.float32)
    for p in range(starts.size):
        shift = columns[p] - starts[p]
        for start in range(starts[p], stops[p], _CHUNK):
            stop = min(start + _CHUNK, stops[p])
            part = total[: stop - start]
            _subtract(vector[start:stop], rows, start + shift, stop + shift, weights[p], part)


@numba.njit(**_JIT)
def _gram(rows: Any, starts: Any, stops: Any, weights: Any, sums: Any) -> None:
    """The lower triangle of R·Rᵀ, row by row, of each piece."""
    for p in range(starts.size):
        for start in range(starts[p], stops[p], _CHUNK):
            stop = min(start + _CHUNK, stops[p])
            first = 0
            for k in range(rows.shape[0]):
                _add_dots(rows[k, start:stop], rows[:k], start, stop, sums[p, first : first + k + 1])
                first += k + 1
        sums[p] *= weights[p]


@numba.njit(**_JIT)
def _products(rows: Any, others: Any, starts: Any, stops: Any, weights: Any, sums: Any) -> None:
    """R·Oᵀ, and in the last column the squared norms of R, of each piece."""
    for p in range(starts.size):
        for start in range(starts[p], stops[p], _CHUNK):
            stop = min(start + _CHUNK, stops[p])
            for k in range(rows.shape[0]):
                _add_dots(rows[k, start:stop], others, start, stop, sums[p, k])
        sums[p] *= weights[p]


@numba.njit(**_JIT)
def _combine(rows: Any, out: Any, starts: Any, stops: Any, weights: Any) -> None:
    """out[r] = Σ_k w_kr·rows[k], in fp64, each product and each sum rounded on its own, in the order of k."""
    num_rows, num_out = rows.shape[0], out.shape[0]
    totals = np.empty((num_out, _CHUNK), np.float64)
    for p in range(starts.size):
        for start in range(starts[p], stops[p], _CHUNK):
            length = min(start + _CHUNK, stops[p]) - start
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


class CpuKernels:
    """The passes over the spans of one layout, and over the columns of its basis.

    Args:
        layout: on CPU; its spans are fp32.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        self._spans = pieces_by_span(layout, most=LONGEST_PIECE)
        self._columns = in_columns(self._spans)
        self._order = BlockOrder(self._columns.blocks_P, layout.num_blocks)

    def dots(self, spans: Sequence[Tensor], rows_KN: Tensor) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64. The result does not depend on the number of threads.
        """
        sums_PJ = torch.zeros(len(self._columns), rows_KN.shape[0] + 1, dtype=torch.float64)
        work: list[tuple[Any, ...]] = []
        for pieces, span, own_PJ in zip(self._spans, spans, self._by_span(sums_PJ), strict=True):
            per_piece = (pieces.starts_P, pieces.stops_P, pieces.columns_P, pieces.weights_P, own_PJ)
            work += _calls((span.detach(), rows_KN), per_piece)
        _run(_dots, work)
        return self._order.sums_of_blocks(sums_PJ)

    def subtract(self, spans: Sequence[Tensor], rows_KN: Tensor, coefficients_BK: Tensor) -> None:
        """g ← g − Σ_k r_bk·q_k, b being the block of each element; bitwise as :func:`subtract_combination` has it."""
        weights_PK = coefficients_BK.float()[self._columns.blocks_P]
        work: list[tuple[Any, ...]] = []
        for pieces, span, own_PK in zip(self._spans, spans, self._by_span(weights_PK), strict=True):
            per_piece = (pieces.starts_P, pieces.stops_P, pieces.columns_P, own_PK)
            work += _calls((span.detach(), rows_KN), per_piece)
        _run(_subtract_all, work)

    def gram(self, rows_KN: Tensor) -> Tensor:
        """R·Rᵀ of each block: fp64 [B, K, K], this rank's share. R is fp32; as :meth:`dots` otherwise."""
        num_rows = rows_KN.shape[0]
        below, left = torch.tril_indices(num_rows, num_rows)
        sums_PT = torch.zeros(len(self._columns), len(below), dtype=torch.float64)
        columns = self._columns
        _run(_gram, _calls((rows_KN,), (columns.starts_P, columns.stops_P, columns.weights_P, sums_PT)))
        sums_BT = self._order.sums_of_blocks(sums_PT)
        gram_BKK = sums_BT.new_empty(len(sums_BT), num_rows, num_rows)
        gram_BKK[:, below, left] = gram_BKK[:, left, below] = sums_BT
        return gram_BKK

    def products(self, rows_KN: Tensor, others_JN: Tensor) -> Tensor:
        """R·Oᵀ of each block: fp64 [B, K, J], this rank's share. R is fp32; as :meth:`dots` otherwise."""
        sums_PKJ = torch.zeros(len(self._columns), len(rows_KN), len(others_JN) + 1, dtype=torch.float64)
        columns = self._columns
        per_piece = (columns.starts_P, columns.stops_P, columns.weights_P, sums_PKJ)
        _run(_products, _calls((rows_KN, others_JN), per_piece))
        return self._order.sums_of_blocks(sums_PKJ.flatten(1)).unflatten(1, sums_PKJ.shape[1:])[..., :-1]

    def combine(self, rows_KN: Tensor, weights_BKJ: Tensor, out_JN: Tensor) -> None:
        """out = Wᵀ·R, block by block; R is fp32, and may be ``out``. Bitwise as :func:`combine_rows` has it."""
        columns = self._columns
        weights_PKJ = weights_BKJ[columns.blocks_P]
        _run(_combine, _calls((rows_KN, out_JN), (columns.starts_P, columns.stops_P, weights_PKJ)))

    def _by_span(self, table_P: Tensor) -> Sequence[Tensor]:
        """The rows of each span's pieces."""
        return table_P.split([len(pieces) for pieces in self._spans])


def _calls(whole: Sequence[Tensor], per_piece: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Arguments of a kernel for each thread: ``whole`` as it is, and its run of pieces."""
    arrays, tables = [_array(tensor) for tensor in whole], [_array(tensor) for tensor in per_piece]
    return [
        (*arrays, *(table[part] for table in tables)) for part in _parts(len(per_piece[0]), torch.get_num_threads())
    ]


def _array(tensor: Tensor) -> Any:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


_ready: set[tuple[Any, ...]] = set()


def _make_ready(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Load or compile ``kernel`` for arguments of these types."""
    signature = tuple(map(numba.typeof, arguments))
    if (kernel, signature) in _ready:
        return
    with _one_process_at_a_time() if _KEEPS_CODE else nullcontext():
        kernel.compile(signature)
    _ready.add((kernel, signature))


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """If it can be had: file systems without locks, another account's lock and a process that is stopped with it in hand
    shall not keep a run from compiling."""
    lock = FileLock(_LOCK, timeout=LOCK_SECONDS)
    with suppress(OSError, NotImplementedError):
        _LOCK.parent.mkdir(exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run(kernel: Callable[..., None], work: Sequence[tuple[Any, ...]]) -> None:
    """Call ``kernel`` with each of ``work``, on as many threads as torch would use."""
    if work:
        _make_ready(kernel, work[0])
    if torch.get_num_threads() == 1:
        for arguments in work:
            kernel(*arguments)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in [pool.submit(kernel, *arguments) for arguments in work]:
            done.result()


def _parts(length: int, number: int) -> list[slice]:
    """``range(length)`` in up to ``number`` runs."""
    bounds = [length * part // number for part in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]
