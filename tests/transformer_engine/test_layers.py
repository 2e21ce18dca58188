"""Models of Transformer Engine's layers, which all users with GPUs have: projected as one unsharded fp64 process would."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import TRANSFORMER_ENGINE
from tests.core.test_parity import FP32_TOLERANCE
from tests.harness import WorkerGroup


@pytest.mark.parametrize("layout", TRANSFORMER_ENGINE)
def test_projected_gradient_equals_the_unsharded_one(distributed_te: Callable[[int], WorkerGroup], layout: str) -> None:
    group = distributed_te(TRANSFORMER_ENGINE[layout].world_size)
    for results in group.run("tests.core.cases:parity", layout=layout):
        for granularity, result in results.items():
            assert result["num_blocks"] == result["expected_num_blocks"], granularity
            assert result["error"] < FP32_TOLERANCE, granularity
            assert result["norm_error"] < FP32_TOLERANCE, granularity
            assert result["leak"] < FP32_TOLERANCE, granularity
            assert result["rank"] == 3, granularity
