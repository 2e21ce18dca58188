"""Limits on code that comes with data, such as chat templates: what runs on and on, or fills the memory, is stopped."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class LimitExceeded(Exception):
    """Code within :func:`limited` took more processor time than it was given."""


@contextmanager
def limited(*, seconds: float, num_bytes: int) -> Iterator[None]:
    """Stop what runs within after ``seconds`` of this process's own processor time, or when it takes ``num_bytes`` more.

    Time is looked at between the interpreter's steps: a single step, such as a product of two huge numbers, is not
    interrupted. Threads other than the main one are limited in memory only, since signals reach the main one. Not to be
    nested.

    Raises:
        LimitExceeded: out of time.
        MemoryError: out of memory; raised by the allocation that was one too many.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitExceeded(f"it ran for more than {seconds:g} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = _address_space() + num_bytes
    if soft == resource.RLIM_INFINITY or ceiling < soft:
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, stop) if is_main else None
    try:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of virtual memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
