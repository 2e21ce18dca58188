"""A basis in host memory: the same sums as beside the gradient, in a bounded number of buffers, none overwritten early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ogpsa.plugin.streaming import NUM_BUFFERS, HostRows, host_rows
from megatron_ogpsa.projection.segments import (
    Rows,
    Segment,
    SegmentLayout,
    TileLimits,
    combine_rows,
    cross_products,
    gram_and_dots,
    subtract_combination,
)
from tests.core.test_projection import CPU, LIMITS, NUM_BLOCKS, SPANS, layout_of, random
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
SMALL = LIMITS[1]


def a_step(layout: SegmentLayout, rows: Rows, others: Rows, out_KN: Tensor) -> list[Tensor]:
    """All that the plugin does with rows, in its order; ``rows`` are combined in place."""
    gradient_N = random(layout.num_elements, seed=9).to(layout.device)
    spans = list(gradient_N.split(layout.span_lengths))
    weights_BKK = random(NUM_BLOCKS, 2, 2, seed=8).double().to(layout.device)
    results = [gram_and_dots(layout, rows), cross_products(layout, rows, others), gram_and_dots(layout, rows, spans)]
    combine_rows(layout, rows, weights_BKK, out_KN)
    dots = gram_and_dots(layout, rows, spans)
    subtract_combination(layout, spans, rows, dots[:, :-1])
    return [*results, out_KN.clone(), dots, gradient_N]


def differ(device: torch.device, dtype: torch.dtype, limits: TileLimits) -> list[bool]:
    """Whether each result depends on where the rows lie."""
    layout = SegmentLayout(SPANS, NUM_BLOCKS, device, limits)
    rows_KN, others_KN = (random(2, layout.num_elements, seed=seed).to(dtype) for seed in (1, 2))
    near = rows_KN.clone().to(device)
    expected = a_step(layout, near, others_KN.to(device), near)
    far = [host_rows(2, layout.num_elements, dtype, device).copy_(rows) for rows in (rows_KN, others_KN)]
    actual = a_step(layout, HostRows(far[0], device), HostRows(far[1], device), far[0])
    return [not torch.equal(one.cpu(), other.cpu()) for one, other in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_the_host_give_the_same_bits(dtype: torch.dtype, limits: TileLimits) -> None:
    assert differ(CPU, dtype, limits) == [False] * 6


@dataclass
class Event:
    has_happened: bool = False


@dataclass
class SimulatedDevice:
    """Two queues of work, computation and copies, of which one is always ahead of the other as far as events let it."""

    computation: list[Event | Callable[[], Any]] = field(default_factory=list)
    copies: list[Event | Callable[[], Any]] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)
    adopted: list[Tensor] = field(default_factory=list)

    def adopt(self, buffer: Tensor) -> None:
        self.adopted.append(buffer)

    def computed(self) -> Event:
        return self._recorded(self.computation)

    def send(self, target: Tensor, source: Tensor, *, after: Event) -> Event:
        self.sent.append(source)
        self.copies += [after, lambda: target.copy_(source)]
        return self._recorded(self.copies)

    def await_copy(self, mark: Event) -> None:
        self.computation.append(mark)

    @staticmethod
    def _recorded(queue: list[Event | Callable[[], Any]]) -> Event:
        event = Event()
        queue.append(lambda: setattr(event, "has_happened", True))
        return event

    def run(self, *, copies_first: bool) -> None:
        queues = [self.copies, self.computation] if copies_first else [self.computation, self.copies]
        while any(queues):
            advanced = next((queue for queue in queues if queue and self._is_ready(queue[0])), None)
            assert advanced is not None, "each queue waits for the other"
            if callable(work := advanced.pop(0)):
                work()

    @staticmethod
    def _is_ready(work: Event | Callable[[], Any]) -> bool:
        return callable(work) or work.has_happened


def queued_reads(device: SimulatedDevice, rows: HostRows, layout: SegmentLayout, read: list[Tensor]) -> Iterator[int]:
    """A pass whose reads are queued, as kernels are; yields the address of each tile's buffer."""
    for _, rows_KT in rows.tiles(layout):
        device.computation.append(lambda rows_KT=rows_KT: read.append(rows_KT.clone()))
        yield rows_KT.data_ptr()


@pytest.mark.parametrize("copies_first", [True, False])
def test_no_buffer_is_overwritten_early_or_read_early(*, copies_first: bool) -> None:
    layout, device, read = layout_of(SMALL), SimulatedDevice(), []
    rows = HostRows(random(2, layout.num_elements), CPU, device)
    buffers = {address for _ in range(3) for address in queued_reads(device, rows, layout, read)}
    device.run(copies_first=copies_first)
    assert len(buffers) == NUM_BUFFERS
    expected = [rows.rows_KN[:, tile.columns] for _ in range(3) for tile in layout.tiles]
    assert len(read) == len(expected) > 3 * 20
    assert all(map(torch.equal, read, expected))


def test_first_tiles_of_the_next_pass_are_under_way_and_are_not_sent_again() -> None:
    layout, device = layout_of(SMALL), SimulatedDevice()
    rows = HostRows(random(2, layout.num_elements), CPU, device)
    num_tiles = len(layout.tiles)
    for number in (1, 2):
        sent_before = [len(device.sent) for _ in rows.tiles(layout)]
        assert len(device.sent) == number * num_tiles + NUM_BUFFERS
        # While a tile is computed with, the next one is on its way, and no more.
        sent_in_time = [(number - 1) * num_tiles + min(index + NUM_BUFFERS, num_tiles) for index in range(num_tiles)]
        assert sent_before == sent_in_time


def test_another_layout_or_a_pass_that_breaks_off_does_not_confuse_the_next() -> None:
    rows_KN = random(2, layout_of().num_elements)
    rows = HostRows(rows_KN, CPU)
    assert len(list(rows.tiles(layout_of()))) == len(layout_of().tiles)
    for limits in (SMALL, TileLimits(tile=256, short=64)):
        next(iter(rows.tiles(layout_of(limits))))
        found = [(tile.columns, tile_KT.clone()) for tile, tile_KT in rows.tiles(layout_of(limits))]
        assert all(torch.equal(tile_KT, rows_KN[:, columns]) for columns, tile_KT in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staging_does_not_grow_with_the_model(dtype: torch.dtype) -> None:
    for length in (10 * SMALL.tile, 100 * SMALL.tile):
        layout = SegmentLayout([[Segment(length, 0, counted=True)]], 1, CPU, SMALL)
        rows = HostRows(torch.zeros(3, length, dtype=dtype), CPU)
        gram_and_dots(layout, rows)
        assert rows.staging_bytes == NUM_BUFFERS * 3 * SMALL.tile * dtype.itemsize


@pytest.mark.parametrize(("layout", "space"), [("dp2", "gradient"), ("tp2", "update")])
def test_training_with_the_basis_on_the_host_is_bitwise_the_same(
    distributed: Distributed, layout: str, space: str
) -> None:
    for result in distributed(2).run("tests.core.streaming_cases:on_host_and_beside", layout=layout, space=space):
        assert result == {"fp32": True, "bf16": True, "dtypes_differ": True, "is_on_host": True}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_the_host_give_the_same_bits_on_a_gpu(dtype: torch.dtype) -> None:
    for limits in LIMITS:
        assert differ(torch.device("cuda"), dtype, limits) == [False] * 6


@pytest.mark.gpu
def test_copies_overlap_with_computation_on_a_gpu() -> None:
    """A pass, with computation of its own before it, takes less than copies and computation one after the other."""
    device = torch.device("cuda")
    layout = SegmentLayout([[Segment(2**28, 0, counted=True)]], 1, device)
    rows = HostRows(host_rows(2, 2**28, torch.float32, device).zero_(), device)
    left_MM = torch.zeros(4096, 4096, device=device)  # squared in about the time that a tile takes to arrive

    def seconds(*, copying: bool, computing: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for tile in rows.tiles(layout) if copying else layout.tiles:
            assert tile is not None
            if computing:
                left_MM @ left_MM
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    seconds(copying=True, computing=True)
    both, copies, computation = (
        min(seconds(copying=a, computing=b) for _ in range(3)) for a, b in ((True, True), (True, False), (False, True))
    )
    print(f"copies {copies:.3f} s, computation {computation:.3f} s, both {both:.3f} s")
    # Half of what could be hidden; all but one tile of sixteen can be.
    assert both < copies + computation - 0.5 * min(copies, computation)
