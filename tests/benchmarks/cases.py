"""What ranks run for tests/benchmarks."""

from __future__ import annotations

from typing import Any

from megatron_ogpsa.benchmarks import step

FLAGS = ["--num-layers", "1", "--hidden-size", "64", "--vocabulary", "64", "--seq-length", "8", "--rounds", "2"]
"""Of a model that takes no time."""


def small_step(rule: str = "") -> dict[str, Any]:
    """All figures of the benchmark of a step."""
    return step.measure(step.parser().parse_args([*FLAGS, *rule.split()]))


def weights_after_a_step() -> list[float]:
    """Sums of this rank's weights after two steps on its own tokens."""
    loop = step.Loop(step.parser().parse_args(FLAGS))
    loop.step()
    loop.step()
    return [float(parameter.double().sum()) for parameter in loop.parameters]
