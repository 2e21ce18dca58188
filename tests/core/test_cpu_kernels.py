"""How the compiled passes on CPU are called: with what, on which thread, and by one process at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from megatron_ogpsa.projection import cpu_kernels
from megatron_ogpsa.projection.cpu_kernels import CpuKernels
from megatron_ogpsa.projection.segments import Segment, SegmentLayout, gram_and_dots, subtract_combination
from tests.core.test_kernels import CPU, NUM_BLOCKS, SPANS, layout_of, random


def test_spans_lie_where_the_layout_has_them_in_the_basis() -> None:
    """In any order and with columns in between that belong to none; one is empty."""
    spans = [SPANS[0], [], SPANS[1]]
    layout = SegmentLayout(spans, NUM_BLOCKS, CPU, columns=[9200, 5, 50], num_columns=80_300)
    rows, kernels = random(5, 80_300), CpuKernels(layout)
    vectors = [random(length, seed=1) for length in layout.span_lengths]
    close = {"rtol": 1e-13, "atol": 1e-10}  # as above
    torch.testing.assert_close(kernels.dots(vectors, rows), gram_and_dots(layout, rows, vectors), **close)
    weights, expected = random(NUM_BLOCKS, 5, seed=2).double(), [vector.clone() for vector in vectors]
    subtract_combination(layout, expected, rows, weights)
    kernels.subtract(vectors, rows, weights)
    assert all(torch.equal(one, two) for one, two in zip(vectors, expected, strict=True))


def test_kernels_get_what_they_were_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of arrays with gaps there would be machine code of its own, compiled beside other processes."""
    layout, work = layout_of(), []
    rows, spans = random(2, layout.num_elements), list(random(layout.num_elements).split(layout.span_lengths))
    monkeypatch.setattr(cpu_kernels, "_run", lambda _kernel, calls: work.extend(calls))
    kernels, weights = CpuKernels(layout), random(2, 2, NUM_BLOCKS).double().permute(2, 1, 0)
    kernels.subtract(spans, rows, weights[..., 0])
    kernels.combine(rows, weights, rows)
    assert all(array.flags.c_contiguous for arguments in work for array in arguments)


WRONG_SPANS = {
    "missing": [torch.zeros(71_041)],
    "short": [torch.zeros(71_041), torch.zeros(9097)],
    "one more": [torch.zeros(71_041), torch.zeros(9098), torch.zeros(0)],
    "bf16": [torch.zeros(71_041), torch.zeros(9098, dtype=torch.bfloat16)],
    "with gaps": [torch.zeros(71_041), torch.zeros(2 * 9098)[::2]],
    "elsewhere": [torch.zeros(71_041), torch.zeros(9098, device="meta")],
}
WRONG_ROWS = {
    "short": torch.zeros(1, 80_138),
    "with gaps": torch.zeros(1, 2 * 80_139)[:, ::2],
    "elsewhere": torch.zeros(1, 80_139, device="meta"),
}


@pytest.mark.parametrize("spans", WRONG_SPANS.values(), ids=WRONG_SPANS.keys())
def test_nothing_is_read_beyond_a_span(spans: list[Tensor]) -> None:
    layout = layout_of()
    kernels, rows = CpuKernels(layout), random(1, layout.num_elements)
    with pytest.raises(ValueError, match=r"spans of .* a layout of spans of|spans must be"):
        kernels.dots(spans, rows)
    with pytest.raises(ValueError, match=r"spans of .* a layout of spans of|spans must be"):
        kernels.subtract(spans, rows, torch.zeros(NUM_BLOCKS, 1, dtype=torch.float64))


@pytest.mark.parametrize("rows", WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_nothing_is_read_beyond_rows(rows: Tensor) -> None:
    layout = layout_of()
    kernels, right = CpuKernels(layout), random(1, layout.num_elements)
    spans, weights = list(right[0].split(layout.span_lengths)), torch.zeros(NUM_BLOCKS, 1, 1, dtype=torch.float64)
    for work in (
        lambda: kernels.dots(spans, rows),
        lambda: kernels.subtract(spans, rows, weights[..., 0]),
        lambda: kernels.gram(rows),
        lambda: kernels.products(right, rows),
        lambda: kernels.products(rows, right),
        lambda: kernels.combine(right, weights, rows),
        lambda: kernels.combine(rows, weights, right),
    ):
        with pytest.raises(ValueError, match="rows must be contiguous, on CPU and 80139 elements long"):
            work()


def test_a_pass_is_one_call_for_each_thread(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many spans there are, with as many elements each, and room of its own to work in."""
    layout = SegmentLayout([[Segment(10, 0, True)]] * 1000 + [[Segment(90_000, 0, True)]], 1, CPU)
    rows, spans = random(2, layout.num_elements), list(random(layout.num_elements).split(layout.span_lengths))
    kernels, calls = CpuKernels(layout), []
    monkeypatch.setattr(cpu_kernels, "_run", lambda _kernel, work: calls.append(work))
    for number in (1, 2):
        threads(number)
        kernels.dots(spans, rows)
        kernels.subtract(spans, rows, torch.zeros(1, 2, dtype=torch.float64))
        kernels.combine(rows, torch.zeros(1, 2, 2, dtype=torch.float64), rows)
    assert [len(work) for work in calls] == [1, 1, 1, 2, 2, 2]
    lengths = [int(sum(arguments[2])) for arguments in calls[3]]  # of dots
    assert sum(lengths) == layout.num_elements
    assert max(lengths) - min(lengths) <= 2 * cpu_kernels.LONGEST_PIECE
    for first, second in calls[4:]:
        assert first[-1] is not second[-1]
        assert not np.shares_memory(first[-1], second[-1])


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """That of a process which has not compiled yet, though the kernels are loaded."""
    layout = layout_of()
    CpuKernels(layout).dots([random(size) for size in layout.span_lengths], random(1, layout.num_elements))
    monkeypatch.setattr(cpu_kernels, "_ready", set())
    monkeypatch.setattr(cpu_kernels, "KEEPS_CODE", True)
    monkeypatch.setattr(cpu_kernels, "_LOCK", tmp_path / "code/lock")
    (tmp_path / "code").mkdir()
    return tmp_path / "code/lock"


def test_processes_compile_one_after_the_other(lock: Path) -> None:
    """Numba's index of machine code has no lock: one's code could be kept under the name of the other's."""
    layout, done = layout_of(), list[Tensor]()
    spans = [random(size) for size in layout.span_lengths]
    compiles = threading.Thread(
        target=lambda: done.append(CpuKernels(layout).dots(spans, random(1, layout.num_elements)))
    )
    with FileLock(lock):
        compiles.start()
        compiles.join(0.5)
        assert not done
    compiles.join()
    assert done[0].shape == (NUM_BLOCKS, 2)


@pytest.mark.parametrize("trouble", ["it is held for too long", "it is a folder", "its folder cannot be made"])
def test_a_lock_that_is_not_to_be_had_keeps_nobody_from_compiling(
    lock: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(cpu_kernels, "LOCK_SECONDS", 0.1)
    held = FileLock(lock)
    if trouble == "it is held for too long":
        held.acquire()
    elif trouble == "it is a folder":
        lock.mkdir()
    else:
        monkeypatch.setattr(cpu_kernels, "_LOCK", lock / "of/folders/that/are/not/there")
    layout = layout_of()
    spans = [random(size) for size in layout.span_lengths]
    assert CpuKernels(layout).dots(spans, random(1, layout.num_elements)).shape == (NUM_BLOCKS, 2)
    held.release()
