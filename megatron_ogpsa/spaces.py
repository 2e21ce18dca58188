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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.projection import removal
from megatron_ogpsa.projection.conflict import Cone
from megatron_ogpsa.projection.passes import dots, subtract
from megatron_ogpsa.sharding.gradients import GradientShard, leaf_optimizers
from megatron_ogpsa.streaming import HostRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """An orthonormal basis of every block's protected subspace, and the rule of what is removed along it.

    Attributes:
        rows_KN: Q, this rank's columns, on the gradient's device or in host memory.
        reference_BKK: QᵀA, fp64; column j holds reference j in the basis.
        cone: of ``mode="conflict"``; None removes the whole component.
        rank: dimension of the largest protected subspace of any block.
        rank_total: summed over blocks.
    """

    rows_KN: Tensor | HostRows
    reference_BKK: Tensor
    cone: Cone | None
    rank: int
    rank_total: int

    def removed(self, coefficients_BK: Tensor) -> Tensor:
        """r, of a gradient whose coefficients are c = Qᵀg."""
        if self.cone is None:
            return removal.orthogonal(coefficients_BK)
        return self.cone.removed(torch.nan_to_num(coefficients_BK))

    def left(self, coefficients_BK: Tensor) -> float:
        """What a projected gradient g' with c = Qᵀg' still does that the rule forbids, the most of any block.

        |⟨g', q⟩|; with a cone, which leaves what helps, the harm −⟨g', a⟩/‖a‖ of a reference. In units of the gradient.
        """
        if self.cone is None:
            return float(coefficients_BK.abs().max())
        length_BK = self.reference_BKK.norm(dim=1)
        harm_BK = -torch.einsum("bij,bi->bj", self.reference_BKK, coefficients_BK)
        return float(torch.where(length_BK > 0, harm_BK / length_BK, 0.0).max().clamp(min=0.0))


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
        self.skipped_in_a_row += int(not found_inf)
        return True

    @abstractmethod
    def _prepare(self, basis: Basis) -> bool:
        """Learn the gradient's norm, and what else is needed; false if something was not finite."""

    def _is_finite(self, squared_norm_B: Tensor, squared_norm: float, basis_trace: float) -> bool:
        """Say what is not finite, if something is.

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


class GradientSpace(Space):
    """The paper's rule: the gradient is projected before the optimizer rescales it and adds momentum."""

    hooked = ("prepare_grads", "get_grad_norm", "clip_grad_norm")

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard, *, check_leak: bool) -> None:
        super().__init__(optimizer, shard, check_leak=check_leak)
        self.added_weight = 0.0

    @override
    def prepare_grads(self) -> bool:
        """Megatron's ``prepare_grads``, then the projection of what it prepared; true if the step must be skipped."""
        must_skip = super().prepare_grads()
        self.added_weight = 0.0
        return must_skip

    @override
    def _prepare(self, basis: Basis) -> bool:
        """g ← g − Q·r; one all-reduce, off which every rank reads the same."""
        layout = self._shard.layout
        self._shard.load()
        sums = sum_over_ranks(dots(layout, basis.rows_KN, self._shard.spans), self._shard.reduction.group)
        coefficients_BK, squared_norm_B = sums[:, :-1], sums[:, -1]
        removed_BK = basis.removed(coefficients_BK)
        projected_B = removal.squared_norm_after(squared_norm_B, coefficients_BK, removed_BK)
        added_BK = self.added_weight * basis.reference_BKK.sum(dim=-1)
        if self.added_weight:
            removed_BK = removed_BK - added_BK
        after_B = removal.squared_norm_after(squared_norm_B, coefficients_BK, removed_BK)
        totals = (squared_norm_B, 0.0 * coefficients_BK, projected_B, added_BK.square(), after_B)
        numbers = torch.stack([total.sum() for total in totals])
        arrived = _sent_to_host(numbers)
        # Behind the numbers, so that the device is at work while the host waits for them. A step that is skipped has no use
        # for its gradient.
        subtract(layout, self._shard.spans, basis.rows_KN, removed_BK)
        self._shard.store()
        before, trace, projected, added, after = arrived()
        if not self._is_finite(squared_norm_B, before, trace):
            return False
        self._norm, self._norm_there = math.sqrt(after), numbers[-1:].sqrt().float()
        self.figures = self._ranks(basis) | {
            "removed": 1.0 - projected / before if before > 0 else 0.0,
            "grad_norm_before": math.sqrt(before),
            "grad_norm_after": self._norm,
        }
        if self.added_weight:
            self.figures["added"] = added / before if before > 0 else math.inf
        if self._check_leak:
            self.figures["leak"] = self._leak(basis)
        return True

    def _leak(self, basis: Basis) -> float:
        sums = sum_over_ranks(dots(self._shard.layout, basis.rows_KN, self._shard.spans), self._shard.reduction.group)
        squared_norm = sums[:, -1].sum().item()
        return basis.left(sums[:, :-1]) / math.sqrt(squared_norm) if squared_norm > 0 else 0.0


class UpdateSpace(Space):
    """The change Δ that the inner optimizer has just made is projected: Δ ← Δ − Q·r, momentum and weight decay included.

    r is QᵀΔ in mode orthogonal, and what of it would hurt a reference in mode conflict.

    Δ = θ_after − θ_before is never stored. Qᵀ·θ is K numbers for each block, taken before and after the inner step and
    subtracted; sums in fp64 keep what the difference of two long vectors would lose. It happens on the fp32 main
    parameters, before Megatron copies them to lower precision and gathers them.

    All inner optimizers of a chain step first, then one all-reduce serves them together; PyTorch's own step hooks would
    need one for each, and a block of the whole model lies in several of them.
    """

    watched = "the basis or a parameter is"
    hooked = ("prepare_grads", "get_grad_norm", "clip_grad_norm", "step_with_ready_grads")

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard, *, check_leak: bool) -> None:
        super().__init__(optimizer, shard, check_leak=check_leak)
        self._layout = shard.parameter_layout
        self._along_BK: Tensor | None = None  # Qᵀθ before the step, this rank's share

    @override
    def _prepare(self, basis: Basis) -> bool:
        """‖g‖² over all ranks, and whether the basis is finite on each, before the inner step can do any harm.

        One all-reduce of a number for each block and one more, in place of Megatron's own of the norm.
        """
        self._shard.load()
        no_rows = torch.empty(0, self._shard.layout.num_elements, device=self._shard.layout.device)
        local_B = dots(self._shard.layout, no_rows, self._shard.spans)[:, -1]
        self._along_BK = self._along(basis, self._shard.parameters)
        trace = (0.0 * self._along_BK).sum()
        totals = sum_over_ranks(torch.cat((local_B, trace[None])), self._shard.reduction.group)
        numbers = torch.stack((totals[:-1].sum(), totals[-1]))
        squared_norm, basis_trace = numbers.tolist()
        if not self._is_finite(totals[:-1], squared_norm, basis_trace):
            return False
        self._norm, self._norm_there = math.sqrt(squared_norm), numbers[:1].sqrt().float()
        return True

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """The inner optimizers' steps, the projection of what they did, then the rest of Megatron's step."""
        megatrons: Callable[[], bool] = self._megatrons["step_with_ready_grads"]
        if not self.enabled or self.basis is None:
            return megatrons()
        assert self._norm is not None
        assert self._along_BK is not None
        inner = [
            leaf.optimizer for leaf in leaf_optimizers(self._optimizer) if not getattr(leaf, "is_stub_optimizer", False)
        ]
        self._step(inner, self.basis, self._along_BK, self._norm)
        self._along_BK = None
        with _stepped_already(inner):
            return megatrons()

    def _step(self, inner: Sequence[torch.optim.Optimizer], basis: Basis, along_BK: Tensor, norm: float) -> None:
        parameters = self._shard.parameters
        before = [parameter.clone() for parameter in parameters] if self._check_leak else None
        for optimizer in inner:
            optimizer.step()
        change_BK = sum_over_ranks(self._along(basis, parameters) - along_BK, self._shard.reduction.group)
        # The cone is of gradients, and an update goes against the gradient.
        removed_BK = -basis.removed(-change_BK)
        subtract(self._layout, parameters, basis.rows_KN, removed_BK)
        self.figures = self._ranks(basis) | {
            "removed_length": removed_BK.square().sum().sqrt(),
            "grad_norm_before": norm,
            "grad_norm_after": norm,
        }
        if before is not None:
            self.figures |= self._checked(basis, before, float(removed_BK.square().sum()))

    def _along(self, basis: Basis, parameters: Sequence[Tensor]) -> Tensor:
        """Qᵀθ, this rank's share."""
        return dots(self._layout, basis.rows_KN, parameters)[:, :-1].contiguous()

    def _checked(self, basis: Basis, before: Sequence[Tensor], squared_removed: float) -> dict[str, float]:
        """The leak, and the share that was removed, of an update that was kept for it."""
        update = [after - old for after, old in zip(self._shard.parameters, before, strict=True)]
        sums = sum_over_ranks(dots(self._layout, basis.rows_KN, update), self._shard.reduction.group)
        squared = float(sums[:, -1].sum())
        leak = basis.left(-sums[:, :-1]) / math.sqrt(squared) if squared > 0 else 0.0
        return {"leak": leak, "removed": squared_removed / (squared + squared_removed) if squared_removed else 0.0}


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few of ``names``, and how many more there are."""
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def _sent_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Send ``numbers``; what is returned waits for them alone, not for what is queued after them."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record()

    def arrived() -> list[float]:
        sent.synchronize()
        return here.tolist()

    return arrived


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


@contextmanager
def _stepped_already(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Let Megatron go through its step with inner optimizers that have done theirs."""
    own = [optimizer.__dict__.get("step") for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.step = _do_nothing  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for optimizer, step in zip(optimizers, own, strict=True):
            del optimizer.step
            if step is not None:
                optimizer.step = step  # type: ignore[method-assign]


def _do_nothing() -> None:
    return None


SPACES: dict[str, type[GradientSpace | UpdateSpace]] = {"gradient": GradientSpace, "update": UpdateSpace}
