"""The oracle's work, done once: all ranks hold the same full tensors, and share two cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

Numbers = dict[str, float]


def on_first_rank(compute: Callable[[], Numbers]) -> Numbers:
    """What ``compute`` gives on rank 0, on every rank. Collective."""
    result: list[Any] = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, src=0)
    numbers: Numbers = result[0]
    return numbers
