"""A refresh tells how stale the basis was, and what the steps since the last one did to first order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import LAYOUTS, PRECISIONS
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
JOB = "tests.core.interval_cases:interval"

# Of ‖a‖·‖Δ‖: fp32 weights of size 0.5 are rounded to 3e-8 of themselves, steps of 0.01 to 1e-6, and over a few hundred
# thousand of them most of that averages out.
TOLERANCE = 1e-6


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2-plain", "ep2-dp2", "pp2-tied", "dp2-bf16-grads-plain", "tp2-fp16"])
def test_staleness_and_first_order_change_are_those_of_the_whole_model(
    distributed: Distributed, layout: str, granularity: str
) -> None:
    group = distributed((LAYOUTS | PRECISIONS)[layout].world_size)
    for result in group.run(JOB, layout=layout, space="gradient", granularity=granularity):
        assert result["is_empty_at_first"]
        assert result["captured"] == pytest.approx(result["expected_captured"], rel=1e-6)
        assert all(0.05 < share < 0.95 for share in result["captured"])
        assert result["predicted_error"] < TOLERANCE
        assert max(map(abs, result["predicted_share"])) > 1e-3  # Adam leaves the protected complement


@pytest.mark.parametrize("layout", ["tp2-pp2", "ep2-dp2-plain"])
def test_a_projected_update_changes_nothing_to_first_order(distributed: Distributed, layout: str) -> None:
    for result in distributed(4).run(JOB, layout=layout, space="update", granularity="tensor"):
        assert result["predicted_error"] < TOLERANCE
        assert max(map(abs, result["predicted"])) < 1e-4  # of gradients of a norm of some hundreds
        assert max(map(abs, result["predicted_share"])) < TOLERANCE


@pytest.mark.parametrize("layout", ["tp2-pp2", "ep2-dp2-plain"])
def test_an_update_in_the_cone_raises_no_reference_to_first_order(distributed: Distributed, layout: str) -> None:
    """⟨a, Δθ⟩ ≤ 0 in each block, so below 0 in the sum: what an update would have lowered, it still lowers."""
    for result in distributed(4).run(JOB, layout=layout, space="update", granularity="tensor", mode="conflict"):
        assert result["predicted_error"] < TOLERANCE
        assert max(result["predicted_share"]) < -1e-3


def test_parameters_out_of_reach_are_told_as_unknown(distributed: Distributed) -> None:
    for result in distributed(2).run(JOB, layout="dp2-bf16-aware", space="gradient", granularity="tensor"):
        assert result["predicted"] == [None, None]
        assert result["captured"] == pytest.approx(result["expected_captured"], rel=1e-6)
