"""What a forward and backward pass in FP8 changes in Transformer Engine's modules, put back as it was.

Only delayed scaling keeps state of its own: a scale and a history of largest magnitudes (amax) for each quantised tensor,
which a pass rolls on and reduces over ranks. That is the recipe ``delayed``, and attention in FP8 with any recipe. All
recipes keep FP8 copies of 16-bit weights from one micro-batch to the next. Those are made from the weights in the first
micro-batch of each step (Megatron's schedules set ``is_first_microbatch``), so that nobody reads old ones; they are dropped
rather than copied, which costs no memory. What activation recomputation sets aside in the forward pass its backward pass
takes out again.

Parameters that are FP8 themselves (``--fp8-param-gather``) are written by the optimizer alone. Read against Transformer
Engine 2.20 (``pytorch/module/base.py``, ``pytorch/quantization.py``), whose own CUDA graphs save and restore the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import Tensor

FIRST_MICRO_BATCH = "is_first_microbatch"
"""Megatron's mark on its Transformer Engine layers: quantise the weights anew in the next forward pass."""


@dataclass(frozen=True, kw_only=True)
class ModuleState:
    """One Transformer Engine module's FP8 state.

    Attributes:
        scaling: copies of scales and amax histories, fp32 on the device, in the form that the module's
            ``reset_fp8_meta_tensors`` takes; None if the module has none yet, or its recipe needs none.
        is_first_micro_batch: None if the module is not one of Megatron's.
    """

    module: Any
    scaling: Any
    is_first_micro_batch: bool | None

    @classmethod
    def of(cls, module: Any) -> ModuleState:
        """A copy of what ``module`` has now."""
        return cls(
            module=module,
            scaling=module.get_fp8_meta_tensors() if _has_history(module) else None,
            is_first_micro_batch=getattr(module, FIRST_MICRO_BATCH, None),
        )

    def restore(self) -> None:
        """Write it back in place, since quantizers and the buffers of the amax reduction hold views of it."""
        if _has_history(self.module):
            # Without an argument: as they are made, scales one and histories zero.
            self.module.reset_fp8_meta_tensors(self._of_the_length_in_use())
        self.module._fp8_workspaces.clear()
        if self.is_first_micro_batch is not None:
            setattr(self.module, FIRST_MICRO_BATCH, self.is_first_micro_batch)

    def _of_the_length_in_use(self) -> Any:
        """The copies, with histories as long as a pass has made them: ``--fp8-amax-history-len`` may differ from that of the
        checkpoint which they are from. Cut or padded with zeros at the end, as Transformer Engine does it.
        """
        if self.scaling is None:
            return None
        return {
            key: [scale, _resized(history, len(self.module.fp8_meta[key].amax_history)), *others]
            for key, (scale, history, *others) in self.scaling.items()
        }


def _resized(history: Tensor, length: int) -> Tensor:
    return torch.cat((history, history.new_zeros(max(length - len(history), 0), *history.shape[1:])))[:length]


@contextmanager
def fp8_state_kept(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Undo what passes inside change of FP8 state; nothing to do for a model that is not trained in FP8."""
    saved = [ModuleState.of(module) for module in quantizing_modules(chunks)]
    try:
        yield
    finally:
        with torch.no_grad():
            for state in saved:
                state.restore()


def quantizing_modules(chunks: Sequence[torch.nn.Module]) -> list[Any]:
    """The modules that hold FP8 state, in the model's order; none if the model is not trained in FP8."""
    if not is_fp8(chunks):
        return []
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerEngineBaseModule)]


def is_fp8(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether Megatron runs the layers of this model in FP8."""
    return any(getattr(get_model_config(chunk), "fp8", None) for chunk in chunks)


def starts_without_scales(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether scales follow from earlier passes, so that the first pass of a run has none that fit."""
    return is_fp8(chunks) and get_model_config(chunks[0]).fp8_recipe == "delayed"


def has_forward_scales(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether some pass, in this run or before the checkpoint that was loaded, has found scales for forward passes.

    Told by the scale of what goes into a module, which comes first and begins as one. Weights that are FP8 themselves
    (``--fp8-param-gather``) have a history as soon as they are made, and one of length 1, Megatron's default, is empty after
    each pass.
    """
    return any(bool(state.scale[0] != 1) for state in _delayed_states(chunks, "scaling_fwd"))


def scales(chunks: Sequence[torch.nn.Module]) -> Tensor:
    """Of all modules on this rank that follow from earlier passes, forwards and backwards; fp32, those of a module together.

    Those that no pass has updated yet are one.
    """
    found = [state.scale for key in ("scaling_fwd", "scaling_bwd") for state in _delayed_states(chunks, key)]
    return torch.cat(found) if found else torch.ones(0, device=next(chunks[0].parameters()).device)


def _delayed_states(chunks: Sequence[torch.nn.Module], key: str) -> list[Any]:
    states = [module.fp8_meta.get(key) for module in quantizing_modules(chunks)]
    return [state for state in states if hasattr(state, "amax_history")]


def adopt_forward_scales() -> None:
    """Make scales of what forward passes without gradients have seen; with gradients, Transformer Engine does it itself.

    Collective over Megatron's amax reduction groups.
    """
    from megatron.core.fp8_utils import FP8GlobalStateManager

    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


def _has_history(module: Any) -> bool:
    return any(hasattr(module.fp8_meta.get(key), "amax_history") for key in ("scaling_fwd", "scaling_bwd"))
