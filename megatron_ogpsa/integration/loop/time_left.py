"""When training will be done, which Megatron's log line does not say."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import override

import torch
import torch.distributed as dist

from megatron_ogpsa.integration.loop.hooks import LoopHook

EVERY = 30.0
"""Seconds from one line to the next at least."""


class TimeLeft(LoopHook):
    """A hook that tells how long the steps that are left take at the pace of those taken, refreshes and checkpoints included.

    The first step of a run does not count: it compiles, and makes the first basis.

    Args:
        args: Megatron's arguments; without ``train_iters`` nothing is told.
        clock: in seconds.
    """

    def __init__(self, args: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> None:
        self._args = args
        self._clock = clock
        self._begun: tuple[int, float] | None = None  # steps taken, and when
        self._told = 0.0

    @override
    def after_step(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """A line, on the rank that logs."""
        if dist.get_rank() == dist.get_world_size() - 1 and (told := self.line(step)):
            print(told, flush=True)

    def line(self, step: int) -> str:
        """What is to be told after ``step`` steps; empty if nothing is due."""
        now, total = self._clock(), self._args.train_iters
        if self._begun is None:
            self._begun, self._told = (step, now), now
            return ""
        first, begun = self._begun
        if not total or step >= total or now - self._told < EVERY:
            return ""
        self._told = now
        pace = (now - begun) / (step - first)
        return f" step {step} of {total}, {pace:.1f} s each: about {in_words((total - step) * pace)} to go"


def in_words(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 days 5 h``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"
