"""Layouts and costs, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ogpsa.planning import costs
from megatron_ogpsa.planning.layout import Dimensions, Mesh, nearest, problem

LLAMA_8B = Dimensions(
    layers=32,
    heads=32,
    query_groups=8,
    ffn=14336,
    experts=0,
    expert_ffn=14336,
    seq_length=8192,
    micro_batch=1,
    global_batch=128,
)
MIXTRAL = replace(LLAMA_8B, experts=8)


@pytest.mark.parametrize(
    ("model", "mesh", "words", "change"),
    [
        (LLAMA_8B, Mesh(world=8, tensor=2), None, None),
        (LLAMA_8B, Mesh(world=8, tensor=3), "need a multiple of 3 GPUs, and there are 8", {"tensor": 4, "pipeline": 1}),
        (LLAMA_8B, Mesh(world=12, tensor=3), "does not divide 32 attention heads", {"tensor": 4, "pipeline": 1}),
        (replace(LLAMA_8B, query_groups=6), Mesh(world=8, tensor=4), "6 query groups do not divide", {"tensor": 2}),
        (replace(LLAMA_8B, ffn=14338), Mesh(world=8, tensor=4), "the MLP's width 14338", {"tensor": 2, "pipeline": 2}),
        (LLAMA_8B, Mesh(world=48, tensor=2, pipeline=3), "does not divide 32 layers", {"tensor": 2, "pipeline": 4}),
        (
            LLAMA_8B,
            Mesh(world=64, pipeline=8, virtual=3),
            "--pipeline-model-parallel-size 8 with 3 chunks each does not divide 32 layers",
            {"pipeline": 8, "virtual": 1},
        ),
        (replace(LLAMA_8B, seq_length=1002), Mesh(world=8, context=4), "does not cut 1002 tokens in 8", {"context": 1}),
        (LLAMA_8B, Mesh(world=8, expert=2), "--expert-model-parallel-size 2 without experts", {"expert": 1}),
        (MIXTRAL, Mesh(world=32, expert=16), "does not divide 8 experts", {"expert": 8}),
        (MIXTRAL, Mesh(world=8, tensor=2, expert=8, expert_tensor=2), "need a multiple of 16 GPUs", {"expert": 4}),
        (
            replace(MIXTRAL, expert_ffn=14337),
            Mesh(world=8, tensor=2, expert=2, expert_tensor=2),
            "an expert's width 14337",
            {"expert_tensor": 1},
        ),
    ],
)
def test_what_does_not_come_out_even_and_the_nearest_that_does(
    model: Dimensions, mesh: Mesh, words: str | None, change: dict[str, int] | None
) -> None:
    reason = problem(model, mesh)
    if words is None:
        assert reason is None
        return
    assert reason is not None
    assert words in reason
    found = nearest(model, mesh)
    assert found is not None
    assert problem(*found) is None
    assert {name: getattr(found[1], name) for name in change or {}} == change


def test_a_batch_that_cannot_be_dealt_out_is_rounded_up() -> None:
    mesh = Mesh(world=24, tensor=2)
    reason = problem(LLAMA_8B, mesh)
    assert reason is not None
    assert "--global-batch-size 128 is not a multiple of 12" in reason
    found = nearest(LLAMA_8B, mesh)
    assert found is not None
    assert found[1] == mesh
    assert found[0].global_batch == 132


def test_nothing_fits() -> None:
    assert nearest(
        replace(LLAMA_8B, layers=7, even_stages=True, heads=1), Mesh(world=4, expert_tensor=1, tensor=1)
    ) == (
        replace(LLAMA_8B, layers=7, heads=1),
        Mesh(world=4),
    )
    assert nearest(replace(LLAMA_8B, seq_length=8192, ffn=0, heads=0, layers=0), Mesh(world=4)) is None


SHARD = costs.ShardSize(
    elements=1000, trained=2000, packed=0, weight_bytes=2000, gradient_bytes=4000, state_bytes=12000
)
PROJECTION = costs.Projection(references=2, basis_bytes=4, on_host=False, of_update=False, blocks=10)


def test_bytes() -> None:
    assert SHARD.megatron_bytes == 18000
    assert costs.memory(PROJECTION, SHARD) == costs.Memory(accelerator=8000, host=0, refresh=8000)
    bf16_on_host = replace(PROJECTION, basis_bytes=2, on_host=True)
    assert costs.memory(bf16_on_host, replace(SHARD, packed=1000)) == costs.Memory(
        accelerator=4000 + 2 * 2 * 1000 * 2, host=4000, refresh=8000
    )
    large = costs.memory(bf16_on_host, replace(SHARD, elements=10**9))
    assert (large.accelerator, large.host) == (2 * 2 * 2**24 * 2, 4 * 10**9)
    assert costs.step_traffic(PROJECTION, SHARD) == 1000 * (2 * (8 + 4) + 4)
    assert costs.step_traffic(replace(PROJECTION, of_update=True), SHARD) == 1000 * (3 * (8 + 4) + 8)
    assert costs.step_message(PROJECTION) == 10 * 3 * 8
    assert costs.step_message(replace(PROJECTION, of_update=True)) == 10 * 2 * 8
    assert costs.refresh_message(PROJECTION) == 10 * (4 + 4 + 2) * 8


def test_time_of_refreshes() -> None:
    """The paper's SFT: 2 x 200 reference samples against 30 steps of 128 rows are 400 in 4,240."""
    reference = costs.reference_micro_batches(200, micro_batch=4, data_parallel=1)
    assert reference == 50
    share = costs.refresh_share(32, [reference] * 2, interval=30, pipeline=1, virtual=1)
    assert share == pytest.approx(400 / 4240)
    assert costs.reference_micro_batches(200, micro_batch=4, data_parallel=8, multiple=4) == 8
    with_bubble = costs.refresh_share(4, [4], interval=1, pipeline=5, virtual=2)
    assert with_bubble == pytest.approx(0.5)
    assert costs.refresh_share(4, [2], interval=1, pipeline=5, virtual=2) == pytest.approx(4 / (4 + 6))
    assert costs.refresh_share(4, [2], interval=1, pipeline=5, virtual=2, cost=2) == pytest.approx(8 / (8 + 6))


@pytest.mark.parametrize(
    ("round_", "save_interval", "expected"), [(30, None, 30), (30, 100, 25), (30, 5, 5), (1, 100, 1), (30, 30, 30)]
)
def test_checkpoints_are_refreshes_too(round_: int, save_interval: int | None, expected: float) -> None:
    assert costs.refresh_interval(round_, save_interval, steps=100) == pytest.approx(expected)


def test_early_refreshes_weigh_in_short_runs() -> None:
    """Eight more in 120 steps, which have one every 30; those that a run does not reach do not count."""
    early = [1, 2, 4, 6, 9, 12, 16, 20]
    assert costs.refresh_interval(30, None, 120, early) == pytest.approx(120 / 12)
    assert costs.refresh_interval(30, None, 12, early) == pytest.approx(12 / (12 / 30 + 5))
