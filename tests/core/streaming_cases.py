"""What the ranks run to compare a basis in host memory with one beside the gradient."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.plugin.streaming import HostRows
from tests.core import oracle
from tests.core.cases import planted, refresh_planted
from tests.core.gradients import plant
from tests.core.layouts import ALL_LAYOUTS
from tests.core.megatron_model import build


def _weights_after(layout: str, **settings: Any) -> tuple[list[Tensor], bool]:
    """After steps with two refreshes, and what each refresh told; and whether the basis was on the host."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    parallel_state.destroy_model_parallel()
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), lr=0.01)
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(**{"mode": "orthogonal"} | settings))
    told: list[float] = []
    *references, gradient = planted(shape, 5, integers=False)
    for pair in (references[:2], references[2:]):
        refresh_planted(training, ogpsa, pair)
        told += [number for of in ogpsa.interval.values() for number in vars(of).values()]
        for _ in range(2):
            plant(training, gradient)
            training.optimizer.step()
            told += ogpsa.metrics.values()
    assert ogpsa._space.basis is not None
    is_on_host = isinstance(ogpsa._space.basis.rows_KN, HostRows)
    weights = [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]
    return [*weights, torch.tensor(told, dtype=torch.float64)], is_on_host


def on_host_and_beside(layout: str, space: str) -> dict[str, bool]:
    results: dict[str, bool] = {}
    found = {}
    for dtype in ("fp32", "bf16"):
        host, is_on_host = _weights_after(layout, space=space, basis_dtype=dtype, basis_device="cpu")
        beside, is_beside = _weights_after(layout, space=space, basis_dtype=dtype)
        results[dtype] = all(map(torch.equal, host, beside))
        found[dtype] = beside
        results["is_on_host"] = is_on_host and not is_beside
    results["dtypes_differ"] = not all(map(torch.equal, found["fp32"], found["bf16"]))
    return results
