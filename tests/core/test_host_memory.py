"""Page-locked memory of exact size: it serves again, never while a tensor has it, and is never more than was in use."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import pytest
import torch

from megatron_ogpsa.plugin import host_memory
from megatron_ogpsa.plugin.host_memory import HostMemory
from megatron_ogpsa.plugin.streaming import host_rows


@dataclass
class Driver:
    """Notes what is locked."""

    locked: dict[int, int] = field(default_factory=dict)
    waits: int = 0
    limit: int = 2**40

    def register(self, address: int, num_bytes: int) -> None:
        if sum(self.locked.values()) + num_bytes > self.limit:
            raise RuntimeError("out of memory")
        self.locked[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.locked[address]

    def wait(self) -> None:
        self.waits += 1

    def memory(self) -> HostMemory:
        return HostMemory(self.register, self.unregister, self.wait)


def test_memory_has_the_size_that_is_asked_for() -> None:
    driver = Driver()
    rows = driver.memory().take(5_000_000)
    rows.fill_(7)
    assert driver.locked == {rows.data_ptr(): 5_000_000}
    assert rows.shape == (5_000_000,)


def test_memory_serves_again_once_no_view_has_it() -> None:
    driver = Driver()
    memory = driver.memory()
    rows = memory.take(4000)
    first, view = rows.data_ptr(), rows.view(torch.float32)[:10]
    del rows
    other = memory.take(4000)
    assert other.data_ptr() != first
    assert driver.waits == 0
    del view
    gc.collect()
    assert memory.take(3900).data_ptr() == first
    assert driver.waits == 1  # what was queued may still read it
    assert len(driver.locked) == 2


def test_memory_that_does_not_fit_is_given_back_first() -> None:
    driver = Driver(limit=10_000)
    memory = driver.memory()
    for num_bytes in (6000, 9000, 1000, 10_000):
        assert memory.take(num_bytes).shape == (num_bytes,)
        assert [*driver.locked.values()] == [num_bytes]


def test_memory_that_cannot_be_locked_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"--ogpsa-basis-device cpu: 0\.0 GB .* \(out of memory\): use"):
        Driver(limit=10).memory().take(4000)


@pytest.mark.gpu
def test_rows_for_a_gpu_are_page_locked() -> None:
    device = torch.device("cuda", 0)
    rows = host_rows(3, 1_000_001, torch.bfloat16, device)
    rows.fill_(2.0)
    assert rows.is_pinned()
    assert rows[1:].is_pinned()
    near = torch.empty_like(rows, device=device)
    near.copy_(rows, non_blocking=True)
    assert bool((near == 2.0).all())
    address = rows.data_ptr()
    del rows
    assert host_rows(3, 1_000_001, torch.bfloat16, device).data_ptr() == address
    assert len(host_memory.of_device(device)._free) == 1
