"""``space="update"``: what the optimizer does to the weights is projected, in every layout as in one process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ogpsa.sharding.gradients import GradientShard
from tests.core.layouts import LAYOUTS, PRECISIONS
from tests.core.test_contract import assert_all_ranks_skip
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
ALL_LAYOUTS = LAYOUTS | PRECISIONS

# fp32 weights of size 0.5 are rounded to 3e-8 in each of three steps of 0.03: 1e-6 of a step, and a few of them.
TOLERANCE = 5e-6

SETTINGS = [
    {"optimizer": optimizer, "granularity": granularity, "mode": mode}
    for optimizer, granularity, mode in (
        ("adam", "tensor", "orthogonal"),
        ("adam", "model", "orthogonal"),
        ("adam", "model", "conflict"),
        ("sgd", "tensor", "orthogonal"),
    )
]

SHARDED = [
    *("tp2", "dp2", "dp2-plain", "tp2-pp2", "pp2-vpp2-dp2", "tp2-dp2-plain", "pp2-tied", "dp4-instances"),
    *("ep2-dp2", "ep2-dp2-plain", "dp2-bf16", "dp2-bf16-grads-plain", "tp2-fp16", "tp2-sp", "cp2-dp2"),
]


WITH_CONFLICT = ("tp2-pp2", "dp2-plain", "ep2-dp2")


def test_flat_parameters_are_given_as_they_are() -> None:
    """A view of each takes the host longer than a GPU takes for a small shard."""
    flat, square = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(2, 3))
    shard = object.__new__(GradientShard)
    shard._runs = [[SimpleNamespace(holder=flat)]]  # type: ignore[list-item]
    shard._packed = [SimpleNamespace(holder=square)]  # type: ignore[list-item]
    first, second = shard.parameters
    assert first is flat
    assert second.shape == (6,)
    assert not second.requires_grad
    assert second.data_ptr() == square.data_ptr()


def settings_of(layout: str) -> list[dict[str, str]]:
    """Megatron's distributed optimizer takes Adam only; the cone is the same in each layout, and slow in the oracle."""
    with_sgd = not ALL_LAYOUTS[layout].distributed_optimizer
    return [
        setting
        for setting in SETTINGS
        if (with_sgd or setting["optimizer"] == "adam") and (layout in WITH_CONFLICT or setting["mode"] == "orthogonal")
    ]


def assert_like_one_process(settings: list[dict[str, str]], results: list[dict[str, Any]]) -> None:
    """What a rank found of the weights, setting by setting, is what one fp64 process has."""
    for setting, result in zip(settings, results, strict=True):
        assert result["error"] < TOLERANCE, setting
        assert result["length_error"] < TOLERANCE, setting
        assert result["removed"] > 0.01, setting
        assert result["copies_agree"], setting
        if setting["mode"] == "orthogonal":
            assert result["leak"] < TOLERANCE, setting


@pytest.mark.parametrize("layout", SHARDED)
def test_weights_are_those_of_one_process(distributed: Distributed, layout: str) -> None:
    group = distributed(ALL_LAYOUTS[layout].world_size)
    settings = settings_of(layout)
    for results in group.run("tests.core.update_cases:update_parity", layout=layout, settings=settings):
        assert_like_one_process(settings, results)


@pytest.mark.parametrize("clip_grad", [0.0, 1e6])
@pytest.mark.parametrize("layout", ["dp2", "dp2-plain", "dp2-bf16-plain"])
def test_an_optimizer_outside_a_chain(distributed: Distributed, layout: str, clip_grad: float) -> None:
    settings = [{"optimizer": "adam", "granularity": "model", "outside_chain": clip_grad}]
    for (result,) in distributed(2).run("tests.core.update_cases:update_parity", layout=layout, settings=settings):
        assert result["error"] < TOLERANCE
        assert result["leak"] < TOLERANCE
        assert result["copies_agree"]


@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2-plain", "ep2-dp2"])
def test_one_small_collective_more(distributed: Distributed, layout: str) -> None:
    job = "tests.core.contract_cases:collectives"
    group = distributed(LAYOUTS[layout].world_size)
    for result in group.run(job, layout=layout, granularity="model", num_references=3, space="update"):
        plain, projected = result["plain"], result["projected"]
        assert projected["all_reduce"] == plain["all_reduce"] + 1
        assert {**projected, "all_reduce": 0} == {**plain, "all_reduce": 0}
        assert result["refresh"] == {"all_reduce": 1}


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "dp2-plain", "tp2-fp16"])
def test_a_gradient_that_is_not_finite_changes_no_weight(distributed: Distributed, layout: str) -> None:
    group = distributed(ALL_LAYOUTS[layout].world_size)
    for result in group.run("tests.core.contract_cases:not_finite", layout=layout, bad_rank=1, space="update"):
        assert_all_ranks_skip(result)


@pytest.mark.parametrize(
    ("layout", "flag"),
    [("dp2-bf16-offload", "--optimizer-cpu-offload"), ("dp2-bf16-aware", "--optimizer-cpu-offload")],
)
def test_parameters_out_of_reach_are_refused(distributed: Distributed, layout: str, flag: str) -> None:
    for message in distributed(2).run("tests.core.update_cases:refused", layout=layout):
        assert message.startswith(f"{flag} with --ogpsa-space update: ")


def test_figures_for_the_log_are_not_waited_for(distributed: Distributed) -> None:
    for result in distributed(2).run("tests.core.update_cases:figures_on_the_device", layout="dp2"):
        assert result == {"on the device": True, "the same": True}
