"""The Triton kernels against PyTorch: on a GPU, or, as a script, on CPU under Triton's interpreter."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_ogpsa.projection.segments import Segment, SegmentLayout, gram_and_dots, subtract_combination

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
    vector[40_008] = float("nan")  # a copy that is not counted
    if kernels.dots(list(vector.split(layout.span_lengths)), rows).isfinite().all():
        raise AssertionError("a copy that is not finite went unseen")


def repeat(device: torch.device) -> None:
    """The same bits in each of many runs."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    layout = SegmentLayout([[Segment(100_000, block % 7, True) for block in range(50)]], 7, device)
    rows, vector, _ = _random(layout, 3, torch.float32)
    first = GpuKernels(layout).dots([vector], rows)
    for _ in range(20):
        if not torch.equal(GpuKernels(layout).dots([vector], rows), first):
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
