"""Reference passes leave the FP8 state of Transformer Engine's modules alone: scales, histories and cached weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.core.layouts import ALL_LAYOUTS
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
CASES = "tests.transformer_engine.fp8_cases"


@pytest.mark.parametrize(
    ("layout", "in_bf16"),
    [
        ("te-tp2-fp8-delayed", False),
        ("te-tp2-fp8-delayed", True),
        ("te-dp2-fp8-cached", False),
        ("te-ep2-fp8-tensorwise", False),
    ],
)
def test_refreshes_leave_no_trace(distributed_te: Distributed, layout: str, in_bf16: bool) -> None:
    """Bitwise, from the first step on, when the modules have no state yet."""
    plain = distributed_te(2).run(f"{CASES}:train", layout=layout, refreshes=False)
    refreshed = distributed_te(2).run(f"{CASES}:train", layout=layout, refreshes=True, in_bf16=in_bf16)
    for without, with_them in zip(plain, refreshed, strict=True):
        assert with_them["changed"] == []
        assert with_them["caches left"] == 0
        assert _differences(without["end"], with_them["end"]) == []
        scales = [value for name, value in without["end"].items() if name.endswith("fwd.scale")]
        at_work = [scale for scale in scales if bool((scale[:2] != 1).all())]  # of inputs and weights
        assert len(at_work) == len(scales) * 4 // 5  # attention, the fifth module of a layer, is not in FP8
        assert bool(scales) == (ALL_LAYOUTS[layout].fp8 == "delayed")


def _differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [name for name in left.keys() | right.keys() if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("length", [2, 6])
def test_a_history_of_another_length_is_put_back(distributed_te: Distributed, length: int) -> None:
    """As from a checkpoint with another --fp8-amax-history-len: a pass makes it as long as the flag says."""
    for found, in_use, *states in distributed_te(2).run(f"{CASES}:history_of_another_length", length=length):
        assert found == [False, True]  # scales are there once a pass has been seen
        assert in_use == 4
        for history, scale in states:
            kept = torch.arange(1.0, length * history.shape[1] + 1).view(length, -1)[:in_use]
            assert torch.equal(history[: len(kept)], kept)
            assert not history[len(kept) :].any()
            assert len(history) == in_use
            assert bool((scale == 3.0).all())


@pytest.mark.parametrize(("layout", "needs_them"), [("te-dp2-fp8-cached-e4m3", True), ("te-dp2-fp8-delayed", False)])
def test_the_first_reference_gradients_are_taken_with_scales_that_fit(
    distributed_te: Distributed, layout: str, needs_them: bool
) -> None:
    """Without a pass before them, gradients far below 1 would be rounded with the scale 1, in part to nothing.

    In E4M3, whose smallest number is 0.002; in E5M2, where it is 1.5e-5, these gradients fit without.
    """
    for cosines in distributed_te(2).run(f"{CASES}:first_gradients", layout=layout):
        assert cosines["with scales"] > 0.98  # E4M3 rounds to 3 bits, E5M2 to 2; measured 0.986 and 0.989
        assert (cosines["without"] < 0.9) == needs_them, cosines


@pytest.mark.parametrize(
    "layout", ["te-dp2-fp8-cached", "te-tp2-fp8-delayed", "te-dp2-fp8-blockwise", "te-ep2-fp8-tensorwise"]
)
def test_reference_gradients_without_fp8_are_those_of_a_model_in_bf16(distributed_te: Distributed, layout: str) -> None:
    """Bitwise; before the first pass in FP8 and after a step in it, with weights in bf16 and in FP8."""
    for found in distributed_te(2).run(f"{CASES}:gradients_without_fp8", layout=layout):
        assert found["differ"] == []
        assert found["differ after a step"] == []
        assert 0.95 < found["cosine in FP8"] < 0.9999  # the passes of a step are in FP8 still
        assert found["settings"] == [(None, False), ("hybrid", True)]
        before, after = found["last passes"]
        assert after == before
        assert (True, True, True) in before
