"""How long a thread has stood still, as seen by one that looks now and then."""

from __future__ import annotations

from collections.abc import Hashable

LONGEST_GAP = 5.0
"""Seconds. If the watch itself was not run for longer, as when the whole job was suspended, only this much counts."""


class Standing:
    """Attributes: seconds: that what was observed has not changed."""

    def __init__(self, now: float) -> None:
        """``now``: of any clock in seconds, also in what follows."""
        self.seconds = 0.0
        self._seen_at = now
        self._mark: Hashable = None

    def observe(self, mark: Hashable, now: float) -> float:
        """Take in what stands for the thread's state now; returns :attr:`seconds`."""
        self.seconds = self.seconds + min(now - self._seen_at, LONGEST_GAP) if mark == self._mark else 0.0
        self._mark, self._seen_at = mark, now
        return self.seconds
