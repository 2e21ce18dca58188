"""The passes over gradient, references and basis on CPU, by the compiled loops of :mod:`.numba_kernels`.

PyTorch has no operation that multiplies fp32 vectors and adds the products in fp64, and copies of the operands in fp64
take four times as long as reading them (:mod:`megatron_ogpsa.benchmarks.projection` measures both). A pass is one call for
each thread, whatever the number of spans: with the weights' changes projected, each weight is a span.

Machine code is kept beside those loops, where that can be written; otherwise each process compiles for a second or two.
Processes compile one after the other: Numba writes its index of machine code without a lock, and two that add to it at once,
for other dtypes or processors, may leave one's code under the name of the other's.

Shape legend as in :mod:`megatron_ogpsa.projection.pieces`; K = basis vectors, N = elements of the shard.
"""

from __future__ import annotations

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
from torch import Tensor

from megatron_ogpsa.projection import numba_kernels
from megatron_ogpsa.projection.numba_kernels import CHUNK, KEEPS_CODE
from megatron_ogpsa.projection.pieces import BlockOrder, in_columns, in_memory, pieces_by_span
from megatron_ogpsa.projection.segments import SegmentLayout

LONGEST_PIECE = 2**15

LOCK_SECONDS = 60.0
"""That a process waits for others to compile; it takes them two."""

_LOCK = Path(__file__).parent / "__pycache__" / "cpu_kernels.lock"


class CpuKernels:
    """The passes over the spans of one layout, and over the columns of its basis.

    Args:
        layout: on CPU; its spans are fp32.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        by_span = pieces_by_span(layout, most=LONGEST_PIECE)
        self._pieces, self._columns = in_memory(by_span), in_columns(by_span)
        self._lengths_P = self._pieces.stops_P - self._pieces.starts_P
        self._order = BlockOrder(self._columns.blocks_P, layout.num_blocks)
        self._span_lengths = layout.span_lengths

    def dots(self, spans: Sequence[Tensor], rows_KN: Tensor) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64. The result does not depend on the number of threads.
        """
        pieces, sums_PJ = self._pieces, torch.zeros(len(self._pieces), len(rows_KN) + 1, dtype=torch.float64)
        per_piece = (self._addresses(spans), self._lengths_P, pieces.columns_P, pieces.weights_P, sums_PJ)
        _run(numba_kernels.dots, _calls((rows_KN,), per_piece))
        return self._order.sums_of_blocks(sums_PJ)

    def subtract(self, spans: Sequence[Tensor], rows_KN: Tensor, coefficients_BK: Tensor) -> None:
        """g ← g − Σ_k r_bk·q_k, b being the block of each element; bitwise as :func:`subtract_combination` has it."""
        weights_PK = coefficients_BK.float()[self._pieces.blocks_P]
        per_piece = (self._addresses(spans), self._lengths_P, self._pieces.columns_P, weights_PK)
        _run(numba_kernels.subtract, _calls((rows_KN,), per_piece, lambda: np.empty(CHUNK, np.float32)))

    def gram(self, rows_KN: Tensor) -> Tensor:
        """R·Rᵀ of each block: fp64 [B, K, K], this rank's share. R is fp32; as :meth:`dots` otherwise."""
        num_rows = rows_KN.shape[0]
        below, left = torch.tril_indices(num_rows, num_rows)
        sums_PT = torch.zeros(len(self._columns), len(below), dtype=torch.float64)
        columns = self._columns
        _run(numba_kernels.gram, _calls((rows_KN,), (columns.starts_P, columns.stops_P, columns.weights_P, sums_PT)))
        sums_BT = self._order.sums_of_blocks(sums_PT)
        gram_BKK = sums_BT.new_empty(len(sums_BT), num_rows, num_rows)
        gram_BKK[:, below, left] = gram_BKK[:, left, below] = sums_BT
        return gram_BKK

    def products(self, rows_KN: Tensor, others_JN: Tensor) -> Tensor:
        """R·Oᵀ of each block: fp64 [B, K, J], this rank's share. R is fp32; as :meth:`dots` otherwise."""
        sums_PKJ = torch.zeros(len(self._columns), len(rows_KN), len(others_JN) + 1, dtype=torch.float64)
        columns = self._columns
        per_piece = (columns.starts_P, columns.stops_P, columns.weights_P, sums_PKJ)
        _run(numba_kernels.products, _calls((rows_KN, others_JN), per_piece))
        return self._order.sums_of_blocks(sums_PKJ.flatten(1)).unflatten(1, sums_PKJ.shape[1:])[..., :-1]

    def combine(self, rows_KN: Tensor, weights_BKJ: Tensor, out_JN: Tensor) -> None:
        """out = Wᵀ·R, block by block; R is fp32, and may be ``out``. Bitwise as :func:`combine_rows` has it."""
        columns = self._columns
        per_piece = (columns.starts_P, columns.stops_P, weights_BKJ[columns.blocks_P])
        calls = _calls((rows_KN, out_JN), per_piece, lambda: np.empty((len(out_JN), CHUNK)))
        _run(numba_kernels.combine, calls)

    def _addresses(self, spans: Sequence[Tensor]) -> Tensor:
        """Where each piece begins in memory: int64 [P].

        Raises:
            ValueError: if the spans are not as long as those of the layout; loops do not look where memory ends.
        """
        if (lengths := [span.numel() for span in spans]) != self._span_lengths:
            raise ValueError(f"spans of {lengths} elements, and a layout of spans of {self._span_lengths}")
        firsts_S = torch.tensor([span.data_ptr() for span in spans])
        return firsts_S[self._pieces.spans_P] + torch.float32.itemsize * self._pieces.starts_P


def _calls(
    whole: Sequence[Tensor], per_piece: Sequence[Tensor], room: Callable[[], Any] | None = None
) -> list[tuple[Any, ...]]:
    """Arguments of a kernel for each thread: ``whole`` as it is, its run of pieces, and ``room`` of its own to work in."""
    arrays, tables = [_array(tensor) for tensor in whole], [_array(tensor) for tensor in per_piece]
    return [
        (*arrays, *(table[part] for table in tables), *([room()] if room else []))
        for part in _parts(len(per_piece[0]), torch.get_num_threads())
    ]


def _array(tensor: Tensor) -> Any:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


_ready: set[tuple[Any, ...]] = set()


def _make_ready(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Load or compile ``kernel`` for arguments of these types."""
    signature = tuple(map(numba.typeof, arguments))
    if (kernel, signature) in _ready:
        return
    with _one_process_at_a_time() if KEEPS_CODE else nullcontext():
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
