"""The steps at which references are refreshed, where the interval does not adapt: pure arithmetic on integers.

A basis goes stale as the weights move, and they move furthest in the first steps, where Adam's moments have seen little and
the rate rises. So refreshes stand close at first: after 1, 2, 4, 6, 9, 12, 16, 20 and 25 steps, the whole parts of j²/4, and
then twice as far apart each time. They end where they come near the first multiple of the interval N, and refreshes stand at
its multiples: for N = 30 that is 8 more in a run, whatever its length. (Twice as far apart from the start, after 1, 3, 7, 15
steps, left a real model without protection where its rate was highest: docs/laptop.md.) Before them there may be one for each
step of a warm-up.
"""

from __future__ import annotations

import math

PAPERS_INTERVAL = {"sft": 30, "dpo": 5}
"""N of each stage (arXiv:2602.07892), and its default here."""

_SQUARES = 25
"""The step up to which early refreshes are at j²/4."""


def next_refresh(step: int, interval: int, *, early: bool, warmup: int = 0) -> int:
    """The first step after ``step`` that begins with a refresh.

    It follows from the step alone, so that a resumed run agrees with an undisturbed one.

    Args:
        step: steps already taken, from 0.
        interval: N, in optimizer steps.
        early: closer ones as well, in the first three quarters of the interval; for 30: 1, 2, 4, 6, 9, 12, 16, 20.
        warmup: before each of so many steps.
    """
    if step + 1 < warmup:
        return step + 1
    closer = _next_early(step)
    return closer if early and 4 * closer < 3 * interval else (step // interval + 1) * interval


def _next_early(step: int) -> int:
    if step < _SQUARES:
        root = math.isqrt(4 * step + 3) + 1  # the least with root²/4 > step
        return root**2 // 4
    return _SQUARES << (step // _SQUARES).bit_length()


def early_refreshes(interval: int, *, early: bool, warmup: int = 0) -> list[int]:
    """The steps of :func:`next_refresh` that stand beside the start and the multiples of the interval."""
    found, step = [], 0
    while (step := next_refresh(step, interval, early=early, warmup=warmup)) < max(interval, warmup):
        found.append(step)
    return found
