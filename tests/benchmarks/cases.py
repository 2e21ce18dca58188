"""What ranks run for tests/benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ogpsa.benchmarks import step
from megatron_ogpsa.benchmarks.loop import Loop

FLAGS = ["--num-layers", "1", "--hidden-size", "64", "--vocabulary", "64", "--seq-length", "8", "--rounds", "2"]
"""Of a model that takes no time."""


def small_step(rule: str = "") -> dict[str, Any]:
    """All figures of the benchmark of a step."""
    return step.measure(step.parser().parse_args([*FLAGS, *rule.split()]))


def weights_after_a_step() -> list[list[float]]:
    """Sums of this rank's weights after a step, on its own tokens, and on those of the other of two ranks."""
    sums = []
    for exchanged in (False, True):
        loop = Loop(step.parser().parse_args(FLAGS))
        if exchanged:
            everyones = [torch.empty_like(loop._tokens) for _ in range(2)]
            dist.all_gather(everyones, loop._tokens)
            loop._tokens = everyones[1 - dist.get_rank()]
        loop.step()
        sums.append([float(parameter.double().sum()) for parameter in loop.parameters])
        parallel_state.destroy_model_parallel()
    return sums
