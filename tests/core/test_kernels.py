"""The compiled passes against those in PyTorch, tile by tile: the same bits where bits can be the same, fp64 elsewhere."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ogpsa.benchmarks import projection as benchmark
from megatron_ogpsa.plugin.streaming import HostRows
from megatron_ogpsa.projection import passes
from megatron_ogpsa.projection.cpu_kernels import CpuKernels
from megatron_ogpsa.projection.gpu_kernels import GpuKernels
from megatron_ogpsa.projection.segments import (
    Segment,
    SegmentLayout,
    combine_rows,
    cross_products,
    gram_and_dots,
    subtract_combination,
)
from tests.core import gpu_kernel_cases
from tests.harness import WorkerGroup

CPU = torch.device("cpu")
# Chunks are 1024 elements and pieces at most 32768: more than one, one with an odd rest, and far fewer than one.
SPANS = [
    [Segment(70_000, 0, True), Segment(7, 1, True), Segment(9, 2, False), Segment(1025, 1, True)],
    [Segment(33, 2, True), Segment(1, 3, True), Segment(9000, 3, True), Segment(64, 0, False)],
]
NUM_BLOCKS = 5  # the last has no elements on this rank
DTYPES = [torch.float32, torch.bfloat16]


def layout_of(device: torch.device = CPU) -> SegmentLayout:
    return SegmentLayout(SPANS, NUM_BLOCKS, device)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", range(10))
def test_both_passes_are_those_of_pytorch(num_rows: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    threads(1 + num_rows % 3)
    layout = layout_of()
    rows, vector = random(num_rows, layout.num_elements).to(dtype), random(layout.num_elements, seed=1)
    spans, kernels = list(vector.split(layout.span_lengths)), CpuKernels(layout)
    # Sums of 70,000 products of size 1, in two orders, each rounded to 1e-16 of what it has come to.
    torch.testing.assert_close(kernels.dots(spans, rows), gram_and_dots(layout, rows, spans), rtol=1e-13, atol=1e-10)
    if num_rows:
        weights, expected = random(NUM_BLOCKS, num_rows, seed=2).double(), vector.clone()
        subtract_combination(layout, list(expected.split(layout.span_lengths)), rows, weights)
        kernels.subtract(spans, rows, weights)
        assert torch.equal(vector, expected)


@pytest.mark.parametrize("compiled_from", [0, 2**30])
def test_weights_are_projected_that_require_gradients(compiled_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that an optimizer without fp32 copies updates, compiled and in PyTorch."""
    monkeypatch.setattr(passes, "COMPILED_FROM", compiled_from)
    layout = layout_of()
    rows, weights = random(2, layout.num_elements), random(NUM_BLOCKS, 2, seed=2).double()
    parameters = [torch.nn.Parameter(random(length, seed=1)) for length in layout.span_lengths]
    expected = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        assert torch.equal(passes.dots(layout, rows, parameters), passes.dots(layout, rows, expected))
        passes.subtract(layout, parameters, rows, weights)
    subtract_combination(layout, expected, rows, weights)
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9])
def test_the_passes_of_a_refresh_are_those_of_pytorch(num_rows: int, dtype: torch.dtype) -> None:
    """``dtype``: of the basis in use and of the one that is made."""
    layout = layout_of()
    references, basis = (
        random(num_rows, layout.num_elements),
        random(num_rows + 1, layout.num_elements, seed=1).to(dtype),
    )
    kernels, close = CpuKernels(layout), {"rtol": 1e-13, "atol": 1e-10}  # as of dots
    gram = kernels.gram(references)
    torch.testing.assert_close(gram, gram_and_dots(layout, references), **close)
    assert torch.equal(gram, gram.mT)
    expected = cross_products(layout, references, basis)
    torch.testing.assert_close(kernels.products(references, basis), expected, **close)
    weights = random(NUM_BLOCKS, num_rows, num_rows, seed=2).double()
    wanted, found = torch.empty_like(references, dtype=dtype), torch.empty_like(references, dtype=dtype)
    combine_rows(layout, references, weights, wanted)
    kernels.combine(references, weights, found)
    assert torch.equal(found, wanted)
    fewer, more = torch.empty_like(found[:1]), torch.empty_like(basis)
    kernels.combine(references, weights[:, :, :1], fewer)
    assert torch.equal(fewer, wanted[:1])
    combine_rows(layout, references, weights.repeat(1, 1, 2)[:, :, : num_rows + 1], basis)
    kernels.combine(references, weights.repeat(1, 1, 2)[:, :, : num_rows + 1], more)
    assert torch.equal(more, basis)
    if dtype == references.dtype:
        kernels.combine(references, weights, references)
        assert torch.equal(references, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_basis_is_rounded_as_pytorch_rounds(dtype: torch.dtype) -> None:
    """Halfway between two bf16, between two fp32, beyond the largest of either, subnormal, not finite."""
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.39e38, 1e-40, -1e-45, 0.0])
    special = torch.tensor([float("nan"), float("inf"), -float("inf")])
    row = torch.cat((halves, special)).repeat(200)
    layout = SegmentLayout([[Segment(len(row), 0, True)]], 1, CPU)
    for weight in (1.0, -1.0, 1 + 2**-24, 2.0):
        wanted, found = torch.empty(1, len(row), dtype=dtype), torch.empty(1, len(row), dtype=dtype)
        weights = torch.tensor([[[weight]]], dtype=torch.float64)
        combine_rows(layout, row[None], weights, wanted)
        CpuKernels(layout).combine(row[None], weights, found)
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_integers_are_exact(dtype: torch.dtype) -> None:
    layout, generator = layout_of(), torch.Generator().manual_seed(0)
    rows = torch.randint(-4, 5, (6, layout.num_elements), generator=generator).to(dtype)
    spans = list(torch.randint(-4, 5, (layout.num_elements,), generator=generator).float().split(layout.span_lengths))
    kernels, references = CpuKernels(layout), rows[:5].float()
    assert torch.equal(kernels.dots(spans, rows), gram_and_dots(layout, rows, spans))
    assert torch.equal(kernels.gram(references), gram_and_dots(layout, references))
    assert torch.equal(kernels.products(references, rows), cross_products(layout, references, rows))


def test_sums_are_fp64_and_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    layout = SegmentLayout([[Segment(2**18, 0, True)]], 1, CPU)
    rows, vector = random(3, layout.num_elements), random(layout.num_elements, seed=1) + 3.0
    weights, found = random(1, 3, 3, seed=2).double(), []
    for number in (1, 2, 5):
        threads(number)
        kernels, basis = CpuKernels(layout), torch.empty_like(rows)
        kernels.combine(rows, weights, basis)
        found.append((kernels.dots([vector], rows), kernels.gram(rows), kernels.products(rows, vector[None]), basis))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    exact = torch.cat((rows, vector[None])).double() @ vector.double()
    # fp32 sums give 1e-6 here.
    close = {"rtol": 1e-12, "atol": 1e-12 * float(exact[-1])}
    torch.testing.assert_close(found[0][0][0], exact, **close)
    torch.testing.assert_close(found[0][1][0], rows.double() @ rows.double().T, **close)
    torch.testing.assert_close(found[0][2][0, :, 0], exact[:-1], **close)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("element", [3, 70_008], ids=["counted", "a copy that is not counted"])
def test_what_is_not_finite_is_seen(element: int, value: float) -> None:
    layout = layout_of()
    rows, vector = random(2, layout.num_elements), random(layout.num_elements, seed=1)
    vector[element] = value
    dots = CpuKernels(layout).dots(list(vector.split(layout.span_lengths)), rows)
    expected = gram_and_dots(layout, rows, list(vector.split(layout.span_lengths)))
    assert torch.equal(dots.isfinite(), expected.isfinite())
    assert not dots.isfinite().all()
    rows[1, element] = value
    gram = CpuKernels(layout).gram(rows)
    assert torch.equal(gram.isfinite(), gram_and_dots(layout, rows).isfinite())
    assert not gram[:, 1, 1].isfinite().all()


def test_only_large_shards_are_worth_loading_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of()
    vector = random(layout.num_elements)
    spans, rows = list(vector.split(layout.span_lengths)), random(1, layout.num_elements, seed=1)
    assert passes._kernels(layout, spans, [rows]) is None
    monkeypatch.setattr(passes, "COMPILED_FROM", layout.num_elements)
    assert isinstance(passes._kernels(layout, spans, [rows]), CpuKernels)
    assert passes._kernels(layout, spans, [rows.double()]) is None
    assert passes._kernels(layout, [span.bfloat16() for span in spans], [rows]) is None


@dataclass
class OnGpu:
    """What passes ask of a tensor before they choose; without a GPU there is no tensor on one."""

    dtype: torch.dtype
    number: int = 0
    contiguous: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    def is_contiguous(self) -> bool:
        return self.contiguous


def test_on_a_gpu_16_bits_and_rows_in_host_memory_are_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of()
    layout.device = torch.device("cuda", 0)
    monkeypatch.setattr(passes, "_has_triton", lambda: True)

    def fit(vectors: list[Any], *tables: Any) -> bool:
        return passes._fits_on_gpu(layout, vectors, tables)

    far, near = HostRows(random(2, layout.num_elements), CPU), OnGpu(torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fit([OnGpu(dtype)], near)
    assert fit([near], OnGpu(torch.bfloat16))
    assert fit([near], far)
    assert fit([far], far)
    assert not fit([near, OnGpu(torch.bfloat16)], near)
    assert not fit([OnGpu(torch.float64)], near)
    assert not fit([OnGpu(torch.float32, contiguous=False)], near)
    for table in (OnGpu(torch.float64), OnGpu(torch.float32, number=1), random(2, layout.num_elements)):
        assert not fit([near], table)
    monkeypatch.setattr(passes, "_has_triton", lambda: False)
    assert not fit([near], near)


@pytest.mark.parametrize("layout", ["dp2-bf16", "tp2"])
def test_in_an_optimizers_step(distributed: Callable[[int], WorkerGroup], layout: str) -> None:
    """As tests/core/test_update_space.py, with compiled loops; copies of weights on several ranks stay the same bits."""
    for result in distributed(2).run("tests.core.kernel_cases:compiled_update", layout=layout):
        assert result["error"] < 5e-6
        assert result["copies_agree"]
        assert result["compiled"] == 2  # gradients, for their norm, and parameters


@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_triton_computes_the_same_and_compiles(how: str) -> None:
    """Triton decides when it is imported whether it interprets, hence a process of its own. Compiling needs no GPU."""
    ended = subprocess.run(
        [sys.executable, "-m", gpu_kernel_cases.__name__, how], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize("made", [CpuKernels, GpuKernels])
def test_a_layout_that_is_let_go_of_takes_its_tables_along(made: type[CpuKernels | GpuKernels]) -> None:
    layout = layout_of()
    passes._known[layout] = made(layout)
    told, number = weakref.ref(layout), len(passes._known)
    del layout
    gc.collect()
    assert told() is None
    assert len(passes._known) == number - 1


@pytest.mark.parametrize(("found", "is_new"), [("3.4.0", True), ("3.10.1", True), ("3.3.1", False), (None, False)])
def test_an_old_triton_is_told_of_once(
    found: str | None, is_new: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", found and SimpleNamespace(__version__=found))  # None cannot be imported
    passes._has_triton.cache_clear()
    assert [passes._has_triton(), passes._has_triton()] == [is_new, is_new]
    assert len(caplog.records) == (not is_new)
    passes._has_triton.cache_clear()


@pytest.mark.parametrize(("length", "device", "is_slow"), [(1, "cuda", True), (2, "cuda", False), (1, "cpu", False)])
def test_where_a_gpu_must_read_element_by_element_is_told(length: int, device: str, is_slow: bool) -> None:
    """A shard of so many elements more than a multiple of 64; its rows lie one behind the other."""
    layout = SegmentLayout([[Segment(2**21 + length, 0, True)]], 1, torch.device(device, 0))
    assert layout.multiple == length
    assert ("--ddp-pad-buckets-for-high-nccl-busbw" in passes.slow_reading(layout)) == is_slow


@pytest.mark.gpu
def test_what_lies_on_a_gpu_goes_through_triton() -> None:
    """As in training, where a layout's device is a gradient's."""
    rows = torch.randn(2, 3000, device="cuda")
    layout = SegmentLayout([[Segment(3000, 0, True)]], 1, rows.device)
    assert isinstance(passes._kernels(layout, [rows[0]], [rows]), GpuKernels)


def test_the_benchmark_measures_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.device("cuda")`` equals no tensor's device, and cannot be made the current one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert benchmark.with_index(torch.device("cuda")) == torch.device("cuda", 0)
    assert benchmark.with_index(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert benchmark.with_index(CPU) == CPU


@pytest.mark.gpu
def test_the_benchmark_asks_the_gpus_own_clock() -> None:
    case = benchmark.Case(elements=100_000_000, rank=2, blocks=1, basis_dtype="fp32")
    speeds = benchmark.measure(case, torch.device("cuda", 0), rounds=3, with_pytorch=False, by_device=True)
    for speed in speeds.values():  # at no more than 40 TB/s, which no memory has yet
        assert speed.device_milliseconds is not None
        assert speed.device_milliseconds > 800e6 / 40e12 * 1e3


@pytest.mark.gpu
def test_triton_on_a_gpu() -> None:
    gpu_kernel_cases.compare(torch.device("cuda"))
    gpu_kernel_cases.compare_streamed(torch.device("cuda"))
    gpu_kernel_cases.compare_parameters(torch.device("cuda"))
    gpu_kernel_cases.repeat(torch.device("cuda"))
