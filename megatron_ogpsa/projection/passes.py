"""The two passes of a step over the gradient and the basis, in the fastest form that there is for where they lie.

| gradient and basis | form |
|---|---|
| CPU, both fp32 or the basis bf16, :data:`COMPILED_FROM` elements or more | :mod:`megatron_ogpsa.projection.cpu_kernels` |
| CUDA, likewise, with Triton (which PyTorch brings along on Linux) | :mod:`megatron_ogpsa.projection.gpu_kernels` |
| anything else, a basis in host memory too | tile by tile in PyTorch, :mod:`megatron_ogpsa.projection.segments` |

All sum in fp64. What is subtracted is the same to the bit in the first and the last; dots differ in the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_ogpsa.projection.segments import Rows, SegmentLayout, gram_and_dots, subtract_combination

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
    if isinstance(rows_KN, Tensor) and (kernels := _kernels(layout, rows_KN, spans)):
        return kernels.dots(spans, rows_KN)
    return gram_and_dots(layout, rows_KN, spans)


def subtract(layout: SegmentLayout, spans: Sequence[Tensor], rows_KN: Rows, coefficients_BK: Tensor) -> None:
    """g ← g − Σ_k r_bk·q_k in place, b being the block of each element; copies that are not counted are changed alike.

    Args:
        coefficients_BK: r, on the layout's device.
    """
    if isinstance(rows_KN, Tensor) and (kernels := _kernels(layout, rows_KN, spans)):
        kernels.subtract(spans, rows_KN, coefficients_BK)
    else:
        subtract_combination(layout, spans, rows_KN, coefficients_BK)


def _kernels(layout: SegmentLayout, rows_KN: Tensor, spans: Sequence[Tensor]) -> Kernels | None:
    """Those that can work on these tensors, made for the layout once."""
    device = layout.device.type
    fits = (
        rows_KN.device.type == device
        and rows_KN.is_contiguous()
        and rows_KN.dtype in (torch.float32, torch.bfloat16)
        and all(span.dtype == torch.float32 and span.is_contiguous() for span in spans)
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
