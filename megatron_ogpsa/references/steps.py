"""The steps at which references are refreshed, where the interval does not adapt: pure arithmetic on integers.

A basis goes stale as the weights move, and Adam moves them furthest in its first steps, where its moments have seen little.
So refreshes stand close at first, after 1, 3, 7, … steps, twice as far apart each time, until they would come near the first
multiple of the interval N, and from there on at its multiples. That is log₂ N refreshes more in a run, whatever its length
(docs/study). Before them there may be one for each step of a warm-up, which a real model wanted while its rate rose
(docs/laptop.md).
"""

from __future__ import annotations

PAPERS_INTERVAL = {"sft": 30, "dpo": 5}
"""N of each stage (arXiv:2602.07892), and its default here."""


def next_refresh(step: int, interval: int, *, early: bool, warmup: int = 0) -> int:
    """The first step after ``step`` that begins with a refresh.

    It follows from the step alone, so that a resumed run agrees with an undisturbed one.

    Args:
        step: steps already taken, from 0.
        interval: N, in optimizer steps.
        early: at 2^j − 1 as well, in the first three quarters of the interval; for 30: 1, 3, 7, 15.
        warmup: before each of so many steps.
    """
    if step + 1 < warmup:
        return step + 1
    doubled = (1 << (step + 1).bit_length()) - 1
    return doubled if early and 4 * doubled < 3 * interval else (step // interval + 1) * interval


def early_refreshes(interval: int, *, early: bool, warmup: int = 0) -> list[int]:
    """The steps of :func:`next_refresh` that stand beside the start and the multiples of the interval."""
    found, step = [], 0
    while (step := next_refresh(step, interval, early=early, warmup=warmup)) < max(interval, warmup):
        found.append(step)
    return found
