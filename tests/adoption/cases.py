"""Jobs of the harness for the README's code."""

from __future__ import annotations

from typing import Any

from tests.core.cases import batch_of
from tests.core.layouts import LAYOUTS
from tests.core.megatron_model import build
from tests.core.oracle import ModelShape, random_weights


def readme_block(code: str) -> bool:
    """Run the README's Python block with a real optimizer, model and gradients; whether the step was projected."""
    shape = ModelShape()
    training = build(LAYOUTS["tp2"], random_weights(shape, seed=1))
    batches = {"math": batch_of(shape, 0), "chat": batch_of(shape, 1)}
    names: dict[str, Any] = {
        "optimizer": training.optimizer,
        "model": training.chunks,
        "get_gradient": lambda name: training.gradient(batches[name]),
    }
    exec(code, names)
    return bool(names["ogpsa"].metrics["rank"] == 2 and names["ogpsa"].metrics["removed"] > 0)
