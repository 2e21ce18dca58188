"""Reference passes through Megatron's schedules: the gradients that an unsharded model has, and no trace of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.precision.loss_scale import FIRST_SCALE
from megatron_ogpsa.references import one_pass
from megatron_ogpsa.references.gradients import Reference, cut_reference
from tests.core.layouts import LAYOUTS
from tests.core.test_parity import FP32_TOLERANCE
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]


def test_a_reference_does_not_depend_on_those_before_it(distributed: Distributed) -> None:
    """Bitwise, though a pass draws random numbers and moves the bias by which experts are chosen."""
    for errors in distributed(2).run("tests.core.reference_cases:order_of_references", layout="ep2-dropout"):
        assert errors == {"0": 0.0, "1": 0.0, "2": 0.0}


def test_references_take_the_mean_over_tokens_whatever_training_takes(distributed: Distributed) -> None:
    """Their losses that balance experts too: these routers weigh on their own. fp32 rounding of other scales, 1e-7."""
    for error in distributed(2).run("tests.core.reference_cases:mean_of_training", layout="ep2-dropout"):
        assert error < 1e-6


@pytest.mark.parametrize("layout", ["tp2-fp16", "dp2-fp16-plain"])
def test_references_in_fp16_have_a_loss_scale_of_their_own(distributed: Distributed, layout: str) -> None:
    """Megatron's begins where every gradient overflows. 1e-2: fp16 has 11 bits, and weights are rounded to them."""
    refresh = "tests.core.reference_cases:refresh_in_fp16"
    for result in distributed(2).run(refresh, layout=layout, first_scale=FIRST_SCALE):
        assert result["is_new"]
        assert result["scales"][0] == FIRST_SCALE
        assert result["error"] < 1e-2
    for result in distributed(2).run(refresh, layout=layout, first_scale=2.0**27):
        assert (result["is_new"], result["rejected"]) == (True, 0)
        assert result["scales"][:3] == [2.0**27, 2.0**23, 2.0**19]  # too large, on all ranks
        assert result["scales"][-1] < 2.0**19
        assert result["next"] == min(FIRST_SCALE, 2 * result["scales"][-1])
        assert result["training's"] == 2.0**32
        assert result["error"] < 1e-2


def test_generators_of_a_tracker_for_cuda_graphs_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's tracker and Megatron's for graphs hand out the generators that passes advance, not states."""

    class Tracker:
        def __init__(self) -> None:
            self.states_ = {"model-parallel-rng": torch.Generator().manual_seed(5)}

        def get_states(self) -> dict[str, torch.Generator]:
            return dict(self.states_)

        def set_states(self, states: dict[str, torch.Generator]) -> None:
            self.states_ = states

    tracker = Tracker()
    generator = tracker.states_["model-parallel-rng"]
    monkeypatch.setattr(one_pass, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    before = generator.get_state()
    with one_pass._random_states():
        torch.rand(3, generator=generator)
    assert tracker.states_["model-parallel-rng"] is generator  # graphs hold on to it
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2-overlap", "dp2-plain", "pp2-tied", "ep2-sigmoid-bias"])
def test_references_are_unsharded_gradients_and_leave_no_trace(distributed: Distributed, layout: str) -> None:
    """Reduced, finalised, each on its own; and all that a pass draws, counts or switches is as it was."""
    group = distributed(LAYOUTS[layout].world_size)
    results = group.run("tests.core.pass_cases:reference_passes", layout=layout)
    for result in results:
        assert result["is_new"]
        assert max(result["errors"]) < FP32_TOLERANCE
        assert result["changed"] == []
        assert result["gradient_left"] == 0.0
        if result["losses"]:
            assert result["losses"] == pytest.approx(result["expected_losses"], rel=FP32_TOLERANCE)
    is_last = [rank >= len(results) - len(results) // LAYOUTS[layout].pp for rank in range(len(results))]
    assert [bool(result["losses"]) for result in results] == is_last


@pytest.mark.parametrize("layout", ["dp2", "pp2", "tp2-sp"])
def test_parts_of_a_reference_are_gradients_of_disjoint_samples(distributed: Distributed, layout: str) -> None:
    for result in distributed(LAYOUTS[layout].world_size).run(
        "tests.core.pass_cases:parts_of_a_reference", layout=layout
    ):
        assert result["names"] == ["math (1/2)", "math (2/2)"]
        assert max(result["errors"]) < FP32_TOLERANCE
        assert result["rank"] == 2


def test_too_few_samples_for_so_many_parts() -> None:
    """The rows that even micro-batches out must not be a part of their own: its gradient would be 0/0."""
    row = {"tokens": torch.ones(4), "loss_mask": torch.ones(4)}
    sizes = SimpleNamespace(num_samples=9, num_supervised_tokens=36, fingerprint="")

    def cut(reference_rank: int, rows: int) -> Reference:
        return cut_reference(
            "math",
            [row] * rows,
            sizes,  # type: ignore[arg-type]
            forward_step=print,
            loss="nll",
            micro_batch_size=2,
            data_parallel_rank=0,
            data_parallel_size=2,
            reference_rank=reference_rank,
        )

    assert [len(part) for part in cut(3, rows=9).parts.values()] == [1, 1, 1]
    assert [*cut(1, rows=9).parts] == ["math"]
    with pytest.raises(
        UserError, match=r"^--ogpsa-rank-per-reference 3: reference math has 8 rows, of which a part takes 4"
    ):
        cut(3, rows=8)
