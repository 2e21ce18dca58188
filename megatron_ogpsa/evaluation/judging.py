"""Answers before the user's judge: on rank 0, because a judge may cost money; the same verdicts on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.judges import verdicts_of
from megatron_ogpsa.evaluation.request import Request
from megatron_ogpsa.evaluation.scores import Answered
from megatron_ogpsa.integration.ranks.agreement import from_rank_0
from megatron_ogpsa.watchdog import progress

SLICE_SECONDS = 1.0
"""Of judging, after which the other ranks hear of it: a collective in which they wait for all of it would time out."""

KEEP_SECONDS = 30.0
"""Of judging, after which verdicts are written: a process that is killed writes nothing more."""


def judge_together(request: Request, answered: Answered, keep: Callable[[], None]) -> None:
    """Fill in what the judge says of each answer. Collective.

    Args:
        keep: writes what there is; called on rank 0 now and then, and when the judge fails.

    Raises:
        UserError: on all ranks alike: the judge raises or returns what is no verdict, or what ``keep`` raises.
    """
    verdicts = answered.by_judge
    assert verdicts is not None
    judging = _Judging(request, answered, verdicts, keep)
    known = 0
    while known < len(verdicts):
        found = from_rank_0(judging.slice)
        verdicts[known : known + len(found)] = found
        known += len(found)
        progress.pulse()  # the watch looks now and then, and would see this rank wait at the same place each time


class _Judging:
    """What rank 0 does; elsewhere nothing is asked of it."""

    def __init__(
        self, request: Request, answered: Answered, verdicts: list[float | None], keep: Callable[[], None]
    ) -> None:
        judge, name = request.judge, request.judge_name
        self._coming: Iterator[float] = iter(())
        if judge is not None:
            self._coming = verdicts_of(judge, name, answered.prompts, answered.answers)
        self._verdicts = verdicts
        self._num_known = 0
        self._keep = keep
        self._kept_at = time.monotonic()

    def slice(self) -> list[float]:
        """The next verdicts, of a moment's judging; those before a failure are kept."""
        try:
            found = self._next()
        except UserError:
            self._keep()
            raise
        if time.monotonic() >= self._kept_at + KEEP_SECONDS:
            self._keep()
            self._kept_at = time.monotonic()
        return found

    def _next(self) -> list[float]:
        found, end = [], time.monotonic() + SLICE_SECONDS
        for verdict in self._coming:
            self._verdicts[self._num_known] = verdict
            self._num_known += 1
            found.append(verdict)
            if time.monotonic() >= end:
                break
        return found
