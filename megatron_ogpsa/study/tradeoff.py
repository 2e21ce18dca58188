"""Comparison at equal safety: general loss where a run first reaches a level of refusal. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of held-out unsafe requests refused, at which settings are compared."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One checkpoint of a run. Shares are between 0 and 1, the loss in nats per token."""

    step: int
    unsafe_refused: float
    benign_refused: float
    general_accuracy: float
    general_loss: float

    def as_json(self) -> dict[str, Any]:
        """For results.json; rounded to what evaluation sets of a hundred can tell."""
        return {name: value if name == "step" else round(value, 5) for name, value in asdict(self).items()}


Curve = Sequence[Point]
"""The checkpoints of one run in the order of steps, the starting model first."""

Curves = Mapping[str, Mapping[int, Curve]]
"""Setting → seed → curve."""


def at_refusal(curve: Curve, level: float, name: str = "general_loss") -> float | None:
    """The measure ``name`` where refusal first reaches ``level``, between two checkpoints in proportion.

    None if it never does.
    """
    for before, after in pairwise(curve):
        if after.unsafe_refused >= level > before.unsafe_refused:
            share = (level - before.unsafe_refused) / (after.unsafe_refused - before.unsafe_refused)
            first, second = getattr(before, name), getattr(after, name)
            return float(first + share * (second - first))
    return None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A setting against plain fine-tuning at one level of safety, over the seeds where both reach it.

    Attributes:
        seeds: how many.
        growth: of the general loss over the starting model's, mean over seeds.
        plain_growth: of plain fine-tuning with the same seeds.
        deviation: sample standard deviation of that; None for one seed.
        recovered: share of plain's mean growth that is avoided; None where plain's is not positive.
        recovered_by_seed: the same, seed by seed.
        accuracy: change of the general accuracy, mean over seeds.
    """

    seeds: int
    growth: float
    plain_growth: float
    deviation: float | None
    recovered: float | None
    recovered_by_seed: tuple[float | None, ...]
    accuracy: float


def compare(curves: Mapping[int, Curve], plain: Mapping[int, Curve], level: float) -> Comparison | None:
    """None if no seed reaches ``level`` in both settings."""
    growths, plains, accuracies = [], [], []
    for seed in sorted(curves.keys() & plain.keys()):
        own, other = at_refusal(curves[seed], level), at_refusal(plain[seed], level)
        accuracy = at_refusal(curves[seed], level, "general_accuracy")
        if own is None or other is None or accuracy is None:
            continue
        start = curves[seed][0]
        growths.append(own - start.general_loss)
        plains.append(other - start.general_loss)
        accuracies.append(accuracy - start.general_accuracy)
    if not growths:
        return None
    return Comparison(
        seeds=len(growths),
        growth=statistics.fmean(growths),
        plain_growth=statistics.fmean(plains),
        deviation=statistics.stdev(growths) if len(growths) > 1 else None,
        recovered=_recovered(statistics.fmean(growths), statistics.fmean(plains)),
        recovered_by_seed=tuple(map(_recovered, growths, plains)),
        accuracy=statistics.fmean(accuracies),
    )


def _recovered(growth: float, plain: float) -> float | None:
    return 1.0 - growth / plain if plain > 0 else None


def over_levels(curves: Mapping[int, Curve], plain: Mapping[int, Curve]) -> float | None:
    """Share of plain's growth avoided along the curve: of growths summed over all seeds and levels that both reach."""
    found = [comparison for level in LEVELS if (comparison := compare(curves, plain, level))]
    if not found:
        return None
    return _recovered(sum(c.growth * c.seeds for c in found), sum(c.plain_growth * c.seeds for c in found))
