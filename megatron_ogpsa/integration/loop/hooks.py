"""Where this project acts within Megatron's training loop.

``megatron.training`` has no callbacks, so three functions of its loop are wrapped: ``train_step`` (hooks act before it and
add figures after it), ``save_checkpoint_and_time`` (hooks act after it) and ``evaluate_and_print_results``, which a run that
has taken all its steps calls without a step before. A :class:`LoopHook` knows nothing of the
wrapping.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from megatron_ogpsa.integration.checkpoints.saving import announce_state, write_state_without_manifest
from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches

_hooks: Sequence[LoopHook] = ()
_has_started = False


class LoopHook:
    """What wants to act in the loop, by overriding some of these methods. Every rank makes each call."""

    def start(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], iteration: int) -> None:
        """Once, before the first step; the model is as loaded."""

    def before_step(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], step: int) -> None:
        """Before each step; ``step`` counts the steps already taken."""

    def before_evaluation(self, step: int) -> None:
        """Before each evaluation; of a run that has taken all its steps, :meth:`start` was not called."""

    def figures(self) -> dict[str, torch.Tensor]:
        """What the log line and TensorBoard gain after a step, in the form of Megatron's reduced losses."""
        return {}

    def after_step(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """After each step, on ranks that have its losses (the last pipeline stage's); must not communicate."""

    def state(self) -> dict[str, Any]:
        """What the state file in each checkpoint is to say, as JSON; the same on all ranks."""
        return {}

    def after_save(self) -> None:
        """After each checkpoint."""


def install_hooks(hooks: Sequence[LoopHook]) -> None:
    """Let ``hooks`` act in this process's training loop.

    Raises:
        RuntimeError: the functions to be wrapped are not those that this was written for.
    """
    global _hooks, _has_started
    _hooks, _has_started = tuple(hooks), False
    apply_patches(_LOOP_PATCHES)


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


def _told_of_evaluation(original: Callable[..., Any]) -> Callable[..., Any]:
    _require_parameters(original, "prefix forward_step_func data_iterator model iteration")

    @wraps(original)
    def evaluate_and_print_results(
        prefix: Any, forward_step_func: Any, data_iterator: Any, model: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        for hook in _hooks:
            hook.before_evaluation(iteration)
        return original(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs)

    return evaluate_and_print_results


def _saving_state(original: Callable[..., Any]) -> Callable[..., Any]:
    _require_parameters(original, "iteration model optimizer opt_param_scheduler")

    @wraps(original)
    def save_checkpoint_and_time(iteration: int, *args: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> Any:
        state: dict[str, Any] = {}
        for hook in _hooks:
            state |= hook.state()
        is_first = torch.distributed.get_rank() == 0
        if is_first:
            announce_state(_args(), iteration, state, is_persistent=not non_persistent_ckpt)
        result = original(iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
        if is_first:
            write_state_without_manifest(_args(), iteration, is_persistent=not non_persistent_ckpt)
        for hook in _hooks:
            hook.after_save()
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
    Patch(
        target="megatron.training.training:evaluate_and_print_results",
        reason="Megatron 0.19 evaluates after a loop of no steps, when what a loss needs has not been read yet",
        replace=_told_of_evaluation,
    ),
)
