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

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from megatron_ogpsa.projection import numba_kernels
from megatron_ogpsa.projection.numba_kernels import CHUNK, KEEPS_CODE
from megatron_ogpsa.projection.pieces import in_columns, in_memory, pieces_by_span
from megatron_ogpsa.projection.segments import SegmentLayout

LONGEST_PIECE = 2**15

Array = npt.NDArray[Any]

LOCK_SECONDS = 60.0
"""That a process waits for others to compile; it takes them two."""

_LOCK = Path(__file__).parent / "__pycache__" / "cpu_kernels.lock"


class CpuKernels:
    """The passes over the spans of one layout, and over the columns of its basis.

    Loops read from addresses and do not look where memory ends, so that each method looks first.

    Args:
        layout: on CPU; its spans are fp32.

    Raises:
        ValueError: by each method, if vectors are not as the layout has them: contiguous, on CPU, fp32 (basis: or bf16), and
            as long.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        by_span = pieces_by_span(layout, most=LONGEST_PIECE)
        pieces, columns = in_memory(by_span), in_columns(by_span)
        # NumPy's arrays, made once: for a small shard small operations take longer than reading it.
        self._spans_P, self._blocks_P, self._weights_P = map(
            _array, (pieces.spans_P, pieces.blocks_P, pieces.weights_P)
        )
        self._offsets_P = torch.float32.itemsize * _array(pieces.starts_P)  # bytes, in each span
        self._starts_P, self._stops_P = _array(columns.starts_P), _array(columns.stops_P)  # in the basis
        self._lengths_P = self._stops_P - self._starts_P
        self._runs: dict[int, Sequence[slice]] = {}  # by number of threads
        self._num_blocks = layout.num_blocks
        self._span_lengths = layout.span_lengths
        self._num_columns = layout.num_columns

    def dots(self, spans: Sequence[Tensor], rows_KN: Tensor) -> Tensor:
        """R·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share.

        Products and sums are fp64. The result does not depend on the number of threads.
        """
        self._look_at(rows_KN)
        sums_PJ = self._sums(len(rows_KN) + 1)
        per_piece = (self._addresses(spans), self._lengths_P, self._starts_P, self._weights_P, sums_PJ)
        _run(numba_kernels.dots, self._calls((rows_KN,), per_piece))
        return self._sums_of_blocks(sums_PJ)

    def subtract(self, spans: Sequence[Tensor], rows_KN: Tensor, coefficients_BK: Tensor) -> None:
        """g ← g − Σ_k r_bk·q_k, b being the block of each element; as :func:`subtract_combination` has it, to the bit, but
        for the sign of a zero.
        """
        self._look_at(rows_KN)
        weights_PK = coefficients_BK.float().numpy().take(self._blocks_P, axis=0)
        per_piece = (self._addresses(spans), self._lengths_P, self._starts_P, weights_PK)
        _run(numba_kernels.subtract, self._calls((rows_KN,), per_piece, lambda: np.empty(CHUNK, np.float32)))

    def gram(self, rows_KN: Tensor) -> Tensor:
        """R·Rᵀ of each block: fp64 [B, K, K], this rank's share. R is fp32; as :meth:`dots` otherwise."""
        self._look_at(rows_KN)
        num_rows = rows_KN.shape[0]
        below, left = torch.tril_indices(num_rows, num_rows)
        sums_PT = self._sums(len(below))
        _run(numba_kernels.gram, self._calls((rows_KN,), (self._starts_P, self._stops_P, self._weights_P, sums_PT)))
        sums_BT = self._sums_of_blocks(sums_PT)
        gram_BKK = sums_BT.new_empty(len(sums_BT), num_rows, num_rows)
        gram_BKK[:, below, left] = gram_BKK[:, left, below] = sums_BT
        return gram_BKK

    def products(self, rows_KN: Tensor, others_JN: Tensor) -> Tensor:
        """R·Oᵀ of each block: fp64 [B, K, J], this rank's share. R is fp32; as :meth:`dots` otherwise."""
        self._look_at(rows_KN, others_JN)
        shape = len(rows_KN), len(others_JN) + 1
        sums_PJ = self._sums(math.prod(shape))
        per_piece = (self._starts_P, self._stops_P, self._weights_P, sums_PJ.reshape(-1, *shape))
        _run(numba_kernels.products, self._calls((rows_KN, others_JN), per_piece))
        return self._sums_of_blocks(sums_PJ).unflatten(1, shape)[..., :-1]

    def combine(self, rows_KN: Tensor, weights_BKJ: Tensor, out_JN: Tensor) -> None:
        """out = Wᵀ·R, block by block; R is fp32, and may be ``out``. Bitwise as :func:`combine_rows` has it."""
        self._look_at(rows_KN, out_JN)
        per_piece = (self._starts_P, self._stops_P, weights_BKJ.numpy().take(self._blocks_P, axis=0))
        calls = self._calls((rows_KN, out_JN), per_piece, lambda: np.empty((len(out_JN), CHUNK)))
        _run(numba_kernels.combine, calls)

    def _sums(self, number: int) -> Array:
        """Room for the sums of each piece: fp64 [P, J]."""
        return np.zeros((len(self._blocks_P), number))

    def _sums_of_blocks(self, sums_PJ: Array) -> Tensor:
        """fp64 [P, J] → [B, J]; zero for blocks without pieces.

        Those of a block are added in the order of its pieces. As they come would be other bits on other numbers of threads.
        """
        sums_BJ = np.zeros((self._num_blocks, sums_PJ.shape[1]))
        arguments = (self._blocks_P, sums_PJ, sums_BJ)
        _make_ready(numba_kernels.add_pieces, arguments)
        numba_kernels.add_pieces(*arguments)
        return torch.from_numpy(sums_BJ)

    def _addresses(self, spans: Sequence[Tensor]) -> Array:
        """Where each piece begins in memory: int64 [P]."""
        if (lengths := [span.numel() for span in spans]) != self._span_lengths:
            raise ValueError(f"spans of {lengths} elements, and a layout of spans of {self._span_lengths}")
        if not all(_is_readable(span) and span.dtype == torch.float32 for span in spans):
            raise ValueError("spans must be contiguous, on CPU and fp32")
        firsts_S = np.array([span.data_ptr() for span in spans], np.int64)
        return firsts_S[self._spans_P] + self._offsets_P

    def _look_at(self, *tables: Tensor) -> None:
        for table in tables:
            if table.shape[1] != self._num_columns or not _is_readable(table):
                raise ValueError(
                    f"rows must be contiguous, on CPU and {self._num_columns} elements long, not {table.shape[1]}"
                )

    def _calls(
        self, whole: Sequence[Tensor], per_piece: Sequence[Array], room: Callable[[], Array] | None = None
    ) -> list[tuple[Array, ...]]:
        """Arguments of a kernel for each thread: ``whole``, its run of pieces, and ``room`` of its own to work in."""
        arrays, number = [_array(tensor) for tensor in whole], torch.get_num_threads()
        if number not in self._runs:
            self._runs[number] = _runs(self._lengths_P, number)
        return [
            (*arrays, *(table[run] for table in per_piece), *([room()] if room else [])) for run in self._runs[number]
        ]


def _is_readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


_ready: set[tuple[Any, ...]] = set()


def _make_ready(kernel: Any, arguments: Sequence[Array]) -> None:
    """Load or compile ``kernel`` for arguments of these types."""
    types = (kernel, *((one.dtype.char, one.ndim, one.flags.c_contiguous) for one in arguments))
    if types in _ready:
        return
    with _one_process_at_a_time() if KEEPS_CODE else nullcontext():
        kernel.compile(tuple(map(numba.typeof, arguments)))
    _ready.add(types)


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


def _run(kernel: Callable[..., None], work: Sequence[tuple[Array, ...]]) -> None:
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


def _runs(lengths_P: Array, number: int) -> Sequence[slice]:
    """The pieces in up to ``number`` runs of about as many elements each."""
    if not len(lengths_P):
        return []
    elements_P = lengths_P.cumsum()
    bounds = [0, *np.searchsorted(elements_P, np.arange(1, number) * elements_P[-1] // number), len(lengths_P)]
    return [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]
