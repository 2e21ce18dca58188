"""What attach, step and detach promise to a megatron-core loop."""

from __future__ import annotations

from collections.abc import Callable

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


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "dp2-plain"])
def test_detached_or_disabled_leaves_megatron_as_it_was(distributed: Distributed, layout: str) -> None:
    for result in distributed(LAYOUTS[layout].world_size).run(
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
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "dp2-plain", "dp2-bf16-grads", "tp2-fp16"])
def test_what_is_not_finite_on_one_rank_is_decided_on_all(distributed: Distributed, layout: str, bad_rank: int) -> None:
    group = distributed((LAYOUTS | PRECISIONS)[layout].world_size)
    for result in group.run("tests.core.contract_cases:not_finite", layout=layout, bad_rank=bad_rank):
        assert result["refreshes"] == (True, False)
        assert result["kept"]
        assert result["warnings"] == ["the gradient of reference shaky is not finite; the last good basis is kept"]
        assert result["skipped"]
        assert result["unchanged"]
        assert result["skipped_steps"] == 1
        assert result["goes_on"]
