"""Reference passes leave FP8 scales, histories and cached weights alone: on a stand-in for Transformer Engine.

The stand-in mimics its classes on the CPU, with real rounding to FP8; tests/gpu has the same on Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]


@pytest.mark.parametrize(("layout", "recipe"), [("dp2", "delayed"), ("tp2", "delayed"), ("dp2", "tensorwise")])
def test_refreshes_leave_no_trace_in_fp8(distributed: Distributed, layout: str, recipe: str) -> None:
    """Bitwise, from the first step on, when the modules have no state yet."""
    plain, refreshed = (
        distributed(2).run("tests.precision.cases:train", layout=layout, recipe=recipe, refreshes=refreshes)
        for refreshes in (False, True)
    )
    for without, with_them in zip(plain, refreshed, strict=True):
        assert with_them["changed"] == []
        assert with_them["caches left"] == 0
        assert _differences(without["end"], with_them["end"]) == []
        scales = [value for name, value in without["end"].items() if name.endswith(".scale")]
        assert all(bool((scale[0] != 1).all()) for scale in scales)  # FP8 was at work
        assert bool(scales) == (recipe == "delayed")


def _differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [name for name in left.keys() | right.keys() if not torch.equal(left[name], right[name])]


def test_the_first_reference_gradients_are_taken_with_scales_that_fit(distributed: Distributed) -> None:
    """Without a pass before them, gradients far below 1 would be rounded with the scale 1, in part to nothing."""
    for cosines in distributed(2).run("tests.precision.cases:first_gradients", layout="dp2"):
        assert cosines["with scales"] > 0.98  # E4M3 rounds to 3 bits; measured 0.987
        assert cosines["without"] < cosines["with scales"]
