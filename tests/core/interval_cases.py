"""What the ranks run to show what a refresh tells of the steps before it."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ogpsa import OGPSAConfig, attach
from tests.core import oracle
from tests.core.cases import planted, refresh_planted
from tests.core.gradients import plant
from tests.core.layouts import ALL_LAYOUTS
from tests.core.megatron_model import build
from tests.core.update_cases import main_weights

STEPS = 2


def inner(left: oracle.Tensors, right: oracle.Tensors) -> float:
    return float(sum((left[name] * right[name]).sum() for name in right))


def captured_share(gradient: oracle.Tensors, references: list[oracle.Tensors], granularity: str) -> float:
    """‖Qᵀa‖²/‖a‖² over all blocks."""
    parts = [
        oracle.span(oracle.unit_references(references, names)).T
        @ torch.cat([gradient[name].flatten() for name in names])
        for names in oracle.blocks(gradient, granularity)
    ]
    return float(torch.cat(parts).square().sum()) / oracle.norm(gradient) ** 2


def interval(layout: str, space: str, granularity: str, mode: str = "orthogonal") -> dict[str, Any]:
    """Two steps between two refreshes, against full tensors in fp64."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), lr=0.01)
    config = OGPSAConfig(space=space, mode=mode, granularity=granularity)  # type: ignore[arg-type]
    ogpsa = attach(training.optimizer, training.chunks, config)
    scale = training.optimizer.get_loss_scale().item()
    *old, gradient, first, second = planted(shape, 5, integers=False)
    refresh_planted(training, ogpsa, old, scale)
    is_empty_at_first = ogpsa.interval == {}
    reaches = ogpsa._shard.reaches_parameters
    before = main_weights(training) if reaches else {}
    for step in range(STEPS if reaches else 0):  # Megatron's offloaded optimizer steps on a GPU only
        plant(training, {name: tensor * (1 + step) for name, tensor in gradient.items()}, scale)
        training.optimizer.step()
    refresh_planted(training, ogpsa, [first, second], scale)
    told = [ogpsa.interval[f"reference {number}"] for number in range(2)]
    result: dict[str, Any] = {
        "is_empty_at_first": is_empty_at_first,
        "captured": [share.captured for share in told],
        "expected_captured": [captured_share(a, old, granularity) for a in (first, second)],
        "predicted": [share.predicted_change for share in told],
    }
    if reaches:
        after = main_weights(training)
        moved = {name: after[name] - before[name] for name in after}
        lengths = [oracle.norm(a) * oracle.norm(moved) for a in old]
        expected = [inner(a, moved) for a in old]
        result["predicted_error"] = max(
            abs(share.predicted_change - change) / length
            for share, change, length in zip(told, expected, lengths, strict=True)
        )
        result["predicted_share"] = [change / length for change, length in zip(expected, lengths, strict=True)]
    return result
