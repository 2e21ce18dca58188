"""What a demo run found: the scores of each model and the course of each fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ogpsa.demo.scoring import Recovered, Scores, tax_recovered

START, PLAIN = "start", "plain"

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*\d+ \|(.*)")
_FIELD = re.compile(r"\s*([A-Za-z][^:|]*?):\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?|nan|inf)\s*(?=\||$)")


@dataclass(frozen=True)
class Curve:
    """One number of the training log over steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Scores by variant (the starting model first, then plain fine-tuning) and the curves of their logs."""

    titles: Mapping[str, str]
    """What each variant is called in tables and plots."""
    scores: Mapping[str, Scores]
    curves: Mapping[str, Mapping[str, Curve]]
    """For each fine-tuned variant the numbers of its log lines by name, such as ``lm loss`` and ``ogpsa removed``."""
    notes: tuple[str, ...] = ()
    """Lines for the head of the report: sizes, seeds, settings, device."""

    def recovered(self, variant: str) -> Recovered | None:
        """The share of the tax that a variant gave back; None for the two models that define the tax."""
        if variant in (START, PLAIN):
            return None
        return tax_recovered(self.scores[START], self.scores[PLAIN], self.scores[variant])


def read_curves(log: Path) -> dict[str, Curve]:
    """Every number that Megatron's training log prints with each iteration, by its name in the log."""
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
