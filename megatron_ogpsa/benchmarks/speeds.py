"""How fast a run was, from what it leaves: Megatron's log, or the times that TRL's trainer wrote down."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.benchmarks.timing import median_ratio
from megatron_ogpsa.console.training_log import read_curves
from megatron_ogpsa.errors import UserError

WARM_UP = 2
"""Steps that do not count."""

_TELLS_NOTHING = "tells neither rows nor times of steps: look at its end for what went wrong"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one run's log tells.

    Attributes:
        tokens: of the data, in one optimizer step of all ranks.
        step_seconds: median over steps without a refresh.
        counted: seconds of each of those.
        refresh_seconds: of the last refresh; None without references.
        useful: share of a row's positions that are tokens of the data, not padding.
    """

    tokens: float
    useful: float
    step_seconds: float
    counted: Sequence[float]
    refresh_seconds: float | None

    def tokens_per_second(self, interval: int | None = None) -> float:
        """Without refreshes, or with one every ``interval`` steps."""
        refresh = (self.refresh_seconds or 0.0) / interval if interval else 0.0
        return self.tokens / (self.step_seconds + refresh)


def read_speed(log: Path, data: Path, rows_in_step: int, refreshed: Sequence[int]) -> Speed:
    """Of the log of one run.

    Args:
        data: what was trained on, as the log names it.
        refreshed: steps, from 1, that begin with a refresh.

    Raises:
        UserError: the log lacks what is looked for.
    """
    told = re.search(
        rf"data {re.escape(str(data))}: .* rows of (\d+) positions, ([\d.]+)% tokens", log.read_text(encoding="utf-8")
    )
    counted = [*_seconds_of_steps(log, refreshed).values()]
    if told is None or not counted:
        raise UserError(f"{log}: {_TELLS_NOTHING}")
    refresh = read_curves(log).get("ogpsa refresh (ms)")
    return Speed(
        tokens=rows_in_step * int(told[1]) * float(told[2]) / 100,
        useful=float(told[2]) / 100,
        step_seconds=statistics.median(counted),
        counted=counted,
        refresh_seconds=refresh.values[-1] / 1e3 if refresh and refresh.values[-1] else None,
    )


def is_projected(step: int) -> bool:
    """Whether it is, in a run of which every second step is (:mod:`megatron_ogpsa.benchmarks.every_second_step`).

    Args:
        step: its number in the log, from 1.
    """
    return step % 2 == 0


def read_in_turn(log: Path, refreshed: Sequence[int]) -> float:
    """Of a run whose every second step is projected: plain / projected, the median over pairs of neighbouring steps.

    Args:
        refreshed: as in :func:`read_speed`; pairs with such a step do not count.

    Raises:
        UserError: the log has no such pair.
    """
    seconds = _seconds_of_steps(log, refreshed)
    pairs = [(step, step + 1) for step in seconds if is_projected(step + 1) and step + 1 in seconds]
    if not pairs:
        raise UserError(f"{log}: {_TELLS_NOTHING}")
    return median_ratio([seconds[plain] for plain, _ in pairs], [seconds[projected] for _, projected in pairs])


def _seconds_of_steps(log: Path, refreshed: Sequence[int]) -> dict[int, float]:
    """Of those that count, by their numbers."""
    if (elapsed := read_curves(log).get("elapsed time per iteration (ms)")) is None:
        return {}
    return {
        step: milliseconds / 1e3
        for step, milliseconds in zip(elapsed.steps, elapsed.values, strict=True)
        if step > WARM_UP and step not in refreshed
    }


def read_trl_speed(file: Path, refreshed: Sequence[int]) -> Speed:
    """Of the steps that :mod:`megatron_ogpsa.benchmarks.trl_training` wrote down.

    Args:
        refreshed: as in :func:`read_speed`; plain runs leave these steps out too, since each step has other samples.
    """
    steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
    counted = [step for number, step in enumerate(steps, 1) if number > WARM_UP and number not in refreshed]
    refreshes = [step["refresh_seconds"] for step in steps if step["refresh_seconds"]]
    tokens = sum(step["tokens"] for step in counted)
    return Speed(
        tokens=tokens / len(counted),
        useful=tokens / sum(step["positions"] for step in counted),
        step_seconds=sum(step["seconds"] for step in counted) / len(counted),
        counted=[step["seconds"] for step in counted],
        refresh_seconds=refreshes[-1] if refreshes else None,
    )
