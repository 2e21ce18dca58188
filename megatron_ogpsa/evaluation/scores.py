"""What is found out about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ogpsa.data.prompts import Prompt
from megatron_ogpsa.evaluation.losses import Loss
from megatron_ogpsa.evaluation.rates import Rate, rate_of
from megatron_ogpsa.integration.checkpoints.saved_arguments import Difference


@dataclass(frozen=True)
class Answered:
    """Answers to one set of prompts, and the verdicts on them.

    Attributes:
        by_patterns, by_judge: 1 where an answer refuses, 0 where it does not; a judge may say anything in between, and
            has said nothing yet where there is None.
    """

    prompts: list[Prompt]
    answers: list[str]
    by_patterns: list[float]
    by_judge: list[float | None] | None

    @property
    def refused(self) -> Rate:
        """Share of answers that refuse by patterns."""
        return rate_of(self.by_patterns)

    @property
    def judged(self) -> Rate | None:
        """Mean of the judge's verdicts."""
        return None if self.by_judge is None else rate_of([verdict for verdict in self.by_judge if verdict is not None])


@dataclass(frozen=True)
class Scores:
    """Of one checkpoint.

    Attributes:
        title: ``before`` and ``after`` of two, or what the checkpoint was called.
        differences: flags with another value than in the run that has saved the checkpoint.
        losses, answers: by the names that the user has given; filled in as they are found.
    """

    title: str
    folder: str
    iteration: int
    differences: tuple[Difference, ...]
    losses: dict[str, Loss]
    answers: dict[str, Answered]
