"""The Triton kernels against PyTorch: on a GPU, or, as a script, on CPU under Triton's interpreter."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_ogpsa.projection.segments import (
    Segment,
    SegmentLayout,
    combine_rows,
    cross_products,
    gram_and_dots,
    subtract_combination,
)

SPANS = [
    [Segment(40_000, 0, True), Segment(7, 1, True), Segment(9, 2, False), Segment(1025, 1, True)],
    [Segment(33, 2, True), Segment(1, 3, True), Segment(2000, 3, True), Segment(64, 0, False)],
]
NUM_BLOCKS = 5


def compare(device: torch.device) -> None:
    """Dots to fp64; what is subtracted to fp32, since a GPU fuses products and sums."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    layout = SegmentLayout(SPANS, NUM_BLOCKS, device)
    kernels = GpuKernels(layout)
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows in (0, 1, 2, 5, 8):
            rows, vector, weights = _random(layout, num_rows, dtype)
            spans = list(vector.split(layout.span_lengths))
            expected = gram_and_dots(layout, rows, spans)
            torch.testing.assert_close(kernels.dots(spans, rows), expected, rtol=1e-13, atol=1e-10)
            if num_rows:
                other = vector.clone()
                subtract_combination(layout, list(other.split(layout.span_lengths)), rows, weights)
                kernels.subtract(spans, rows, weights)
                torch.testing.assert_close(vector, other, rtol=0.0, atol=num_rows * 4e-7 * float(other.abs().max()))
            if (dtype, num_rows) in ((torch.float32, 2), (torch.bfloat16, 5)):
                compare_refresh(layout, rows.float(), rows)
    vector[40_008] = float("nan")  # a copy that is not counted
    if kernels.dots(list(vector.split(layout.span_lengths)), rows).isfinite().all():
        raise AssertionError("a copy that is not finite went unseen")


def compare_refresh(layout: SegmentLayout, references: Tensor, basis: Tensor) -> None:
    """Sums to fp64, and a basis to the last digit of its dtype, also in the references' own memory."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    kernels, close = GpuKernels(layout), {"rtol": 1e-13, "atol": 1e-10}
    gram = kernels.gram(references)
    torch.testing.assert_close(gram, gram_and_dots(layout, references), **close)
    if not torch.equal(gram, gram.mT):
        raise AssertionError("a Gram matrix is not symmetric")
    torch.testing.assert_close(kernels.products(references, basis), cross_products(layout, references, basis), **close)
    generator = torch.Generator().manual_seed(len(references))
    weights = (
        torch.randn(layout.num_blocks, len(references), len(references), generator=generator).to(layout.device).double()
    )
    wanted, found = torch.empty_like(basis), torch.empty_like(basis)
    combine_rows(layout, references, weights, wanted)
    kernels.combine(references, weights, found)
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(basis.dtype).eps, atol=1e-14)
    fewer = torch.empty_like(found[:-1])
    kernels.combine(references, weights[:, :, :-1], fewer)
    if not torch.equal(fewer, found[:-1]):
        raise AssertionError("fewer vectors have other bits")
    if basis.dtype == references.dtype:
        kernels.combine(references, weights, references)
        if not torch.equal(references, found):
            raise AssertionError("a basis in the references' own memory has other bits")


def repeat(device: torch.device) -> None:
    """The same bits in each of many runs."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    layout = SegmentLayout([[Segment(100_000, block % 7, True) for block in range(50)]], 7, device)
    rows, vector, _ = _random(layout, 3, torch.float32)
    first, gram = GpuKernels(layout).dots([vector], rows), GpuKernels(layout).gram(rows)
    for _ in range(20):
        kernels = GpuKernels(layout)
        if not (torch.equal(kernels.dots([vector], rows), first) and torch.equal(kernels.gram(rows), gram)):
            raise AssertionError("the bits of a sum depend on the run")


def _random(layout: SegmentLayout, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, layout.num_elements, generator=generator).to(layout.device, dtype)
    vector = torch.randn(layout.num_elements, generator=generator).to(layout.device)
    weights = torch.randn(layout.num_blocks, num_rows, generator=generator).to(layout.device, torch.float64)
    return rows, vector, weights


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    compare(torch.device("cpu"))
