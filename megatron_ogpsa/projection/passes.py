"""The passes over the gradient, the references and the basis, in the fastest form that there is for where they lie.

| gradient, references and basis | form |
|---|---|
| CPU, fp32, the basis fp32 or bf16, :data:`COMPILED_FROM` elements or more | :mod:`megatron_ogpsa.projection.cpu_kernels` |
| CUDA, likewise, with Triton (which PyTorch brings along on Linux) | :mod:`megatron_ogpsa.projection.gpu_kernels` |
| anything else, what lies in host memory too | tile by tile in PyTorch, :mod:`megatron_ogpsa.projection.segments` |

A step has two passes, ``dots`` and ``subtract``; a refresh has ``gram``, ``products`` and ``combine``. All sum in fp64. What
``subtract`` and ``combine`` write is the same to the bit in the first and the last form; sums differ in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_ogpsa.projection.segments import (
    Rows,
    SegmentLayout,
    combine_rows,
    cross_products,
    gram_and_dots,
    subtract_combination,
)

if TYPE_CHECKING:
    from megatron_ogpsa.projection.cpu_kernels import CpuKernels
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    Kernels = CpuKernels | GpuKernels

COMPILED_FROM = 2**20
"""Elements of a shard from which compiled loops are worth the second that loading them takes."""

_known: WeakKeyDictionary[SegmentLayout, Kernels] = WeakKeyDictionary()


def dots(layout: SegmentLayout, rows_KN: Rows, spans: Sequence[Tensor]) -> Tensor:
    """c = Q·g and, in the last column, ‖g‖², of each block: fp64 [B, K+1], this rank's share; sum over ranks next.

    Args:
        rows_KN: Q, K ≥ 0 vectors over the shard.
        spans: g, 1-D tensors, one for each span of the layout.
    """
    if isinstance(rows_KN, Tensor) and (kernels := _kernels(layout, spans, [rows_KN])):
        return kernels.dots(spans, rows_KN)
    return gram_and_dots(layout, rows_KN, spans)


def subtract(layout: SegmentLayout, spans: Sequence[Tensor], rows_KN: Rows, coefficients_BK: Tensor) -> None:
    """g ← g − Σ_k r_bk·q_k in place, b being the block of each element; copies that are not counted are changed alike.

    Args:
        coefficients_BK: r, on the layout's device.
    """
    if isinstance(rows_KN, Tensor) and (kernels := _kernels(layout, spans, [rows_KN])):
        kernels.subtract(spans, rows_KN, coefficients_BK)
    else:
        subtract_combination(layout, spans, rows_KN, coefficients_BK)


def gram(layout: SegmentLayout, rows_KN: Rows) -> Tensor:
    """R·Rᵀ of each block: fp64 [B, K, K], symmetric, this rank's share; sum over ranks next."""
    if isinstance(rows_KN, Tensor) and (kernels := _kernels(layout, [rows_KN], [])):
        return kernels.gram(rows_KN)
    return gram_and_dots(layout, rows_KN)


def products(layout: SegmentLayout, rows_KN: Rows, others_JN: Rows) -> Tensor:
    """R·Oᵀ of each block: fp64 [B, K, J], this rank's share; sum over ranks next."""
    if isinstance(rows_KN, Tensor) and isinstance(others_JN, Tensor):
        kernels = _kernels(layout, [rows_KN], [others_JN])
        if kernels is not None:
            return kernels.products(rows_KN, others_JN)
    return cross_products(layout, rows_KN, others_JN)


def combine(layout: SegmentLayout, rows_KN: Rows, weights_BKJ: Tensor, out_JN: Tensor) -> None:
    """out = Wᵀ·R, block by block; ``out`` may be ``rows``, or the host memory that they come from."""
    if isinstance(rows_KN, Tensor) and (kernels := _kernels(layout, [rows_KN], [out_JN])):
        kernels.combine(rows_KN, weights_BKJ, out_JN)
    else:
        combine_rows(layout, rows_KN, weights_BKJ, out_JN)


def _kernels(layout: SegmentLayout, vectors: Sequence[Tensor], tables: Sequence[Tensor]) -> Kernels | None:
    """Those that can work on these tensors, made for the layout once.

    Args:
        vectors: the spans of a gradient, or references; they must be fp32.
        tables: the basis; may be bf16.
    """
    device = layout.device.type
    fits = (
        all(tensor.device.type == device and tensor.is_contiguous() for tensor in (*vectors, *tables))
        and all(vector.dtype == torch.float32 for vector in vectors)
        and all(table.dtype in (torch.float32, torch.bfloat16) for table in tables)
        and layout.num_elements > 0  # some ranks hold none
        and ((device == "cpu" and layout.num_elements >= COMPILED_FROM) or (device == "cuda" and _has_triton()))
    )
    if not fits:
        return None
    if layout not in _known:
        _known[layout] = _made(layout, device)
    return _known[layout]


def _made(layout: SegmentLayout, device: str) -> Kernels:
    if device == "cpu":
        from megatron_ogpsa.projection.cpu_kernels import CpuKernels

        return CpuKernels(layout)
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    return GpuKernels(layout)


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
