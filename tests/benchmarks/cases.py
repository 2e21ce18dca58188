"""What ranks run for tests/benchmarks."""

from __future__ import annotations

from typing import Any

from megatron_ogpsa.benchmarks import step


def small_step() -> dict[str, Any]:
    """The benchmark of a step with a model that takes no time."""
    flags = ["--num-layers", "1", "--hidden-size", "64", "--vocabulary", "64", "--seq-length", "8", "--rounds", "2"]
    return step.measure(step._parser().parse_args(flags))
