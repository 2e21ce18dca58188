"""What megatron-core's wheel needs to run fine-tuning whole: faults of 0.19, each with its reason."""

from __future__ import annotations

import functools
import importlib.util
import queue
from collections.abc import Callable
from typing import Any

from megatron_ogpsa.integration.runtime.optimizer_states import OPTIMIZER_PATCHES
from megatron_ogpsa.integration.runtime.patching import Patch


def _compiled_helpers_only_if_missing(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


def _with_rope_scaling_factor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gpt_config_from_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        config = original(args, *rest, **kwargs)
        config.rope_scaling_factor = args.rope_scaling_factor
        return config

    return gpt_config_from_args


def _in_process_unless_async(original: Callable[..., Any]) -> Callable[..., Any]:
    written: queue.Queue[Any] = queue.Queue()

    @functools.wraps(original)
    def get_write_results_queue(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        return original(*args, **kwargs) if get_args().async_save else written

    return get_write_results_queue


def _with_forked_workers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_pretraining_data_loader(*args: Any, **kwargs: Any) -> Any:
        loader = original(*args, **kwargs)
        if getattr(loader, "num_workers", 0):
            loader.multiprocessing_context = "fork"
        return loader

    return build_pretraining_data_loader


GPU_PATCHES = (
    Patch(
        target="megatron.training.training:build_pretraining_data_loader",
        reason="its workers take a local function along, so they must be forked: Python 3.14 does so no longer unasked",
        replace=_with_forked_workers,
    ),
)
"""The CPU runtime has a patch of its own for this place."""

WHEEL_PATCHES = (
    *OPTIMIZER_PATCHES,
    Patch(
        target="megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        reason=(
            "a checkpoint that is not saved asynchronously is written by threads of the rank itself, yet each rank starts "
            "a process to pass the results on: it imports torch once more in the middle of the first save, and outlives a "
            "killed rank, holding the job's output open"
        ),
        replace=_in_process_unless_async,
    ),
    Patch(
        target="megatron.training.argument_utils:gpt_config_from_args",
        reason="it drops --rope-scaling-factor, so that a Llama 3.2 (32) would be trained with Llama 3.1's (8)",
        replace=_with_rope_scaling_factor,
    ),
    Patch(
        target="megatron.core.datasets.utils:compile_helpers",
        reason="the wheel ships the compiled index builder and no Makefile, so that compiling it would end the run",
        replace=_compiled_helpers_only_if_missing,
    ),
)
"""On any machine."""
