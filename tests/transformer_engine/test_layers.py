"""Models of Transformer Engine's layers, which all users with GPUs have: projected as one unsharded fp64 process would."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core import test_parity, test_update_space
from tests.core.layouts import ALL_LAYOUTS, FP8, FUSED_ATTENTION, FUSED_DOWN, TRANSFORMER_ENGINE
from tests.core.test_parity import FP32_TOLERANCE
from tests.core.test_update_space import SETTINGS
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]

SHARDED_OTHERWISE = (
    *("te-tp2-sp-bias", "te-tp2-tied", "te-ep2", "te-ep2-bias", "te-tp2-moe", "te-tp2-latent", "te-dp2-latent-fused"),
    *FUSED_DOWN,
)
"""Layouts that differ in which blocks there are, and who holds what of them."""

UPDATES = ("te-pp2", "te-tp2-sp-bias", "te-dp2-overlap", "te-ep2-plain", *FP8)


@pytest.mark.parametrize("layout", TRANSFORMER_ENGINE)
def test_projected_gradient_equals_the_unsharded_one(distributed_te: Distributed, layout: str) -> None:
    group = distributed_te(TRANSFORMER_ENGINE[layout].world_size)
    for results in group.run("tests.core.cases:parity", layout=layout):
        test_parity.assert_like_one_process(results)


@pytest.mark.parametrize("layout", [name for name in FUSED_ATTENTION if name != "te-bf16"])
def test_context_parallel_attention_takes_the_right_positions(distributed_te: Distributed, layout: str) -> None:
    """Fused attention takes 16 bits: as far from fp64 as one process in 16 bits is, where a wrong position gives 0.5."""
    (alone,) = distributed_te(1).run("tests.core.cases:parity", layout="te-bf16")
    for results in distributed_te(FUSED_ATTENTION[layout].world_size).run("tests.core.cases:parity", layout=layout):
        for granularity, result in results.items():
            assert result["num_blocks"] == result["expected_num_blocks"], granularity
            assert result["error"] < 1.5 * alone[granularity]["error"] < 0.05, granularity
            assert result["leak"] < FP32_TOLERANCE, granularity


@pytest.mark.parametrize("layout", [*SHARDED_OTHERWISE, *FP8])
def test_gram_matrices_are_bitwise_those_of_the_unsharded_model(distributed_te: Distributed, layout: str) -> None:
    assert all(distributed_te(2).run("tests.core.cases:integer_gram", layout=layout))


@pytest.mark.parametrize("layout", [*FP8, *FUSED_DOWN])
def test_planted_gradients_are_projected_in_fp32(distributed_te: Distributed, layout: str) -> None:
    """Those of weights held in FP8 too. Planted in Megatron's buffers, where only the projection can round."""
    for result in distributed_te(2).run("tests.core.cases:planted_parity", layout=layout, granularity="tensor"):
        assert result["error"] < FP32_TOLERANCE
        assert result["norm_error"] < FP32_TOLERANCE


@pytest.mark.parametrize("layout", UPDATES)
def test_weights_are_those_of_one_process(distributed_te: Distributed, layout: str) -> None:
    """Projected updates of Transformer Engine's Adam; weights held in FP8 are the main parameters, rounded."""
    settings = [setting for setting in SETTINGS if setting["optimizer"] == "adam"]
    if layout in FP8:
        settings = settings[:1]
    group = distributed_te(ALL_LAYOUTS[layout].world_size)
    for results in group.run("tests.core.update_cases:update_parity", layout=layout, settings=settings):
        test_update_space.assert_like_one_process(settings, results)
