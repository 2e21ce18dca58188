"""Shares of yes among so many, with an interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Rate:
    """A mean of verdicts in 0 to 1, and the 95 % interval of what it estimates."""

    value: float
    low: float
    high: float
    number: int


def rate_of(verdicts: Sequence[float]) -> Rate:
    """The mean of ``verdicts``.

    The interval is Wilson's (E. B. Wilson, JASA 22, 1927) where all are 0 or 1, which holds for few samples and near 0 and
    1 too; and the normal approximation, cut to 0 to 1, where some lie in between.

    Raises:
        ValueError: there are none.
    """
    if not verdicts:
        raise ValueError("a rate of nothing")
    number, mean = len(verdicts), math.fsum(verdicts) / len(verdicts)
    if all(verdict in (0.0, 1.0) for verdict in verdicts):
        return wilson(mean, number)
    variance = math.fsum((verdict - mean) ** 2 for verdict in verdicts) / max(number - 1, 1)
    half = Z_95 * math.sqrt(variance / number)
    return Rate(mean, max(mean - half, 0.0), min(mean + half, 1.0), number)


def wilson(share: float, number: int) -> Rate:
    """Wilson's score interval of a share p̂ of n: (p̂ + z²/2n ± z·√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n)."""
    square = Z_95**2 / number
    centre = (share + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(share * (1 - share) / number + square / (4 * number)) / (1 + square)
    return Rate(share, max(centre - half, 0.0), min(centre + half, 1.0), number)
