"""The watch over hangs in Megatron's training loop, and while checkpoints are scored.

Phases are told where Megatron tells its own fault-tolerance package, which needs another launcher
(``--enable-ft-package``, ``megatron/training/ft_integration.py``); without it those functions do nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches
from megatron_ogpsa.watchdog import Watch, progress
from megatron_ogpsa.watchdog.place import oldest_in_flight

DEFAULT_SHARE = 0.9
"""Of the process groups' timeout: enough before it to find out who is behind."""


def hang_timeout(args: argparse.Namespace) -> float:
    """Seconds that a rank may wait in one collective; 0 if nobody watches.

    Raises:
        UserError: longer than the process groups wait, which then end the run without a word on who hangs.
    """
    minutes, after_init = args.distributed_timeout_minutes, args.distributed_timeout_seconds_after_init
    limits = [(60.0 * minutes, f"--distributed-timeout-minutes {minutes}")]
    if after_init:
        limits.append((float(after_init), f"--distributed-timeout-seconds-after-init {after_init}"))
    limit, flag = min(limits)
    if args.ogpsa_hang_timeout is None:
        # Both of these of Megatron's watch over hangs themselves.
        return 0.0 if args.enable_ft_package or args.inprocess_restart else DEFAULT_SHARE * limit
    if args.ogpsa_hang_timeout >= limit:
        raise UserError(
            f"--ogpsa-hang-timeout {args.ogpsa_hang_timeout:g} is not below {flag} ({limit:g} s), which ends the run "
            "without saying who hangs: lower the one or raise the other"
        )
    return float(args.ogpsa_hang_timeout)


def watched(args: argparse.Namespace) -> AbstractContextManager[object]:
    """Watch over this rank within the with statement, as ``--ogpsa-hang-timeout`` says.

    Raises:
        UserError: the timeout cannot be.
    """
    timeout = hang_timeout(args)
    if timeout == 0 or args.world_size == 1:
        return nullcontext()
    apply_patches(_PHASES)
    return Watch(
        rank=args.rank,
        num_ranks=args.world_size,
        timeout=timeout,
        is_ready=dist.is_initialized,
        collective_in_flight=_nccl_collective_in_flight,
    )


def pulsing(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """``forward_step`` that counts as a sign of life."""

    @wraps(forward_step)
    def forward_step_with_pulse(*args: Any, **kwargs: Any) -> Any:
        progress.pulse()
        return forward_step(*args, **kwargs)

    return forward_step_with_pulse


def _nccl_collective_in_flight() -> str | None:
    """With NCCL a rank waits for its GPU, anywhere in the code; PyTorch's flight recorder knows what the GPU waits for."""
    if not torch.cuda.is_available():
        return None
    from torch._C import _distributed_c10d as c10d

    return oldest_in_flight(c10d._dump_nccl_trace_json(includeCollectives=True, onlyActive=True))  # type: ignore[attr-defined]


def _then(act: Callable[[], None]) -> Callable[[Any], Any]:
    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def original_then_act(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            act()
            return result

        return original_then_act

    return replace


def _begin_step() -> None:
    from megatron.training import get_args

    progress.begin_step(get_args().curr_iteration + 1)


def _phase(function: str, act: Callable[[], None]) -> Patch:
    return Patch(
        target=f"megatron.training.ft_integration:{function}",
        reason="Megatron 0.19's loop says what it begins and ends to its fault-tolerance package alone",
        replace=_then(act),
    )


_PHASES = (
    _phase("on_training_step_start", _begin_step),
    _phase("on_training_step_end", progress.pulse),
    _phase("on_eval_step_start", lambda: progress.enter("evaluation")),
    _phase("on_eval_step_end", lambda: progress.leave("evaluation")),
    _phase("on_checkpointing_start", lambda: progress.enter("save")),
    _phase("on_checkpointing_end", lambda: progress.leave("save")),
)
