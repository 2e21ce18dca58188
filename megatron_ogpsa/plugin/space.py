"""Where the projection acts within an optimizer's step: on the gradient before it, or on the change of weights after it.

```
optimizer.step()                      gradient                              update
 ├ prepare_grads()                     local dots, one all-reduce, g ← g − Q·r   ‖g‖², local dots, one all-reduce
 ├ get_grad_norm()                     known already, no all-reduce          likewise
 ├ clip
 └ step_with_ready_grads()
    ├ inner optimizers' step()                                               local dots again, one all-reduce,
    │                                                                        θ ← θ − Q·r
    └ copy to lower precision, gather
```

Both put their methods on the optimizer's instance, so that type checks and checkpoint code see the optimizer they know.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.plugin.basis import Basis
from megatron_ogpsa.sharding.gradients import GradientShard, leaf_optimizers

logger = logging.getLogger(__name__)


class Space(ABC):
    """What is hooked into one optimizer.

    Attributes:
        enabled: whether steps are projected.
        basis: the one in use; None until the first refresh.
        needs_refresh: whether the basis was found not to be finite: steps are skipped until there is another.
        figures: of the last projected step; those that need not be known within it are numbers on the device.
        skipped_steps: steps skipped because the gradient, or the basis, was not finite.
        skipped_in_a_row: of these the last ones, without those that a loss scale was too large for.
    """

    watched = "the basis is"
    """What a projection takes beside the gradient."""

    hooked: tuple[str, ...]
    """Names of the optimizer's methods that are replaced; a chain lacks some of them."""

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard, *, check_leak: bool) -> None:
        self.enabled = True
        self.basis: Basis | None = None
        self.needs_refresh = False
        self.figures: dict[str, float | Tensor] = {}
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._norm: float | None = None  # of the gradient that the optimizer is about to use, known on all ranks
        self._norm_there: Tensor | None = None  # the same where the gradient lies, fp32 [1]
        self._optimizer = optimizer
        self._shard = shard
        self._check_leak = check_leak
        self._megatrons = {name: getattr(optimizer, name) for name in self.hooked if hasattr(optimizer, name)}
        for name in self._megatrons:
            setattr(optimizer, name, getattr(self, name))
        # Megatron looks for overflow among the ranks of one copy, and a copy that skips alone would be waited for.
        self._scaled = [leaf for leaf in leaf_optimizers(optimizer) if getattr(leaf, "grad_scaler", None) is not None]
        if shard.reduction.holds_copies:
            for leaf in self._scaled:
                leaf._unscale_main_grads_and_check_for_nan = _looking_in(shard.reduction.group, leaf)

    def remove(self) -> None:
        """Give the optimizer its own methods back and free the basis."""
        for name in self.hooked:
            self._optimizer.__dict__.pop(name, None)
        for leaf in self._scaled:
            leaf.__dict__.pop("_unscale_main_grads_and_check_for_nan", None)
        self.basis = None
        self.enabled = False

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Megatron's ``prepare_grads``, then our part of it; true if the step must be skipped, on all ranks alike."""
        self._norm = None
        found_inf: bool = self._megatrons["prepare_grads"]()
        if not self.enabled or self.basis is None:
            return found_inf
        if not found_inf and self._prepare(self.basis):
            self.skipped_in_a_row = 0
            return False
        self.skipped_steps += 1
        self.skipped_in_a_row += int(not (found_inf and self._loss_scale_may_fall()))
        return True

    def _loss_scale_may_fall(self) -> bool:
        """Whether a smaller loss scale may be all that is wanting. All ranks have the same: it follows from ``found_inf``."""
        scalers = [leaf.grad_scaler for leaf in self._scaled]  # a constant one has no least scale
        return any(hasattr(scaler, "min_scale") and bool(scaler.scale > scaler.min_scale) for scaler in scalers)

    @abstractmethod
    def _prepare(self, basis: Basis) -> bool:
        """Learn the gradient's norm, and what else is needed; false if something was not finite."""

    def _all_finite_or_told(self, squared_norm_B: Tensor, squared_norm: float, basis_trace: float) -> bool:
        """Whether all is finite; if not, say what is not, and ask for a refresh if it is the basis.

        Args:
            squared_norm_B: ‖g‖² of each block, summed over ranks.
            squared_norm: their sum.
            basis_trace: zero, or not finite if the basis is not, summed over ranks.
        """
        if math.isfinite(squared_norm) and math.isfinite(basis_trace):
            return True
        if math.isfinite(squared_norm):
            self.needs_refresh = True
            told = f"{self.watched} not finite; steps are skipped until the next refresh"
        else:
            bad = [
                self._shard.block_names[block] for block in (~squared_norm_B.isfinite()).nonzero().flatten().tolist()
            ]
            told = f"the gradient is not finite in {some_of(bad)}"
        if dist.get_rank() == 0:
            logger.warning("step skipped on all ranks: %s", told)
        return False

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """The norm that is known already, in the form that Megatron's clipping expects."""
        if self._norm is None:
            return self._megatrons["get_grad_norm"]()
        if clip_grads.multi_tensor_scale_tensor_impl is not None:  # Transformer Engine clips by a device scalar
            return self._norm_there
        return self._norm

    @torch.no_grad()
    def clip_grad_norm(self, clip_grad: float) -> Any:
        """``MegatronOptimizer.clip_grad_norm`` of an optimizer outside a chain, with the norm that is known already."""
        if self._norm is None:
            return self._megatrons["clip_grad_norm"](clip_grad)
        norm = self.get_grad_norm()
        params = self._optimizer.get_parameters()
        if clip_grad > 0.0 and params:
            clip_grads.clip_grad_by_total_norm_fp32(
                params,
                clip_grad,
                norm,
                use_decoupled_grad=self._optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
        return norm

    def figures_on(self, device: torch.device | int) -> dict[str, Tensor]:
        """``figures`` as fp32 tensors of one element, without waiting for the device."""
        return {
            # Filled there: a number that is copied from the host would make it wait.
            name: value.to(device, torch.float32).reshape(1)
            if isinstance(value, Tensor)
            else torch.full((1,), value, dtype=torch.float32, device=device)
            for name, value in self.figures.items()
        }

    def _ranks(self, basis: Basis) -> dict[str, float | Tensor]:
        return {"rank": float(basis.rank), "rank_total": float(basis.rank_total)}


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few of ``names``, and how many more there are."""
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def _looking_in(group: dist.ProcessGroup | None, leaf: Any) -> Callable[[], bool]:
    """Megatron's look for overflow, agreed on by ``group`` in place of the ranks that its gradient norm goes over."""
    look: Callable[[], bool] = leaf._unscale_main_grads_and_check_for_nan

    def look_in_group() -> bool:
        leaf.get_grad_stats_parallel_group = lambda: group
        try:
            return look()
        finally:
            del leaf.get_grad_stats_parallel_group

    return look_in_group
