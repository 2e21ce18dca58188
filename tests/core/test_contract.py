"""What attach, step and detach promise to a megatron-core loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.core.layouts import LAYOUTS, PRECISIONS
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("layout", ["tp2", "dp2", "dp2-plain", "tp2-pp2"])
def test_a_step_has_no_collective_more_and_a_refresh_has_one(
    distributed: Distributed, layout: str, granularity: str
) -> None:
    group = distributed(LAYOUTS[layout].world_size)
    job = "tests.core.contract_cases:collectives"
    for result in group.run(job, layout=layout, granularity=granularity, num_references=3):
        assert result["plain"]["all_reduce"] == 1  # Megatron's norm
        assert result["projected"] == result["plain"]
        assert result["refresh"] == {"all_reduce": 1}


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "dp2-fp16-plain"])
def test_detached_or_disabled_leaves_megatron_as_it_was(distributed: Distributed, layout: str) -> None:
    for result in distributed((LAYOUTS | PRECISIONS)[layout].world_size).run(
        "tests.core.contract_cases:detached_is_plain", layout=layout
    ):
        assert result == {"restored": True, "same_returns": True, "same_parameters": True}


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("dp2", "DistributedOptimizer"),
        ("dp2-plain", "FP32Optimizer"),
        ("dp2-bf16-plain", "Float16OptimizerWithFloat16Params"),
    ],
)
def test_an_optimizer_outside_a_chain_is_projected_and_clipped(
    distributed: Distributed, layout: str, optimizer: str
) -> None:
    for result in distributed(2).run("tests.core.contract_cases:leaf_optimizer", layout=layout):
        assert result["optimizer"] == optimizer
        assert result["norm_error"] < 1e-6  # fp32 gradients, fp64 sums
        assert result["clipped_norm"] == pytest.approx(0.5, rel=1e-5)  # Megatron adds 1e-6 to the norm it divides by


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize(
    "layout", ["tp2", "pp2", "dp2", "dp2-plain", "dp2-bf16-grads", "tp2-fp16", "dp2-fp16-plain", "dp4-instances"]
)
def test_what_is_not_finite_on_one_rank_is_decided_on_all(distributed: Distributed, layout: str, bad_rank: int) -> None:
    group = distributed((LAYOUTS | PRECISIONS)[layout].world_size)
    results = group.run("tests.core.contract_cases:not_finite", layout=layout, bad_rank=bad_rank)
    for result in results:
        assert_all_ranks_skip(result)
    assert_warnings(results[0]["warnings"], is_scaled="fp16" in layout)
    assert all(result["warnings"] == [] for result in results[1:])  # told once


def assert_all_ranks_skip(result: dict[str, Any]) -> None:
    """The same on each rank, and no weight changed in a step that was skipped."""
    assert tuple(result["refreshes"]) == (True, False, True)
    assert result["kept"]
    skipped, made = [False, False], [True, True]
    assert result["steps"] == [skipped, made, skipped, skipped, made]
    assert result["skipped_steps"] == 3
    assert result["in_a_row"] == [1, 2, 0]
    assert result["at_smallest_scale"] == [1, 2]  # where no loss scale is left that could help
    assert result["needs_refresh"] == [True, False]
    assert result["rejected_refreshes"] == 0


def assert_warnings(warnings: list[str], *, is_scaled: bool) -> None:
    """What rank 0 tells, in order. Where losses are scaled, Megatron itself skips a step that is not finite."""
    rejected, *gradients, basis, basis_again, rejected_again = warnings
    assert re.fullmatch(r"the gradient of reference shaky is not finite in .+; the last good basis is kept", rejected)
    assert len(gradients) == (0 if is_scaled else 1)
    for told in gradients:
        assert re.fullmatch(r"step skipped on all ranks: the gradient is not finite in .+", told)
    assert basis == basis_again
    assert basis == "step skipped on all ranks: the basis is not finite; steps are skipped until the next refresh"
    assert rejected_again.endswith("nor is the basis in use: steps are skipped")
