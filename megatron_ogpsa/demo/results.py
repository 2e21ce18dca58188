"""What the demo found: for each seed the scores of each model and the course of each fine-tuning."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ogpsa.console.training_log import Curve
from megatron_ogpsa.demo.recipes import Variant
from megatron_ogpsa.demo.scoring import Recovered, Scores, tax_recovered


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one seed found."""

    seed: int
    scores: Mapping[str, Scores]
    """By variant."""
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    """For each fine-tuned variant the numbers of its log lines by name, such as ``lm loss`` and ``ogpsa removed``."""


@dataclass(frozen=True)
class Estimate:
    """A score over seeds: its mean and its sample standard deviation, which one seed does not have."""

    mean: float
    deviation: float | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """The runs of all seeds, of the same variants in the same order."""

    variants: Mapping[str, Variant | None]
    """In the order of the table; the starting model is None."""
    runs: Sequence[Run]
    notes: tuple[str, ...] = ()
    """Lines for the head of the report: sizes, seeds, settings, device."""

    def title(self, variant: str) -> str:
        """What tables and plots call a variant."""
        description = self.variants[variant]
        return description.title if description else variant

    def estimate(self, variant: str, read: Callable[[Scores], float]) -> Estimate:
        """One score of one variant over all seeds."""
        values = [read(run.scores[variant]) for run in self.runs]
        return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def recovered(self, variant: str) -> Recovered | None:
        """The share of the tax that a projected variant gave back; None for the models that define the tax.

        Of the means over seeds: the mean of shares would be ruled by seeds whose plain variant lost next to nothing.
        """
        description = self.variants[variant]
        if description is None or description.against is None:
            return None
        start = next(name for name, other in self.variants.items() if other is None)

        def means(name: str) -> tuple[float, float]:
            accuracy = self.estimate(name, lambda scores: scores.general_accuracy).mean
            return accuracy, self.estimate(name, lambda scores: scores.general_loss).mean

        return tax_recovered(means(start), means(description.against), means(variant))
