"""The judgement of long runs, on runs that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.endurance.judging import Sample, judge
from tests.endurance.running import sample_of

GIB = 2**30


def run(memory: dict[int, float], descriptors: dict[int, int] | None = None, rank: int = 0) -> list[Sample]:
    """A rank with so many GiB at each step, and 20 open descriptors where nothing else is said."""
    return [
        Sample(rank, step, int(size * GIB), int(size * GIB / 2), (descriptors or {}).get(step, 20))
        for step, size in memory.items()
    ]


FLAT = dict.fromkeys(range(0, 2001, 20), 1.0)

CASES = {
    "flat": (run(FLAT), True, True),
    "grows until it has settled": (run(FLAT | {0: 0.2, 100: 0.7, 180: 0.9}), True, True),
    "within the tolerance": (run(FLAT | {1980: 1.009}), True, True),
    "falls": (run(FLAT | {1980: 0.9}), True, True),
    "one peak": (run(FLAT | {1000: 1.02}), False, True),
    "leaks 10 KiB a step": (run({s: 1 + s * 10 * 2**10 / GIB for s in FLAT}), False, True),
    "one descriptor more": (run(FLAT, {2000: 21}), True, False),
    "descriptors before it has settled": (run(FLAT, {100: 25}), True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_judgement(case: str) -> None:
    samples, is_flat, holds_descriptors = CASES[case]
    (verdict,) = judge(samples)
    assert (verdict.is_flat, verdict.holds_descriptors) == (is_flat, holds_descriptors)


def test_each_rank_is_judged_by_its_own_samples() -> None:
    leak = run({step: 2 + step * 2.0**-20 * 20 for step in FLAT}, rank=1)
    whole, leaking = judge([*run(FLAT), *leak])
    assert whole.is_flat
    assert whole.slope == pytest.approx(0, abs=1e-6)
    assert not leaking.is_flat
    assert leaking.slope == pytest.approx(20 * 2**10)


def test_a_run_that_ended_early_shows_nothing() -> None:
    with pytest.raises(ValueError, match="rank 0 has 1 samples"):
        judge(run({0: 1.0, 200: 1.0}))


def test_what_was_open_in_passing_is_told_and_not_counted() -> None:
    samples = run(FLAT)
    samples[50] = replace(samples[50], passing=("out/iter_0000500/__0_0.distcp",))
    (verdict,) = judge(samples)
    assert verdict.holds_descriptors
    assert verdict.passing == ("out/iter_0000500/__0_0.distcp",)


def test_a_descriptor_counts_once_it_is_open_in_two_looks(tmp_path: Path) -> None:
    process, before = psutil.Process(), {}
    first = sample_of(0, process, 0, before)
    with (tmp_path / "leaked").open("w"):
        second, third = (sample_of(0, process, step, before) for step in (20, 40))
    fourth = sample_of(0, process, 60, before)
    assert second.passing == (str(tmp_path / "leaked"),)
    assert third.passing == ()
    assert [sample.descriptors - first.descriptors for sample in (second, third, fourth)] == [0, 1, 0]
