"""Where this project acts within Megatron's training loop.

``megatron.training`` has no callbacks, so two functions of its loop are wrapped: ``train_step`` (hooks act before it and
add figures after it) and ``save_checkpoint_and_time`` (hooks act after it). A :class:`LoopHook` knows nothing of the
wrapping.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.files import write_json
from megatron_ogpsa.integration.patching import Patch, apply_patches

logger = logging.getLogger(__name__)

STATE_FILE = "ogpsa.json"
"""Beside the checkpoints: the settings, references and reference policy of the run."""

_hooks: Sequence[LoopHook] = ()
_has_started = False


class LoopHook(Protocol):
    """What wants to act in the loop. Every rank makes each call."""

    def start(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], iteration: int) -> None:
        """Once, before the first step; the model is as loaded."""

    def before_step(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], step: int) -> None:
        """Before each step; ``step`` counts the steps already taken."""

    def figures(self) -> dict[str, torch.Tensor]:
        """What the log line and TensorBoard gain after a step, in the form of Megatron's reduced losses."""

    def after_step(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """After each step, on ranks that have its losses (the last pipeline stage's); must not communicate."""

    def after_save(self) -> None:
        """After each checkpoint, before its state file is written."""

    def state(self) -> dict[str, Any]:
        """What the state file is to say, as JSON; the same on all ranks."""


def install_hooks(hooks: Sequence[LoopHook]) -> None:
    """Let ``hooks`` act in this process's training loop; without any the loop is Megatron's own.

    Raises:
        RuntimeError: the functions to be wrapped are not those that this was written for.
    """
    global _hooks, _has_started
    _hooks, _has_started = tuple(hooks), False
    if hooks:
        apply_patches(_LOOP_PATCHES)


def read_state(folder: Path) -> dict[str, Any]:
    """The state file beside the checkpoints in ``folder``; empty if there is none.

    Raises:
        UserError: it is there and is not what we write.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or delete it to resume unchecked") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a JSON object: restore it, or delete it to resume unchecked")
    return state


def _with_hooks(original: Callable[..., Any]) -> Callable[..., Any]:
    _require_parameters(
        original,
        "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration",
    )

    @wraps(original)
    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int | None = None,
        **kwargs: Any,
    ) -> Any:
        global _has_started
        step = _args().curr_iteration if iteration is None else iteration
        if not _has_started:
            for hook in _hooks:
                hook.start(model, optimizer, forward_backward_func, step)
            _has_started = True
        for hook in _hooks:
            hook.before_step(model, optimizer, forward_backward_func, step)
        losses, *others = original(
            forward_step_func,
            data_iterator,
            model,
            optimizer,
            opt_param_scheduler,
            config,
            forward_backward_func,
            iteration=iteration,
            **kwargs,
        )
        if losses:  # only the last pipeline stage has losses, and logs
            for hook in _hooks:
                losses = losses | hook.figures()
                hook.after_step(losses, step + 1)
        return (losses, *others)

    return train_step


def _saving_state(original: Callable[..., Any]) -> Callable[..., Any]:
    _require_parameters(original, "iteration model optimizer opt_param_scheduler")

    @wraps(original)
    def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        state: dict[str, Any] = {}
        for hook in _hooks:
            hook.after_save()
            state |= hook.state()
        if _hooks and torch.distributed.get_rank() == 0:
            write_json(Path(_args().save) / STATE_FILE, state)
        return result

    return save_checkpoint_and_time


def _args() -> argparse.Namespace:
    from megatron.training import get_args

    args: argparse.Namespace = get_args()
    return args


def _require_parameters(function: Callable[..., Any], names: str) -> None:
    expected = names.split()
    found = list(inspect.signature(function).parameters)[: len(expected)]
    if found != expected:
        raise RuntimeError(f"{function.__name__} takes {found}, not {expected} as in Megatron 0.19")


_LOOP_PATCHES = (
    Patch(
        target="megatron.training.training:train_step",
        reason="Megatron 0.19's loop has no callback before a step; references are refreshed there",
        replace=_with_hooks,
    ),
    Patch(
        target="megatron.training.training:save_checkpoint_and_time",
        reason="Megatron 0.19's loop has no callback after a checkpoint; a resumed run refreshes there, so we must too",
        replace=_saving_state,
    ),
)
