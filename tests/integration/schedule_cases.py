"""What the ranks run to show that they decide alike; each function returns plain values."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_ogpsa.integration.projection.schedule import least_captured
from megatron_ogpsa.plugin.interval import ReferenceInterval


def decided() -> dict[str, float | None]:
    """The least captured share where ranks hold other numbers, which they do not in a run."""
    rank = dist.get_rank()

    def least(references: list[list[str]], **captured: float) -> float | None:
        interval = {name: ReferenceInterval(captured=share, predicted_change=None) for name, share in captured.items()}
        return least_captured(references, interval)

    return {
        "least": least([["a"], ["b"]], a=0.5 - 0.25 * rank, b=0.75),
        "of parts": least([["a", "b"]], a=0.5, b=1.0),
        "unknown": least([["a", "b"]], a=0.5),
        "zero": least([["a"], ["b"]], a=math.nan, b=0.5),
    }
