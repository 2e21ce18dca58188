"""The paper's rule: the gradient is projected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import override

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.plugin.basis import Basis
from megatron_ogpsa.plugin.space import Space
from megatron_ogpsa.projection import removal
from megatron_ogpsa.projection.passes import dots, subtract
from megatron_ogpsa.sharding.gradients import GradientShard


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
        if not self._all_finite_or_told(squared_norm_B, before, trace):
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
