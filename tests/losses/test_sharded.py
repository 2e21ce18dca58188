"""Preference losses and the reference policy through sharded models, against one unsharded process in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import LAYOUTS
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
SHARDED = ["tp2", "pp2", "dp2", "tp2-pp2", "pp2-vpp2-dp2", "tp2-tied"]

# fp32 activations: sums of 1 to 4 numbers of size 5, each with an error of some 1e-7.
TOLERANCE = 1e-6


@pytest.mark.parametrize("layout", SHARDED)
def test_reference_log_probabilities_are_those_of_each_answer_alone(distributed: Distributed, layout: str) -> None:
    job = "tests.losses.preference_cases:reference_log_probs"
    for result in distributed(LAYOUTS[layout].world_size).run(job, layout=layout):
        assert result["known"] == 9
        assert result["error"] < TOLERANCE


@pytest.mark.parametrize("layout", SHARDED)
def test_the_projected_gradient_of_dpo_is_the_unsharded_one(distributed: Distributed, layout: str) -> None:
    job = "tests.losses.preference_cases:preference_gradient"
    results = distributed(LAYOUTS[layout].world_size).run(job, layout=layout)
    for result in results:
        assert result["error"] < TOLERANCE
        assert result["norm_error"] < TOLERANCE
        assert result["removed"] > 0.01
    copies = LAYOUTS[layout].tp
    total = sum(result["loss"] for result in results) / copies  # each pair on one data-parallel rank's last stage
    assert total == pytest.approx(results[0]["expected_loss"], rel=TOLERANCE)
