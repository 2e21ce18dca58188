"""The default rule: what the optimizer makes of the gradient is projected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import override

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.plugin.basis import Basis
from megatron_ogpsa.plugin.space import Space
from megatron_ogpsa.projection.passes import dots, subtract
from megatron_ogpsa.sharding.gradients import GradientShard, leaf_optimizers


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
        if not self._all_finite_or_told(totals[:-1], squared_norm, basis_trace):
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
