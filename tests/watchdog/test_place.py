"""Where a thread stands, of threads that stand there."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_ogpsa.watchdog.place import (
    Place,
    fingerprint,
    oldest_in_flight,
    place_of,
    thread_stack,
    traceback_stack,
)
from megatron_ogpsa.watchdog.standing import LONGEST_GAP, Standing

_release = threading.Lock()


class Handle:
    """As torch's ``Work``, whose ``wait`` has no Python frame: a builtin that blocks."""

    wait = staticmethod(_release.acquire)


def compute() -> None:
    _release.acquire()


def wait_for_handle() -> None:
    handle = Handle()
    handle.wait()


def wait_for_handle_in_three_lines() -> None:
    handle = Handle()
    handle.wait(
        True,
    )


def meet() -> None:
    dist.barrier()


def meet_in_vain() -> None:
    with suppress(Exception):
        dist.barrier()


@contextmanager
def standing_in(function: Callable[[], None]) -> Iterator[int]:
    """The id of a thread that stands still within ``function``."""
    thread = threading.Thread(target=function)
    _release.acquire()
    thread.start()
    try:
        assert thread.ident is not None
        _wait_until_still(thread.ident, function)
        yield thread.ident
    finally:
        _release.release()
        thread.join()
        _release.release()


def _wait_until_still(thread: int, function: Callable[[], None]) -> None:
    """Until a thread has come as far as it comes in ``function``."""
    before: object = None
    while True:
        stack = thread_stack(thread)
        if any(spot.code is function.__code__ for spot in stack) and stack == before:
            return
        before = stack
        time.sleep(0.05)


def line_of(function: Callable[[], None], offset: int) -> str:
    return f"tests/watchdog/test_place.py:{function.__code__.co_firstlineno + offset}"


CASES = {
    "computes": (compute, lambda: Place(line_of(compute, 1))),
    "waits for a handle": (wait_for_handle, lambda: Place(line_of(wait_for_handle, 2), "handle.wait()")),
    "waits for a handle, over lines": (
        wait_for_handle_in_three_lines,
        lambda: Place(line_of(wait_for_handle_in_three_lines, 2), "handle.wait()"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_place(case: str) -> None:
    function, expected = CASES[case]
    with standing_in(function) as thread:
        assert place_of(thread_stack(thread)) == expected()


def test_a_collective_is_named_by_the_function_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by what it calls within torch, nor by torch's own wrapper around it."""
    monkeypatch.setattr(distributed_c10d, "is_initialized", _release.acquire)
    with standing_in(meet_in_vain) as thread:
        stack = thread_stack(thread)
        assert sum(spot.module == distributed_c10d.__name__ for spot in stack) > 1  # barrier, and what it has called
        assert place_of(stack) == Place(line_of(meet_in_vain, 2), "barrier")


def test_a_traceback_has_the_place_where_it_was_raised() -> None:
    with pytest.raises(ValueError, match="Default process group") as raised:
        meet()
    assert place_of(traceback_stack(raised.tb)) == Place(line_of(meet, 1), "barrier")


def test_a_fingerprint_stays_while_a_thread_stands_still() -> None:
    with standing_in(compute) as thread:
        first = fingerprint(thread_stack(thread))
        assert fingerprint(thread_stack(thread)) == first
    with standing_in(wait_for_handle) as thread:
        assert fingerprint(thread_stack(thread)) != first


def test_no_frame_is_kept() -> None:
    """A frame holds its locals: activations, in a forward pass."""

    class Activations:
        pass

    held: list[weakref.ref[Activations]] = []

    def forward() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        _release.acquire()

    gc.disable()
    try:
        with standing_in(forward) as thread:
            stack = thread_stack(thread)
            assert held[0]() is not None
        assert held[0]() is None
    finally:
        gc.enable()
    assert "forward" in [spot.code.co_name for spot in stack]


def test_an_ended_thread_stands_nowhere() -> None:
    assert place_of(thread_stack(-1)).collective is None


def test_the_oldest_collective_of_the_flight_recorder() -> None:
    """In the form that torch 2.14 writes (shortened)."""
    entries = [
        {"record_id": 2, "profiling_name": "nccl:all_gather", "state": "scheduled", "retired": False},
        {"record_id": 1, "profiling_name": "nccl:all_reduce", "state": "started", "retired": False},
        {"record_id": 0, "profiling_name": "nccl:broadcast", "state": "completed", "retired": True},
    ]
    assert oldest_in_flight(json.dumps({"version": "2.10", "entries": entries})) == "nccl:all_reduce"
    assert oldest_in_flight(json.dumps({"version": "2.10", "entries": entries[2:]})) is None
    assert oldest_in_flight(b'{"version": "2.10", "pg_status": {}}') is None


def test_standing_counts_what_has_not_changed() -> None:
    standing = Standing(100.0)
    assert standing.observe("a", 101.0) == 0
    assert standing.observe("a", 102.0) == 1
    assert standing.observe("a", 103.5) == 2.5
    assert standing.observe("b", 104.0) == 0
    assert standing.observe("b", 104.5) == 0.5


def test_time_in_which_the_watch_was_stopped_itself_does_not_count() -> None:
    """A job that was suspended, and goes on after an hour, does not hang."""
    standing = Standing(0.0)
    standing.observe("a", 1.0)
    assert standing.observe("a", 3601.0) == LONGEST_GAP
