"""The two passes of a step on CPU, compiled with Numba: each reads the gradient and the basis from memory once.

PyTorch has no operation that multiplies fp32 vectors and adds the products in fp64, and copies of the operands in fp64
take four times as long as reading them (:mod:`megatron_ogpsa.benchmarks.projection` measures both). Loops go over chunks
that stay in the first-level cache, and over four rows at a time, because more than a few streams at once outrun a
processor's prefetching.

Machine code is kept beside this file, where that can be written; otherwise each process compiles for a second or two.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from megatron_ogpsa.projection.pieces import BlockOrder, Pieces, pieces_by_span
from megatron_ogpsa.projection.segments import SegmentLayout

LONGEST_PIECE = 2**15
_CHUNK = 1024
"""Elements of a chunk: four rows of it in fp32 are half of a first-level cache."""

_JIT: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "cache": os.access(os.path.dirname(__file__), os.W_OK),
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


class CpuKernels:
    """The two passes over the spans of one layout.

    Args:
        layout: on CPU; its spans are fp32.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        self._spans = pieces_by_span(layout, most=LONGEST_PIECE)
        self._blocks_P = torch.cat([pieces.blocks_P for pieces in self._spans])
        self._order = BlockOrder(self._blocks_P, layout.num_blocks)

    def dots(self, spans: Sequence[Tensor], rows_KN: Tensor) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64. The result does not depend on the number of threads.
        """
        sums_PJ = torch.zeros(len(self._blocks_P), rows_KN.shape[0] + 1, dtype=torch.float64)
        self._run(_dots, spans, rows_KN, lambda pieces: pieces.weights_P, sums_PJ)
        return self._order.sums_of_blocks(sums_PJ)

    def subtract(self, spans: Sequence[Tensor], rows_KN: Tensor, coefficients_BK: Tensor) -> None:
        """g ← g − Σ_k r_bk·q_k, b being the block of each element; bitwise as :func:`subtract_combination` has it."""
        weights_PK = coefficients_BK.float()[self._blocks_P]
        self._run(_subtract_all, spans, rows_KN, None, weights_PK)

    def _run(
        self,
        kernel: Callable[..., None],
        spans: Sequence[Tensor],
        rows_KN: Tensor,
        column: Callable[[Pieces], Tensor] | None,
        table_P: Tensor,
    ) -> None:
        """Run ``kernel`` on all pieces, on as many threads as torch would use. ``table_P`` has a row for each piece."""
        rows = (rows_KN.view(torch.uint16) if rows_KN.dtype == torch.bfloat16 else rows_KN).numpy()
        table = table_P.numpy()
        work: list[tuple[Any, ...]] = []
        first = 0
        for pieces, span in zip(self._spans, spans, strict=True):
            columns = [pieces.starts_P, pieces.stops_P, pieces.columns_P, *([column(pieces)] if column else [])]
            arrays = [*(tensor.numpy() for tensor in columns), table[first : first + len(pieces)]]
            for part in _parts(len(pieces), torch.get_num_threads()):
                work.append((span.detach().numpy(), rows, *(array[part] for array in arrays)))
            first += len(pieces)
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
