"""Reference passes leave FP8 scales, histories and cached weights alone: on a stand-in for Transformer Engine.

The stand-in mimics its classes on the CPU, with real rounding to FP8; tests/gpu has the same on Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ogpsa.precision.fp8_state import ModuleState, has_forward_scales
from tests.harness import WorkerGroup
from tests.precision.stand_in import HISTORY, DelayedScalingRecipeState, TransformerEngineBaseModule

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


@pytest.mark.parametrize("length", [2, 6])
def test_a_history_of_another_length_is_put_back(length: int) -> None:
    """As from a checkpoint with another --fp8-amax-history-len: a pass makes it as long as the flag says."""
    module = TransformerEngineBaseModule(torch.nn.Identity(), "delayed")
    for key in ("scaling_fwd", "scaling_bwd"):
        state = module.fp8_meta[key] = DelayedScalingRecipeState(2)
        state.amax_history = torch.arange(1.0, 2 * length + 1).view(length, 2)
        state.scale.fill_(3.0)
    saved = ModuleState.of(module)
    for state in module.fp8_meta.values():
        state.amax_history = torch.full((HISTORY, 2), 9.0)
        state.scale.fill_(7.0)
    saved.restore()
    expected = [[1.0, 2.0], [3.0, 4.0], *([[0.0, 0.0]] * 2 if length == 2 else [[5.0, 6.0], [7.0, 8.0]])]
    for state in module.fp8_meta.values():
        assert state.amax_history.tolist() == expected
        assert state.scale.tolist() == [3.0, 3.0]


def test_scales_are_there_once_a_pass_has_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = TransformerEngineBaseModule(torch.nn.Identity(), "delayed")
    monkeypatch.setattr("megatron_ogpsa.precision.fp8_state.quantizing_modules", lambda chunks: [module])
    assert not has_forward_scales([module])
    module.fp8_meta["scaling_fwd"] = DelayedScalingRecipeState(2)  # as a forward pass makes it, or a checkpoint without
    assert not has_forward_scales([module])
    module.fp8_meta["scaling_fwd"].amax_history[1, 0] = 2.0
    assert has_forward_scales([module])


def test_the_first_reference_gradients_are_taken_with_scales_that_fit(distributed: Distributed) -> None:
    """Without a pass before them, gradients far below 1 would be rounded with the scale 1, in part to nothing."""
    for cosines in distributed(2).run("tests.precision.cases:first_gradients", layout="dp2"):
        assert cosines["with scales"] > 0.98  # E4M3 rounds to 3 bits; measured 0.987
        assert cosines["without"] < cosines["with scales"]
