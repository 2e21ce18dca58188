"""A stand-in for Transformer Engine on the CPU: the FP8 state of its modules, with real rounding to FP8.

Transformer Engine cannot be imported without a GPU. These classes keep state under the names and in the way of its
version 2.20 (``pytorch/module/base.py``, ``pytorch/quantization.py``): scales and amax histories made in the first
forward pass, registered in global buffers that hold views, rolled and reduced over ranks as the autocast region ends
and as the backward pass of its first module ends, and weights that are quantised in the first micro-batch only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

FP8_MAX = 448.0
HISTORY = 4


class RecipeState:
    """Of a recipe without state (``Float8CurrentScalingRecipeState``)."""


class DelayedScalingRecipeState(RecipeState):
    def __init__(self, num_quantizers: int) -> None:
        self.scale = torch.ones(num_quantizers)
        self.amax_history = torch.zeros(HISTORY, num_quantizers)


class FP8GlobalStateManager:
    """The buffers of the amax reduction, and its own answers about the GPU."""

    buffers: ClassVar[dict[bool, list[DelayedScalingRecipeState]]] = {True: [], False: []}
    answers: ClassVar[dict[str, tuple[bool, str]]] = {}

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        for state in cls.buffers[forward]:
            amax = state.amax_history[0].clone()
            dist.all_reduce(amax, op=dist.ReduceOp.MAX)
            state.amax_history[0].copy_(amax)
            largest = state.amax_history.max(dim=0).values
            state.scale.copy_(torch.where(largest > 0, FP8_MAX / largest, state.scale))
            state.amax_history.copy_(torch.roll(state.amax_history, -1, 0))
            state.amax_history[0].zero_()

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return cls.answers.get("fp8", (True, ""))

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return cls.answers.get("blockwise", (True, ""))

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        return cls.answers.get("mxfp8", (True, ""))


def rounded(values: Tensor, state: RecipeState, slot: int) -> Tensor:
    """``values`` in FP8 and back; delayed scaling notes the largest magnitude and uses the scale of earlier passes."""
    amax = values.detach().abs().max().float()
    scale = FP8_MAX / amax.clamp(min=1e-12)
    if isinstance(state, DelayedScalingRecipeState):
        state.amax_history[0, slot] = torch.maximum(state.amax_history[0, slot], amax)
        scale = state.scale[slot].clone()
    scaled = (values.float() * scale).clamp(-FP8_MAX, FP8_MAX)
    return (scaled.to(torch.float8_e4m3fn).float() / scale).to(values.dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    """The state of one module; a hook lets it quantise what goes into and comes back to a layer of Megatron's."""

    def __init__(self, layer: torch.nn.Module, recipe: str) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self._fp8_workspaces: dict[str, Tensor] = {}
        self.is_first_microbatch = True
        self._recipe = recipe
        layer.register_forward_pre_hook(self._quantise)

    def get_fp8_meta_tensors(self) -> Any:
        keys = ("scaling_fwd", "scaling_bwd")
        if any(key not in self.fp8_meta for key in keys):
            return None
        return {key: [self.fp8_meta[key].scale.clone(), self.fp8_meta[key].amax_history.clone()] for key in keys}

    def reset_fp8_meta_tensors(self, fp8_meta_tensors: Any = None) -> None:
        for key in ("scaling_fwd", "scaling_bwd"):
            state = self.fp8_meta[key]
            new = fp8_meta_tensors[key] if fp8_meta_tensors else (torch.ones_like(state.scale), torch.zeros(HISTORY, 2))
            state.scale.copy_(new[0])
            state.amax_history.copy_(new[1])

    def _quantise(self, layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if "scaling_fwd" not in self.fp8_meta:
            for forward, key in ((True, "scaling_fwd"), (False, "scaling_bwd")):
                if self._recipe == "delayed":
                    self.fp8_meta[key] = DelayedScalingRecipeState(2)
                    FP8GlobalStateManager.buffers[forward].append(self.fp8_meta[key])
                else:
                    self.fp8_meta[key] = RecipeState()
        if self.is_first_microbatch or "weight" not in self._fp8_workspaces:
            self._fp8_workspaces["weight"] = rounded(layer.weight, self.fp8_meta["scaling_fwd"], 1).detach()
        self.is_first_microbatch = False
        through = _Rounding.apply(inputs[0], layer.weight, self._fp8_workspaces["weight"], self.fp8_meta)
        return (through, *inputs[1:])


class _Rounding(torch.autograd.Function):
    """Rounds the input forwards and the gradient backwards; what the cached weight lost goes into the input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, cached: Tensor, fp8_meta: dict[str, Any]) -> Tensor:  # type: ignore[override]
        ctx.state = fp8_meta["scaling_bwd"]
        share = cached.abs().sum() / weight.detach().abs().sum()
        return rounded(values, fp8_meta["scaling_fwd"], 0) * share

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return rounded(gradient, ctx.state, 0), None, None, None


@contextmanager
def installed() -> Iterator[None]:
    """Let ``transformer_engine`` and Megatron's way to it mean the above, until the end."""
    from megatron.core import fp8_utils

    names = ["transformer_engine", *(f"transformer_engine.{n}" for n in ("pytorch", "pytorch.module"))]
    modules = {name: ModuleType(name) for name in [*names, "transformer_engine.pytorch.module.base"]}
    modules["transformer_engine.pytorch.module.base"].TransformerEngineBaseModule = TransformerEngineBaseModule  # type: ignore[attr-defined]
    sys.modules |= modules
    fp8_utils.FP8GlobalStateManager = FP8GlobalStateManager
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        del fp8_utils.FP8GlobalStateManager
        FP8GlobalStateManager.buffers = {True: [], False: []}
        FP8GlobalStateManager.answers = {}
