"""Megatron's optimizers and their state in checkpoints: faults of 0.19, each with its reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ogpsa.integration.runtime.patching import Patch


def _make_states(optimizer: Any) -> None:
    """Give a Megatron optimizer (Adam or SGD) that has not stepped yet the state that its first step would begin with."""
    inner, config = optimizer.optimizer, optimizer.config
    for group in inner.param_groups:
        for parameter in group["params"]:
            if config.optimizer == "sgd":
                if group["momentum"]:
                    inner.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            elif config.use_precision_aware_optimizer:  # as its step() does (Transformer Engine's FusedAdam)
                inner.initialize_state(parameter, inner.store_param_remainders and parameter.dtype == torch.bfloat16)
            else:
                inner.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if _is_of_torch(inner):
                    inner.state[parameter]["step"] = torch.tensor(0.0)


def _is_of_torch(inner: Any) -> bool:
    """Whether it is Adam of torch, which counts steps by parameter; others count them by group, from their first one."""
    return isinstance(inner, torch.optim.Adam)  # AdamW is one


def _is_several(inner: Any) -> bool:
    """Whether it is that of ``--optimizer-cpu-offload``, whose states Megatron makes."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    return isinstance(inner, HybridDeviceOptimizer)


def _with_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any = None, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        is_sgd = self.config.optimizer == "sgd"
        if not self.is_stub_optimizer and (is_sgd or self.config.optimizer == "adam"):
            is_megatrons = is_loading and not (_is_of_torch(self.optimizer) or is_sgd)  # which makes them itself then
            if not (self.optimizer.state or is_megatrons or _is_several(self.optimizer)):
                _make_states(self)
            if is_sgd:  # it has nothing there to be called
                self.init_state_fn = lambda *_: None
        return original(self, model_sharded_state_dict or {}, is_loading, *args, **kwargs)

    return sharded_state_dict


def _from_step_0(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        states = state_dict.get("optimizer", state_dict).get("state", {})
        if _is_of_torch(self.optimizer) and "common_step" not in states:
            for state in states.values():
                state.setdefault("step", torch.tensor(0.0))
        original(self, state_dict)

    return load_state_dict


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
    def set_main_param_and_optimizer_states(self: Any, model_param: Tensor, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None} | tensors)  # what is not a tensor is left as it is

    return set_main_param_and_optimizer_states


_NO_STATE_YET = (
    "it saves what state there is: none before the first step that is taken (in fp16 some 20 are skipped at first, while "
    "the loss scale is too large), or it ends in an assertion; from such a checkpoint no run can be resumed. "
)

OPTIMIZER_PATCHES = (
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        reason=(
            _NO_STATE_YET
            + "With torch's Adam (no Transformer Engine, no Apex) no other can be either: it reads the step "
            "out of the state before it has made that"
        ),
        replace=_with_states,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.sharded_state_dict",
        reason=_NO_STATE_YET + "SGD's no run can be resumed with: its state is not made for loading",
        replace=_with_states,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:FP32Optimizer.sharded_state_dict",
        reason=_NO_STATE_YET + "SGD's no run can be resumed with: its state is not made for loading",
        replace=_with_states,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.load_state_dict",
        reason="a step of 0 is not saved, and torch's Adam does not go on without one",
        replace=_from_step_0,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:FP32Optimizer.load_state_dict",
        reason="a step of 0 is not saved, and torch's Adam does not go on without one",
        replace=_from_step_0,
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
)
