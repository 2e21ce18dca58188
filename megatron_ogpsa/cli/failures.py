"""The last word on a run that failed: which rank was the first, and what it said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def record_failure(error: Exception) -> None:
    """Leave ``error`` to the launcher that has started this rank, as ``torch.distributed.elastic``'s ``record`` does."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Rank and ``ProcessFailure`` of the first rank that raised, or else of the first that ended.

    Ranks that were ended because of another one have raised nothing. (Times are whole seconds.)
    """
    return min(failures.items(), key=lambda item: (not _message(item[1]), item[1].timestamp))


def last_word(rank: int, failure: Any) -> str:
    """``rank 1 ended with exit code 1: RuntimeError: …``, in one line."""
    code = failure.exitcode
    ended = f"rank {rank} ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
    message = " ".join(_message(failure).split())
    return f"{ended}: {message}" if message else f"{ended}; its output is above"


def _message(failure: Any) -> str:
    """What the rank's exception said; empty if it left none."""
    message = failure.error_file_data.get("message")
    return str(message.get("message", "")) if isinstance(message, dict) else ""
