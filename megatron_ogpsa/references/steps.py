"""The steps at which references are refreshed, where the interval does not adapt: pure arithmetic on integers.

A basis goes stale as the weights move, and Adam moves them furthest in its first steps, where its moments have seen little.
So refreshes stand close at first, after 1, 3, 7, … steps, twice as far apart each time, until they would come near the first
multiple of the interval N, and from there on at its multiples. That is log₂ N refreshes more in a run, whatever its length
(docs/study).
"""

from __future__ import annotations

from itertools import count, takewhile

PAPERS_INTERVAL = {"sft": 30, "dpo": 5}
"""N of each stage (arXiv:2602.07892), and its default here."""


def next_refresh(step: int, interval: int, *, early: bool) -> int:
    """The first step after ``step`` that begins with a refresh.

    It follows from the step alone, so that a resumed run agrees with an undisturbed one.

    Args:
        step: steps already taken, from 0.
        interval: N, in optimizer steps.
        early: those of :func:`early_refreshes` as well.
    """
    doubled = (1 << (step + 1).bit_length()) - 1
    return doubled if early and _is_early(doubled, interval) else (step // interval + 1) * interval


def early_refreshes(interval: int) -> list[int]:
    """Steps 2^j − 1 in the first three quarters of the interval, the start left out; for 30: 1, 3, 7, 15."""
    return list(takewhile(lambda step: _is_early(step, interval), (2**j - 1 for j in count(1))))


def _is_early(step: int, interval: int) -> bool:
    return 4 * step < 3 * interval
