"""The Triton kernels against PyTorch: on a GPU, or, as a script, on CPU under Triton's interpreter or compiled and not run.

``python -m tests.core.gpu_kernel_cases interpret`` or ``compile``.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ogpsa.plugin.streaming import HostRows, host_rows
from megatron_ogpsa.projection.segments import (
    Segment,
    SegmentLayout,
    TileLimits,
    combine_rows,
    cross_products,
    gram_and_dots,
    subtract_combination,
)

if TYPE_CHECKING:
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

LONG = 8_000
"""Of several of a kernel's blocks, and of the tiles below; no longer, for the interpreter's sake."""

SPANS = [
    [Segment(LONG, 0, True), Segment(7, 1, True), Segment(9, 2, False), Segment(1025, 1, True)],
    [Segment(33, 2, True), Segment(1, 3, True), Segment(2000, 3, True), Segment(64, 0, False)],
]
NUM_BLOCKS = 5
LIMITS = TileLimits(tile=2**12, short=2**10)

ALIGNED = [
    [Segment(LONG, 0, True), Segment(64, 1, True), Segment(8, 2, False), Segment(1000, 1, True)],
    [Segment(24, 2, True), Segment(8, 3, True), Segment(2000, 3, True), Segment(64, 0, False)],
]
"""As Megatron's buffers are: eight elements are read at a time."""

LAYOUTS = {
    1: SPANS,
    2: [[Segment(LONG + 2, 0, True), Segment(1030, 1, True)], ALIGNED[1]],
    4: [[Segment(LONG + 4, 0, True), Segment(1028, 1, True)], ALIGNED[1]],
    8: ALIGNED,
}
"""Elements that can be read at a time → spans."""


def compare(device: torch.device) -> None:
    """Dots to fp64, and what is written to the bit."""
    limits = LIMITS if device.type == "cpu" else None
    for spans, numbers_of_rows in ((SPANS, (0, 1, 2, 5, 8)), (ALIGNED, (3,))):
        compare_layout(SegmentLayout(spans, NUM_BLOCKS, device, limits), numbers_of_rows)


def compare_layout(layout: SegmentLayout, numbers_of_rows: Sequence[int]) -> None:
    """Of these spans."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    kernels = GpuKernels(layout)
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows in numbers_of_rows:
            rows, vector, weights = _random(layout, num_rows, dtype)
            spans = list(vector.split(layout.span_lengths))
            expected = gram_and_dots(layout, rows, spans)
            torch.testing.assert_close(kernels.dots(spans, rows), expected, rtol=1e-13, atol=1e-10)
            if num_rows:
                compare_what_is_subtracted(kernels, layout, vector, rows, weights)
            if (dtype, num_rows) in ((torch.float32, 2), (torch.bfloat16, 5)):
                compare_refresh(layout, rows.float(), rows)
    vector[LONG + 8] = float("nan")  # a copy that is not counted
    if kernels.dots(list(vector.split(layout.span_lengths)), rows).isfinite().all():
        raise AssertionError("a copy that is not finite went unseen")


def compare_what_is_subtracted(
    kernels: GpuKernels, layout: SegmentLayout, vector: Tensor, rows: Tensor, weights: Tensor
) -> None:
    """Of gradients in fp32, and in 16 bits, into which the difference is rounded once."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32) if len(rows) == 2 else (torch.float32,):
        own, wanted = vector.to(dtype, copy=True), vector.to(dtype, copy=True)
        spans = list(own.split(layout.span_lengths))
        dots = gram_and_dots(layout, rows, spans)
        torch.testing.assert_close(kernels.dots(spans, rows), dots, rtol=1e-13, atol=1e-10)
        subtract_combination(layout, list(wanted.split(layout.span_lengths)), rows, weights)
        kernels.subtract(spans, rows, weights)
        _require_same(own, wanted, f"other bits are subtracted from {dtype}")


def compare_refresh(layout: SegmentLayout, references: Tensor, basis: Tensor) -> None:
    """Sums to fp64, and a basis to the bit, also in the references' own memory."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    kernels, close = GpuKernels(layout), {"rtol": 1e-13, "atol": 1e-10}
    gram = kernels.gram(references)
    torch.testing.assert_close(gram, gram_and_dots(layout, references), **close)
    _require(torch.equal(gram, gram.mT), "a Gram matrix is not symmetric")
    torch.testing.assert_close(kernels.products(references, basis), cross_products(layout, references, basis), **close)
    weights = _weights(layout, len(references))
    wanted, found = torch.empty_like(basis), torch.empty_like(basis)
    combine_rows(layout, references, weights, wanted)
    kernels.combine(references, weights, found)
    _require_same(found, wanted, "a basis has other bits than PyTorch's")
    fewer = torch.empty_like(found[:-1])
    kernels.combine(references, weights[:, :, :-1], fewer)
    _require(torch.equal(fewer, found[:-1]), "fewer vectors have other bits")
    if basis.dtype == references.dtype:
        kernels.combine(references, weights, references)
        _require(torch.equal(references, found), "a basis in the references' own memory has other bits")


def compare_streamed(device: torch.device) -> None:
    """Rows in host memory give the bits of rows on the device, in each pass."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    for dtype, segments in product((torch.float32, torch.bfloat16), (SPANS, ALIGNED)):
        layout = SegmentLayout(segments, NUM_BLOCKS, device, LIMITS)
        found = []
        for is_far in (False, True):
            kernels = GpuKernels(layout)
            references, _, _ = _random(layout, 3, torch.float32)
            basis, vector, weights = _random(layout, 2, dtype)
            spans = list(vector.split(layout.span_lengths))
            combined = torch.empty_like(references).cpu() if is_far else torch.empty_like(references)
            held = [
                HostRows(host_rows(*rows.shape, rows.dtype, device).copy_(rows), device) if is_far else rows
                for rows in (references, basis)
            ]
            results = [kernels.gram(held[0]), kernels.products(held[0], held[1]), kernels.dots(spans, held[1])]
            kernels.subtract(spans, held[1], weights)
            kernels.combine(held[0], _weights(layout, 3), combined)
            found.append([*results, vector, combined.to(device)])
        names = ("gram", "products", "dots", "subtract", "combine")
        for name, near, far in zip(names, *found, strict=True):
            _require(torch.equal(near, far), f"{name}: rows in host memory in {dtype} give other bits")


def compare_parameters(device: torch.device) -> None:
    """Spans that are parameters: none as long as another, one without elements, their columns in another order."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    spans = [SPANS[1], [], SPANS[0]]
    first = sum(segment.length for segment in SPANS[0])
    layout = SegmentLayout(spans, NUM_BLOCKS, device, LIMITS, columns=[first, first, 0])
    rows, vector, weights = _random(layout, 2, torch.float32)
    parameters = [part.clone() for part in vector.split(layout.span_lengths)]
    wanted, kernels = [part.clone() for part in parameters], GpuKernels(layout)
    dots = gram_and_dots(layout, rows, wanted)
    subtract_combination(layout, wanted, rows, weights)
    for held in (rows, HostRows(host_rows(*rows.shape, rows.dtype, device).copy_(rows), device)):
        own = [part.clone() for part in parameters]
        torch.testing.assert_close(kernels.dots(own, held), dots, rtol=1e-13, atol=1e-10)
        kernels.subtract(own, held, weights)
        _require(all(map(torch.equal, own, wanted)), "parameters in another order than the basis' columns")


def _weights(layout: SegmentLayout, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(layout.num_blocks, number, number, generator=generator).to(layout.device).double()


def _require_same(found: Tensor, wanted: Tensor, otherwise: str) -> None:
    """To the bit; but Triton's interpreter cuts bf16 off, where its compiler rounds (``runtime/interpreter.py``)."""
    if found.dtype == torch.bfloat16 and found.device.type == "cpu":
        torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-14)
    else:
        _require(torch.equal(found, wanted), otherwise)


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise AssertionError(otherwise)


def repeat(device: torch.device) -> None:
    """The same bits in each of many runs."""
    from megatron_ogpsa.projection.gpu_kernels import GpuKernels

    layout = SegmentLayout([[Segment(100_000, block % 7, True) for block in range(50)]], 7, device)
    rows, vector, _ = _random(layout, 3, torch.float32)
    first, gram = GpuKernels(layout).dots([vector], rows), GpuKernels(layout).gram(rows)
    for _ in range(20):
        kernels = GpuKernels(layout)
        same = torch.equal(kernels.dots([vector], rows), first) and torch.equal(kernels.gram(rows), gram)
        _require(same, "the bits of a sum depend on the run")


def _random(layout: SegmentLayout, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, layout.num_elements, generator=generator).to(layout.device, dtype)
    vector = torch.randn(layout.num_elements, generator=generator).to(layout.device)
    weights = torch.randn(layout.num_blocks, num_rows, generator=generator).to(layout.device, torch.float64)
    return rows, vector, weights


class Compiled:
    """In the place of a kernel: each launch is compiled for a GPU of compute capability 9.0, with what it is launched with.

    The interpreter runs much that Triton does not compile, and counts in Python's integers.
    """

    def __init__(self, kernel: Any) -> None:
        self.assembly: dict[str, str] = {}
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **named: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import mangle_type

        options = {name: named.pop(name) for name in ("enable_fp_fusion",) if name in named}
        bound = inspect.signature(self._kernel.fn).bind(*args, **named).arguments
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self._kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = parameter.annotation_type or mangle_type(value)
            if isinstance(value, Tensor) and value.data_ptr() % 16 == 0:  # as at a launch
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = f"{[*signature.values()]} {constants} {[*attributes]}"
        if key not in self.assembly:
            source = ASTSource(self._kernel, signature, constexprs=constants, attrs=attributes)
            self.assembly[key] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def compile_for_a_gpu() -> None:
    """Every launch of every pass compiles; strides and offsets are of 64 bits; what is written is rounded at each step."""
    from megatron_ogpsa.projection import gpu_kernels, triton_kernels

    names = [name for name in vars(triton_kernels) if name.startswith("ogpsa_")]
    kernels = {name: Compiled(getattr(triton_kernels, name)) for name in names}
    for name, kernel in kernels.items():
        setattr(triton_kernels, name, kernel)
    for unit, segments in LAYOUTS.items():
        layout = SegmentLayout(segments, NUM_BLOCKS, torch.device("cpu"))
        _require(gpu_kernels.GpuKernels(layout)._unit == unit, f"{unit} elements cannot be read at a time")
        compile_passes(layout)
    for name, kernel in kernels.items():
        print(f"{name}: {len(kernel.assembly)} variants")
        _require(len(kernel.assembly) >= 4, f"{name} was hardly launched")
        for key, assembly in kernel.assembly.items():
            _require("i32" not in key, f"{name} is given an integer of 32 bits: {key}")
            _require(name == "ogpsa_dots" or "fma." not in assembly, f"{name} fuses a product with a sum: {key}")
            if "'unit'" in key:
                found = {int(number) for number in re.findall(r"ld\.global\S*\.v(\d)\.", assembly)}
                _require(found == widths(key), f"{name} reads {found} words at a time: {key}")


def widths(key: str) -> set[int]:
    """Words of 32 bits that a thread reads at once, where that is more than one, of gradient and basis."""
    unit, block, num_rows = (
        int(found[1])
        for found in (re.search(rf"'{name}': (\d+)", key) for name in ("unit", "block", "num_rows"))
        if found
    )
    sizes = [4 if "language.float32" in key else 2]
    if num_rows:
        sizes.append(2 if "'*bf16', 'i64'" in key else 4)
    at_once = min(unit, block // 128)  # threads of a program
    return {min(at_once * size // 4, 4) for size in sizes} - {0, 1}


def compile_passes(layout: SegmentLayout) -> None:
    """All that launch a kernel."""
    from megatron_ogpsa.projection import gpu_kernels

    passes = gpu_kernels.GpuKernels(layout)
    for num_rows, dtype in ((0, torch.float32), (1, torch.float32), (3, torch.bfloat16), (8, torch.float32)):
        rows, vector, weights = _random(layout, num_rows, dtype)
        for span_type in (torch.float32, torch.bfloat16, torch.float16) if num_rows == 3 else (torch.float32,):
            spans = list(vector.to(span_type).split(layout.span_lengths))
            passes.dots(spans, rows)
            passes.subtract(spans, rows, weights)
        if num_rows:
            passes.gram(rows.float())
            passes.combine(rows.float(), _weights(layout, num_rows), torch.empty_like(rows))
    streamed = HostRows(_random(layout, 3, torch.float32)[0], layout.device)
    passes.combine(streamed, _weights(layout, 3), torch.empty(3, layout.num_elements))


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        compare(torch.device("cpu"))
        compare_streamed(torch.device("cpu"))
        compare_parameters(torch.device("cpu"))
    else:
        compile_for_a_gpu()
