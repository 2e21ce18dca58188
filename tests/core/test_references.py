"""Reference passes through Megatron's schedules: the gradients that an unsharded model has, and no trace of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import LAYOUTS
from tests.core.test_parity import FP32_TOLERANCE
from tests.harness import WorkerGroup


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2-overlap", "dp2-plain", "pp2-tied", "ep2-sigmoid-bias"])
def test_references_are_unsharded_gradients_and_leave_no_trace(
    distributed: Callable[[int], WorkerGroup], layout: str
) -> None:
    """Reduced, finalised, each on its own; and all that a pass draws, counts or switches is as it was."""
    group = distributed(LAYOUTS[layout].world_size)
    for result in group.run("tests.core.reference_cases:reference_passes", layout=layout):
        assert result["is_new"]
        assert max(result["errors"]) < FP32_TOLERANCE
        assert result["changed"] == []
        assert result["gradient_left"] == 0.0
