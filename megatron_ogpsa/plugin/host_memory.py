"""Page-locked host memory of the size that is asked for, which serves again once it is let go of.

PyTorch's own allocator (``CachingHostAllocator``) rounds up to a power of two, so that a basis of 33 GB would take 64, and
keeps it. Here the pages of an anonymous mapping are registered with CUDA (``cudaHostRegister``), which takes a second for two
gigabytes: at each refresh it would be felt, hence memory that is free again is kept for the next one that fits. What does not
fit is given back first, so that there is never more than was in use at once.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

_WASTE = 1.25
"""How much larger than what is asked for memory may be that serves again."""


@dataclass
class HostMemory:
    """Memory for one device.

    Attributes:
        register: have the device's driver lock pages: (address, bytes).
        unregister: the opposite: (address).
        wait: until the device has done what was queued, and reads and writes no memory that was let go of.
    """

    register: Callable[[int, int], None]
    unregister: Callable[[int], None]
    wait: Callable[[], None]
    _free: list[mmap.mmap] = field(default_factory=list)

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [``num_bytes``], whose memory comes back when no tensor has it any more.

        Raises:
            RuntimeError: the memory cannot be had, or not be locked, which this rank may be alone with.
        """
        mapping = self._fitting(num_bytes) or self._new(num_bytes)
        view = memoryview(mapping)
        weakref.finalize(view, self._free.append, mapping).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8, count=num_bytes)  # which holds on to ``view``

    def _fitting(self, num_bytes: int) -> mmap.mmap | None:
        if self._free:
            self.wait()
        for mapping in sorted(self._free, key=len):
            if num_bytes <= len(mapping) <= _WASTE * num_bytes:
                self._free.remove(mapping)
                return mapping
        while self._free:
            self.unregister(_address(self._free.pop()))
        return None

    def _new(self, num_bytes: int) -> mmap.mmap:
        try:
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # After a fork a page that is written moves away from under the device.
            mapping.madvise(mmap.MADV_DONTFORK)
            self.register(_address(mapping), num_bytes)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"--ogpsa-basis-device cpu: {num_bytes / 1e9:.1f} GB of host memory cannot be had and locked ({error}): "
                "use --ogpsa-basis-dtype bf16, fewer references, or a node with more memory"
            ) from None
        return mapping


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@cache
def of_device(device: torch.device) -> HostMemory:
    """The memory that copies to and from a CUDA device do without the host."""

    def register(address: int, num_bytes: int) -> None:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)))

    def unregister(address: int) -> None:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))

    def wait() -> None:
        torch.cuda.synchronize(device)

    return HostMemory(register, unregister, wait)
