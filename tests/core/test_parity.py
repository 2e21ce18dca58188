"""The projected gradient is the one that an unsharded model would get, whatever the sharding."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import LAYOUTS
from tests.harness import WorkerGroup

# fp32 activations and gradients against fp64: rounding errors of some 1e-7 per element, independent of each other, in a
# gradient of which the projection removes about half.
FP32_TOLERANCE = 1e-6


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_projected_gradient_equals_the_unsharded_one(
    distributed: Callable[[int], WorkerGroup], layout: str, granularity: str
) -> None:
    group = distributed(LAYOUTS[layout].world_size)
    for result in group.run("tests.core.cases:parity", layout=layout, granularity=granularity):
        assert result["num_blocks"] == result["expected_num_blocks"]
        assert result["error"] < FP32_TOLERANCE
        assert result["norm_error"] < FP32_TOLERANCE
        assert result["removed"] == pytest.approx(result["expected_removed"], abs=FP32_TOLERANCE)
        assert result["leak"] < FP32_TOLERANCE
        assert result["rank"] == 3
