"""The numbers of Megatron's training log."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*\d+ \|(.*)")
_FIELD = re.compile(r"\s*([A-Za-z][^:|]*?):\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?|nan|inf)\s*(?=\||$)")


@dataclass(frozen=True)
class Curve:
    """One number of the log over steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_curves(log: Path) -> dict[str, Curve]:
    """Every number that is printed with each iteration, by its name in the log: ``lm loss``, ``ogpsa removed``, …"""
    curves: dict[str, Curve] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        iteration = _ITERATION.search(line)
        if iteration is None:
            continue
        for name, value in (found.groups() for found in map(_FIELD.match, iteration[2].split("|")) if found):
            curve = curves.setdefault(name, Curve())
            curve.steps.append(int(iteration[1]))
            curve.values.append(float(value))
    return curves
