"""Jobs of the harness for the README's code."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from megatron.core import parallel_state

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
    return bool(names["ogpsa"].metrics["rank"] == 2 and "removed_length" in names["ogpsa"].metrics)


def page_of_own_loop(attaching: str, loop: str, leaving: str) -> dict[str, bool]:
    """Run the page's blocks undisturbed, resumed after 3 steps, where no other refresh is due, and without the
    refresh after the checkpoint."""
    undisturbed, names, saved = _loop_of_page([attaching, loop], [(0, 6)])
    resumed, *_ = _loop_of_page([attaching, loop], [(0, 3), (3, 6)])
    line = "refresh_is_due = True  # as"
    forgetful, *_ = _loop_of_page([attaching, loop.replace(line, "pass  # as")], [(0, 6)])
    is_attached = "prepare_grads" in names["optimizer"].__dict__
    exec(leaving, names)
    return {
        "saved": saved == [3, 6],
        "projected": all(step["rank"] == 2 for step in names["logged"])
        and any(step["removed_length"] > 0 for step in names["logged"]),
        "resumed as undisturbed": all(map(torch.equal, resumed, undisturbed)),
        "the refresh after a checkpoint matters": loop.count(line) == 1
        and not all(map(torch.equal, forgetful, undisturbed)),
        "detached": is_attached and "prepare_grads" not in names["optimizer"].__dict__,
    }


def _loop_of_page(
    code: list[str], parts: list[tuple[int, int]]
) -> tuple[list[torch.Tensor], dict[str, Any], list[int]]:
    """The weights after the code ran once for each range of steps, on one optimizer; and the names of the last time."""
    parallel_state.destroy_model_parallel()
    shape = ModelShape()
    training = build(LAYOUTS["tp2"], random_weights(shape, seed=1), lr=0.01)
    names: dict[str, Any] = {}
    saved: list[int] = []
    for first, last in parts:
        if names:
            names["ogpsa"].detach()
        logged: list[dict[str, float]] = []
        names = {
            "optimizer": training.optimizer,
            "model": training.chunks,
            "references": {"math": batch_of(shape, 0), "chat": batch_of(shape, 1)},
            "get_gradient": training.gradient,
            "batches": (batch_of(shape, 100 + step) for step in count(first)),
            "first_step": first,
            "last_step": last,
            "save_interval": 3,
            "save": saved.append,
            "log": lambda step, logged=logged, **figures: logged.append(figures),
            "logged": logged,
        }
        exec("\n".join(code), names)
    return [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()], names, saved
