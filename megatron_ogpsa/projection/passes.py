"""The passes over the gradient, the references and the basis, in the fastest form that there is for where they lie.

| gradient, references and basis | form |
|---|---|
| CPU, fp32, the basis fp32 or bf16, :data:`COMPILED_FROM` elements or more | :mod:`megatron_ogpsa.projection.cpu_kernels` |
| CUDA, 16 or 32 bits, the basis fp32 or bf16 there or in host memory, with Triton from 3.4 on (PyTorch 2.8 brings it) | \
:mod:`megatron_ogpsa.projection.gpu_kernels` |
| anything else | tile by tile in PyTorch, :mod:`megatron_ogpsa.projection.segments` |

A step has two passes, ``dots`` and ``subtract``; a refresh has ``gram``, ``products`` and ``combine``. All sum in fp64. What
``subtract`` and ``combine`` write is the same to the bit in all forms; sums differ in their order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_ogpsa.projection.segments import (
    Rows,
    SegmentLayout,
    TileSource,
    combine_rows,
    cross_products,
    gram_and_dots,
    subtract_combination,
)

if TYPE_CHECKING:

    class Kernels(Protocol):
        """Compiled passes of one layout; rows are tensors, on a GPU also what brings them there."""

        def dots(self, spans: Sequence[Tensor], rows_KN: Any, /) -> Tensor: ...
        def subtract(self, spans: Sequence[Tensor], rows_KN: Any, coefficients_BK: Tensor, /) -> None: ...
        def gram(self, rows_KN: Any, /) -> Tensor: ...
        def products(self, rows_KN: Any, others_JN: Any, /) -> Tensor: ...
        def combine(self, rows_KN: Any, weights_BKJ: Tensor, out_JN: Tensor, /) -> None: ...


logger = logging.getLogger(__name__)

OLDEST_TRITON = (3, 4)
"""Whose kernels may keep several sums in a tuple over a loop."""

COMPILED_FROM = 2**20
"""Elements of a shard from which compiled loops are worth the second that loading them takes."""

_BASIS_TYPES = (torch.float32, torch.bfloat16)

_known: WeakKeyDictionary[SegmentLayout, Kernels] = WeakKeyDictionary()


def dots(layout: SegmentLayout, rows_KN: Rows, spans: Sequence[Tensor]) -> Tensor:
    """c = Q·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share; sum over ranks next.

    Args:
        rows_KN: Q, K ≥ 0 vectors over the shard.
        spans: g, 1-D tensors, one for each span of the layout.
    """
    if kernels := _kernels(layout, spans, [rows_KN]):
        return kernels.dots(spans, rows_KN)
    return gram_and_dots(layout, rows_KN, spans)


def subtract(layout: SegmentLayout, spans: Sequence[Tensor], rows_KN: Rows, coefficients_BK: Tensor) -> None:
    """g ← g − Σ_k r_bk·q_k in place, b being the block of each element; copies that are not counted are changed alike.

    Args:
        coefficients_BK: r, on the layout's device.
    """
    if kernels := _kernels(layout, spans, [rows_KN]):
        kernels.subtract(spans, rows_KN, coefficients_BK)
    else:
        subtract_combination(layout, spans, rows_KN, coefficients_BK)


def gram(layout: SegmentLayout, rows_KN: Rows) -> Tensor:
    """R·Rᵀ of each block: fp64 [B, K, K], symmetric, this rank's share; sum over ranks next."""
    if kernels := _kernels(layout, [rows_KN], []):
        return kernels.gram(rows_KN)
    return gram_and_dots(layout, rows_KN)


def products(layout: SegmentLayout, rows_KN: Rows, others_JN: Rows) -> Tensor:
    """R·Oᵀ of each block: fp64 [B, K, J], this rank's share; sum over ranks next."""
    if kernels := _kernels(layout, [rows_KN], [others_JN]):
        return kernels.products(rows_KN, others_JN)
    return cross_products(layout, rows_KN, others_JN)


def combine(layout: SegmentLayout, rows_KN: Rows, weights_BKJ: Tensor, out_JN: Tensor) -> None:
    """out = Wᵀ·R, block by block; ``out`` may be ``rows``, or the host memory that they come from."""
    if kernels := _kernels(layout, [rows_KN], [] if isinstance(rows_KN, TileSource) else [out_JN]):
        kernels.combine(rows_KN, weights_BKJ, out_JN)
    else:
        combine_rows(layout, rows_KN, weights_BKJ, out_JN)


def slow_reading(layout: SegmentLayout) -> str:
    """What to do where a GPU must read element by element; empty where it need not."""
    if layout.device.type != "cuda" or layout.num_elements < COMPILED_FROM or layout.multiple % 2 == 0:
        return ""
    return (
        "shards lie where the GPU must read the basis element by element, which takes up to three times as long: add "
        "--ddp-pad-buckets-for-high-nccl-busbw, which pads Megatron's buffers"
    )


def _kernels(layout: SegmentLayout, vectors: Sequence[Rows], tables: Sequence[Rows]) -> Kernels | None:
    """Those that can work on these, made for the layout once.

    Args:
        vectors: the spans of a gradient, or references.
        tables: the basis; may be bf16 also where vectors must be fp32.
    """
    if layout.num_elements == 0:  # some ranks hold none
        return None
    fits = _fits_on_cpu if layout.device.type == "cpu" else _fits_on_gpu
    if not fits(layout, vectors, tables):
        return None
    if layout not in _known:
        _known[layout] = _made(layout, layout.device.type)
    return _known[layout]


def _fits_on_cpu(layout: SegmentLayout, vectors: Sequence[Rows], tables: Sequence[Rows]) -> bool:
    return (
        layout.num_elements >= COMPILED_FROM
        and all(
            isinstance(rows, Tensor) and rows.device == layout.device and rows.is_contiguous()
            for rows in (*vectors, *tables)
        )
        and all(vector.dtype == torch.float32 for vector in vectors)
        and all(table.dtype in _BASIS_TYPES for table in tables)
    )


def _fits_on_gpu(layout: SegmentLayout, vectors: Sequence[Rows], tables: Sequence[Rows]) -> bool:
    if layout.device.type != "cuda" or not _has_triton():
        return False
    from megatron_ogpsa.projection.gpu_kernels import VECTOR_TYPES

    dtypes = {vector.dtype for vector in vectors}
    return (
        len(dtypes) == 1
        and dtypes <= VECTOR_TYPES.keys()
        and all(table.dtype in _BASIS_TYPES for table in tables)
        and all(
            isinstance(rows, TileSource) or (rows.device == layout.device and rows.is_contiguous())
            for rows in (*vectors, *tables)
        )
    )


def _made(layout: SegmentLayout, device: str) -> Kernels:
    if device == "cpu":
        from megatron_ogpsa.projection.cpu_kernels import CpuKernels

        return CpuKernels(layout)
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    return GpuKernels(layout)


@cache
def _has_triton() -> bool:
    """Whether there is one that the kernels were written for; where there is not, that is said once."""
    try:
        import triton

        found = str(triton.__version__)
    except ImportError:
        found = "none"
    if found != "none" and tuple(map(int, found.split(".")[:2])) >= OLDEST_TRITON:
        return True
    oldest = ".".join(map(str, OLDEST_TRITON))
    logger.warning(
        "the projection goes through PyTorch, which takes several times as long: "
        f"its kernels need Triton {oldest} or newer, here is {found}; PyTorch 2.8 brings it along"
    )
    return False
