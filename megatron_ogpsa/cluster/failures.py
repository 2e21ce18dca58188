"""The last word on a run that failed: which rank was the first, and what it said."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ogpsa.cluster.words import described
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.watchdog import HANG_EXIT_CODE

ITS_OUTPUT = "its output is above"


def record_failure(error: Exception) -> None:
    """Leave ``error`` to the launcher that has started this rank, as ``torch.distributed.elastic``'s ``record`` does."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


@dataclass(frozen=True)
class Judgement:
    """What the failures of some ranks come to.

    Attributes:
        cause: the rank that failed first and its words, or where to find them, in one line.
        is_told: whether the ranks themselves have said why.
    """

    exit_code: int
    cause: str
    is_told: bool


def judge(failures: Mapping[int, Any]) -> Judgement:
    """Choose among ``ProcessFailure`` by rank: a user's mistake, then a hang, then the first rank that raised or ended.

    Ranks that were ended because of another one have raised nothing. (Times are whole seconds.) Those that see another
    one lost end as for a hang and name it, but they cannot know the signal that it died of.
    """
    codes = [failure.exitcode for failure in failures.values()]
    rank, first = min(failures.items(), key=lambda item: (not _message(item[1]), item[1].timestamp))
    if UserError.exit_code in codes:
        return Judgement(UserError.exit_code, last_word(rank, first), is_told=True)
    if HANG_EXIT_CODE in codes:
        killed = [item for item in failures.items() if item[1].exitcode < 0 and item[1].exitcode != -signal.SIGTERM]
        rank, first = killed[0] if killed else (rank, first)
        return Judgement(HANG_EXIT_CODE, last_word(rank, first), is_told=not killed)
    return Judgement(max(first.exitcode, 1), last_word(rank, first), is_told=False)


def last_word(rank: int, failure: Any) -> str:
    """``rank 1 ended with exit code 1: RuntimeError: …``, or that its output is above."""
    ended = f"rank {rank} ended with {described(failure.exitcode)}"
    message = " ".join(_message(failure).split())
    return f"{ended}: {message}" if message else f"{ended}; {ITS_OUTPUT}"


def _message(failure: Any) -> str:
    """What the rank's exception said; empty if it left none."""
    message = failure.error_file_data.get("message")
    return str(message.get("message", "")) if isinstance(message, dict) else ""
