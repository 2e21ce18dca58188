"""What is asked of a long run, and whether its samples show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SETTLED_STEP = 200
"""By then everything has been allocated that is allocated once."""

MEMORY_TOLERANCE = 0.01


@dataclass(frozen=True)
class Sample:
    """One rank at one step, looked at from outside.

    Attributes:
        resident: bytes in memory.
        unshared: bytes of it that no other process shares.
        descriptors: open file descriptors that were open at the sample before as well; in the first sample, all.
        passing: what the others are open on. The rank does not stop to be looked at: it may be writing a checkpoint.
            What it fails to close is held in the sample after.
    """

    rank: int
    step: int
    resident: int
    unshared: int
    descriptors: int
    passing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Of one rank.

    Attributes:
        growth: the largest resident memory after the settled step, relative to that step's, minus 1.
        unshared_growth: the same of unshared memory.
        slope: bytes that resident memory grows by in a step, least squares from the settled step on.
        descriptors: every number of held descriptors that was seen from the settled step on.
        passing: what else was open in some sample from then on.
    """

    rank: int
    settled: int
    growth: float
    unshared_growth: float
    slope: float
    descriptors: tuple[int, ...]
    passing: tuple[str, ...]

    @property
    def is_flat(self) -> bool:
        return self.growth <= MEMORY_TOLERANCE

    @property
    def holds_descriptors(self) -> bool:
        return len(self.descriptors) == 1


def judge(samples: Sequence[Sample]) -> list[Verdict]:
    """A verdict for each rank.

    Raises:
        ValueError: a rank has fewer than two samples from the settled step on, which would show nothing.
    """
    verdicts = []
    for rank in sorted({sample.rank for sample in samples}):
        settled = sorted((s for s in samples if s.rank == rank and s.step >= SETTLED_STEP), key=lambda s: s.step)
        if len(settled) < 2:
            raise ValueError(f"rank {rank} has {len(settled)} samples from step {SETTLED_STEP} on")
        first = settled[0]
        verdicts.append(
            Verdict(
                rank=rank,
                settled=first.resident,
                growth=max(sample.resident for sample in settled) / first.resident - 1,
                unshared_growth=max(sample.unshared for sample in settled) / first.unshared - 1,
                slope=_slope([(sample.step, sample.resident) for sample in settled]),
                descriptors=tuple(sorted({sample.descriptors for sample in settled})),
                passing=tuple(sorted({name for sample in settled for name in sample.passing})),
            )
        )
    return verdicts


def _slope(points: Sequence[tuple[int, int]]) -> float:
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
