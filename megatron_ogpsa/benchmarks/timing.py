"""Timing things in turn, so that a machine whose speed drifts is fair to all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_ogpsa.console.progress import with_progress


def in_turn(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    title: str,
    quiet: bool = False,
    repeat: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round, after a round that does not count: A B C A B C …

    Args:
        repeat: times that a piece of work is done in its turn; seconds are of one. On a GPU several are queued before the
            host waits for the last, so that what launching takes is hidden as it is in a training step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for index in with_progress(range(rounds + 1), title, rounds + 1, " rounds", is_shown=not quiet):
        for name, function in work.items():
            taken = _seconds(function, device, repeat)
            if index:
                seconds[name].append(taken)
    return seconds


def _seconds(function: Callable[[], object], device: torch.device, repeat: int) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    wait(device)
    return (time.perf_counter() - start) / repeat


def wait(device: torch.device) -> None:
    """Until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def versions(*more: str) -> dict[str, str]:
    """Of what a step is made of, and of ``more`` packages, where they are installed."""
    found = {}
    for name in ("torch", "triton", "megatron-core", "transformer-engine", *more):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
