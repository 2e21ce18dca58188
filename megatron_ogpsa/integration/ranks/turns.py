"""Work that a few ranks do for all, while the others wait outside of any collective: it may take hours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_ogpsa.integration.ranks.agreement import agreed
from megatron_ogpsa.watchdog import progress

POLL_SECONDS = 0.2
LONGEST_POLL_SECONDS = 2.0
BEAT_SECONDS = 5.0
"""From one sign of life of a rank that works to the next."""

SILENT_SECONDS = 120.0
"""A rank that has given none for so long is frozen or lost."""

_numbers = count()  # of calls, the same on all ranks: part of every key


def done_by[T](workers: Collection[int], action: Callable[[], T], what: str) -> T | None:
    """Run ``action`` on the ranks ``workers``; every rank must make the call, and goes on when all of them are done.

    A collective has a time limit, and whoever stands in one for long is taken for hanging: the others look into the job's
    store now and then instead. ``action`` must not communicate.

    Args:
        what: is done, for the watch over hangs and for messages.

    Returns:
        what ``action`` gave; None on the other ranks.

    Raises:
        UserError, RuntimeError: as :func:`agreed`, on all ranks alike; or a worker gives no sign of life any more.
    """
    turn = _Turn(what)
    results: list[T] = []
    failures: list[Exception] = []
    with progress.during(what):
        if dist.get_rank() in workers:
            with turn.at_work():
                try:
                    results.append(action())
                except Exception as error:  # whatever it is, all ranks are to raise it
                    failures.append(error)
        turn.wait_for(workers)

    def outcome() -> T | None:
        for failure in failures:
            raise failure
        return results[0] if results else None

    return agreed(outcome)


def told_by_rank_0[T](action: Callable[[], T], what: str) -> T:
    """As :func:`done_by` of rank 0; every rank gets what it found, which must be fit to be pickled."""
    box: list[Any] = [done_by([0], action, what)]
    dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


class _Turn:
    """One call's keys in the store of the default process group, which lives as long as its ranks do."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._store = _get_default_store()
        self._prefix = f"megatron-ogpsa-turn/{next(_numbers)}"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """This rank gives signs of life within the with statement, and says at its end that it is done."""
        stop = threading.Event()
        beats, done = self._keys(dist.get_rank())

        def beat() -> None:
            while not stop.wait(BEAT_SECONDS):
                self._store.add(beats, 1)

        thread = threading.Thread(target=beat, name="ogpsa-turn", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        self._store.set(done, "")

    def wait_for(self, workers: Collection[int]) -> None:
        """Until all of them are done. Raises RuntimeError if one is lost."""
        heard: dict[int, tuple[int, float]] = dict.fromkeys(workers, (-1, 0.0))
        pause = POLL_SECONDS
        try:
            while heard := {rank: last for rank, last in heard.items() if not self._is_done(rank)}:
                for rank, (before, since) in heard.items():
                    number, now = int(self._store.add(self._keys(rank)[0], 0)), time.monotonic()
                    if number != before:
                        heard[rank] = number, now
                    elif now - since > SILENT_SECONDS:
                        raise RuntimeError(
                            f"rank {rank} has given no sign of life for {now - since:.0f} s while the others wait for it "
                            f"({self._what}): it is frozen or lost"
                        )
                progress.pulse()
                time.sleep(pause)
                pause = min(1.5 * pause, LONGEST_POLL_SECONDS)
        except dist.DistError as error:
            raise RuntimeError(f"the job's store was lost while this rank waited ({self._what}): {error}") from error

    def _is_done(self, rank: int) -> bool:
        return bool(self._store.check([self._keys(rank)[1]]))

    def _keys(self, rank: int) -> tuple[str, str]:
        return f"{self._prefix}/{rank}/beats", f"{self._prefix}/{rank}/done"
