"""What megatron-core's wheel needs to run fine-tuning whole: faults of 0.19, each with its reason."""

from __future__ import annotations

import functools
import importlib.util
import queue
from collections.abc import Callable
from typing import Any

import torch

from megatron_ogpsa.integration.runtime.patching import Patch


def _compiled_helpers_only_if_missing(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


def _with_states_before_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any = None, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        from megatron.core.optimizer import distrib_optimizer

        uses_torch_optimizer = not distrib_optimizer.HAVE_APEX_OR_TE and not self.is_stub_optimizer
        if is_loading and uses_torch_optimizer and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_sharded_state_dict or {}, is_loading, **kwargs)

    return sharded_state_dict


def _with_steps_of_their_own(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        from megatron.core.optimizer import distrib_optimizer

        steps = {float(group["step"]) for group in state_dict["optimizer"]["param_groups"] if "step" in group}
        original(self, state_dict)
        if not distrib_optimizer.HAVE_APEX_OR_TE and not self.is_stub_optimizer:
            (step,) = steps
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(step)

    return load_state_dict


def _overwriting_in_place(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None} | tensors)  # what is not a tensor is left as it is

    return set_main_param_and_optimizer_states


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
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        reason=(
            "with torch's Adam (no Transformer Engine, no Apex) it reads the step out of the optimizer's state before it "
            "has made that state, so that no checkpoint can be resumed"
        ),
        replace=_with_states_before_loading,
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        reason=(
            "it gives all of torch Adam's parameters one and the same step tensor, which every parameter then counts up, "
            "and fills it from a fresh optimizer: the bias correction of a resumed run would be wrong"
        ),
        replace=_with_steps_of_their_own,
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        reason=(
            "fp32 main parameters are views of the model's, which autograd lets nobody overwrite in place; and from a fully "
            "reshardable checkpoint it wants the step of torch's Adam, which its caller has left out to set it elsewhere"
        ),
        replace=_overwriting_in_place,
    ),
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
