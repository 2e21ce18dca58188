"""A basis in host memory, brought to the accelerator tile by tile while it computes.

Rows lie in page-locked memory. A pass over a layout's tiles finds each tile in one of :data:`NUM_BUFFERS` staging buffers
on the accelerator: while one is computed with, the next is being filled by a stream of its own. When a pass ends, the
first tiles of the next one set out, so that they travel during the forward and backward passes before the optimizer's
step, or during the all-reduce within it.

```
compute   ── tile 0 ──┬── tile 1 ──┬── tile 2 ── …  ── last ──┬── forward, backward ──┬── tile 0 of the next pass
copies    1 ──────────┴─ 2 ────────┴─ 3 ─────── …             └─ 0, 1 ────────────────┘
```

Bound: K · T · b · :data:`NUM_BUFFERS` bytes on the accelerator, T being the longest tile
(:class:`megatron_ogpsa.projection.segments.TileLimits`) and b the bytes of an element as it is stored; it does not grow
with the model. During a refresh the reference gradients and the basis in use stream at once, each with buffers of its own.

A buffer is written only after what was queued to read it: the copy waits for an event that the computing stream records
when the reader asks for its next tile, or, the first time, when the buffer is allocated, since its memory may have been
another tensor's. It is read only after the copy: the computing stream waits for an event behind that. Nothing waits on
the host. Without an accelerator the same code runs with copies that are done at once.

Shape legend: K = basis vectors, N = elements of this rank's shard, T = elements of a tile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ogpsa.plugin import host_memory
from megatron_ogpsa.projection.segments import SegmentLayout, Tile

NUM_BUFFERS = 2
"""One to compute with, one to fill. More would not help: copies follow each other on one bus."""


class Lane(Protocol):
    """How copies go beside the computation. A mark is a point in the work of either; what it is, is the lane's affair."""

    def adopt(self, buffer: Tensor) -> None:
        """Keep the memory of ``buffer`` from being given to others while copies into it are under way."""

    def computed(self) -> Any:
        """A mark behind all computation that has been queued."""

    def send(self, target: Tensor, source: Tensor, *, after: Any) -> Any:
        """Copy once ``after`` is reached; a mark behind the copy. Both are [K, T]; rows lie apart."""

    def await_copy(self, mark: Any) -> None:
        """Let the computation that is queued from now on wait for a copy."""


class DirectLane:
    """Copies on the host, done when ``send`` returns."""

    def adopt(self, buffer: Tensor) -> None:
        """Nothing: no copy outlives its call."""

    def computed(self) -> None:
        """Nothing is ever queued."""

    def send(self, target: Tensor, source: Tensor, *, after: None) -> None:
        """Copy now."""
        target.copy_(source)

    def await_copy(self, mark: None) -> None:
        """Nothing to wait for."""


class StreamLane:
    """Copies on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def adopt(self, buffer: Tensor) -> None:
        """Tell the caching allocator of the second stream."""
        buffer.record_stream(self._stream)

    def computed(self) -> torch.cuda.Event:
        """An event on the stream that computes now."""
        return self._event(torch.cuda.current_stream(self._device))

    def send(self, target: Tensor, source: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """Row by row: only contiguous runs of page-locked memory are copied without the host."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target_T, source_T in zip(target, source, strict=True):
                target_T.copy_(source_T, non_blocking=True)
        return self._event(self._stream)

    def await_copy(self, mark: torch.cuda.Event) -> None:
        """On the stream that computes now."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    @staticmethod
    def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


@dataclass
class _Buffer:
    """A staging buffer, [K, longest tile], and the mark behind the last work on it."""

    rows_KT: Tensor
    mark: Any


class HostRows:
    """K vectors over a shard in host memory, for passes on ``device``.

    Values may be written during a pass, each tile's after it was yielded, and before the first pass; not in between, when
    the first tiles may have been fetched already.

    Args:
        rows_KN: in the dtype of storage, from :func:`host_rows`.
        device: where passes compute.
        lane: by default what suits the device.
    """

    def __init__(self, rows_KN: Tensor, device: torch.device, lane: Lane | None = None) -> None:
        self.rows_KN = rows_KN
        self._device = device
        self._lane: Lane = lane or (StreamLane(device) if device.type == "cuda" else DirectLane())
        self._free: deque[_Buffer] = deque()
        self._fetched: deque[tuple[slice, _Buffer]] = deque()
        self._has_buffers = False

    @property
    def shape(self) -> torch.Size:
        """[K, N]."""
        return self.rows_KN.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of storage."""
        return self.rows_KN.dtype

    @property
    def nbytes(self) -> int:
        """Of the rows, in host memory."""
        return self.rows_KN.nbytes

    @property
    def staging_bytes(self) -> int:
        """Of the buffers on the device; zero before the first pass."""
        return sum(buffer.rows_KT.nbytes for buffer in [*self._free, *(buffer for _, buffer in self._fetched)])

    def tiles(self, layout: SegmentLayout) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile of ``layout`` in order, with its columns of the rows on the device, [K, T], in the dtype of storage.

        What is yielded holds until the next one is asked for.
        """
        self._allocate(layout)
        self._begin(layout.tiles)
        for index, tile in enumerate(layout.tiles):
            _, buffer = self._fetched.popleft()
            self._lane.await_copy(buffer.mark)
            try:
                yield tile, buffer.rows_KT[:, : tile.stop - tile.start]
            finally:
                buffer.mark = self._lane.computed()
                self._free.append(buffer)
            self._fetch(layout.tiles[index + NUM_BUFFERS : index + NUM_BUFFERS + 1])
        self._fetch(layout.tiles[:NUM_BUFFERS])

    def _allocate(self, layout: SegmentLayout) -> None:
        if self._has_buffers:
            return
        self._has_buffers = True
        longest = min(layout.limits.tile, self.shape[1])
        for _ in range(NUM_BUFFERS):
            rows_KT = torch.empty(self.shape[0], longest, dtype=self.rows_KN.dtype, device=self._device)
            self._lane.adopt(rows_KT)
            self._free.append(_Buffer(rows_KT, self._lane.computed()))

    def _begin(self, tiles: Sequence[Tile]) -> None:
        """Have the first tiles under way: those that the last pass sent for, or others if this layout has others."""
        wanted = [tile.columns for tile in tiles[:NUM_BUFFERS]]
        if [columns for columns, _ in self._fetched] != wanted:
            self._free.extend(buffer for _, buffer in self._fetched)  # a copy into one goes behind the one under way
            self._fetched.clear()
            self._fetch(tiles[:NUM_BUFFERS])

    def _fetch(self, tiles: Sequence[Tile]) -> None:
        for tile in tiles:
            buffer = self._free.popleft()
            target_KT = buffer.rows_KT[:, : tile.stop - tile.start]
            buffer.mark = self._lane.send(target_KT, self.rows_KN[:, tile.columns], after=buffer.mark)
            self._fetched.append((tile.columns, buffer))


def host_rows(num_rows: int, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for rows that stream to ``device``: page-locked where that is an accelerator.

    Raises:
        RuntimeError: the memory cannot be had, or not be locked.
    """
    num_bytes = num_rows * num_elements * dtype.itemsize
    if device.type != "cuda" or not num_bytes:
        return torch.empty(num_rows, num_elements, dtype=dtype)
    return host_memory.of_device(device).take(num_bytes).view(dtype).view(num_rows, num_elements)
