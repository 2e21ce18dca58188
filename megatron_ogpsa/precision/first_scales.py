"""Scales for the first passes of a run, where they follow from earlier ones (recipe ``delayed``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_ogpsa.precision.fp8_state import scales

SETTLED = 2.0
"""Scales that a pass changes by less than this factor fit: less than one of FP8's 4 or 5 bits of exponent."""

MAX_PASSES = 64
"""Each pass settles at least one more module; after so many, gradients that vanish have another cause than underflow."""


def find_scales(chunks: Sequence[torch.nn.Module], one_pass: Callable[[], None]) -> int:
    """Repeat a forward and backward pass until its scales have settled; returns how often.

    A module's first scale is one. Gradients below the smallest FP8 number (E4M3: 0.002, E5M2: 0.000015) leave it as zeros, so
    that the modules before it, seen from the loss, meet none and find no scales: each pass gets a module further. Where
    gradients are larger, the second pass finds the scales of the first.

    Collective over all ranks, which repeat alike: pipeline stages do not share their scales.
    """
    before = scales(chunks)
    number = 0
    while number < MAX_PASSES:
        number += 1
        one_pass()
        after = scales(chunks)
        # The first pass makes the scales of modules whose weights are not FP8.
        settled = before.shape == after.shape and bool(((after < SETTLED * before) & (before < SETTLED * after)).all())
        unsettled = torch.tensor([float(not settled)], device=after.device)
        dist.all_reduce(unsettled, op=dist.ReduceOp.MAX)
        if not unsettled.item():
            break
        before = after
    return number
