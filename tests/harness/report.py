"""What pytest shows of a job that failed: each distinct traceback once, then who was left waiting, and where."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from tests.harness.rank import Reply

_MAX_LINES = 40


def describe_failure(
    activity: str, replies: Mapping[int, Reply], stacks: Mapping[int, str], seconds: float, *, limit_reached: bool
) -> str:
    """One message for a failed job.

    Args:
        activity: what was being done.
        replies: the ranks that answered, those that failed with their error.
        stacks: the ranks that did not answer, with where they stood.
        seconds: how long they had.
        limit_reached: the time was up, rather than some rank having failed.
    """
    lines = [f"{activity}: no answer from {_ranks(list(stacks))} in {seconds:.0f} s" if limit_reached else activity]
    for error, ranks in _by_text({index: reply.error for index, reply in replies.items() if reply.error}).items():
        lines += ["", f"{_ranks(ranks)} failed:", _shortened(error)]
    for stack, ranks in _by_text({index: _main_thread(stack) for index, stack in stacks.items()}).items():
        lines += ["", f"{_ranks(ranks)} still ran and was stopped, most recent call first:", _shortened(stack)]
    return "\n".join(lines)


def _by_text(texts: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks that say the same stand together."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, text in sorted(texts.items()):
        groups[text].append(index)
    return groups


def _ranks(indices: list[int]) -> str:
    return f"rank{'s' if len(indices) > 1 else ''} {', '.join(map(str, sorted(indices)))}"


def _main_thread(stack: str) -> str:
    """The main thread's part of a faulthandler dump: it comes last, the job runs in it."""
    parts = re.split(r"^(?:Current thread|Thread) 0x.*\n", stack.rstrip(), flags=re.MULTILINE)
    return parts[-1]


def _shortened(text: str) -> str:
    lines = text.rstrip().splitlines()
    if len(lines) > _MAX_LINES:
        half = _MAX_LINES // 2
        lines = [*lines[:half], f"    ... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return "\n".join("    " + line for line in lines)
