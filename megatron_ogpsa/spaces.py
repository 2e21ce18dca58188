"""Where the projection acts within an optimizer's step: on the gradient before it, or on the change of weights after it.

```
optimizer.step()                      gradient                              update
 ├ prepare_grads()                     local dots, one all-reduce, g ← g − Q·r
 ├ get_grad_norm()                     known already, no all-reduce          Megatron's, watched
 ├ clip
 └ step_with_ready_grads()
    ├ inner optimizers' step()                                               local dots before and after, one all-reduce,
    │                                                                        θ ← θ − Q·r
    └ copy to lower precision, gather
```

Both put their methods on the optimizer's instance, so that type checks and checkpoint code see the optimizer they know.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, override

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.projection import removal
from megatron_ogpsa.projection.conflict import Cone
from megatron_ogpsa.projection.segments import gram_and_dots, subtract_combination
from megatron_ogpsa.sharding.gradients import GradientShard, leaf_optimizers


@dataclass(frozen=True, kw_only=True)
class Basis:
    """An orthonormal basis of every block's protected subspace, and the rule of what is removed along it.

    Attributes:
        rows_KN: Q, this rank's columns.
        reference_BKK: QᵀA, fp64; column j holds reference j in the basis.
        cone: of ``mode="conflict"``; None removes the whole component.
        rank: dimension of the largest protected subspace of any block.
        rank_total: summed over blocks.
    """

    rows_KN: Tensor
    reference_BKK: Tensor
    cone: Cone | None
    rank: int
    rank_total: int

    def removed(self, coefficients_BK: Tensor) -> Tensor:
        """r, of a gradient whose coefficients are c = Qᵀg."""
        if self.cone is None:
            return removal.orthogonal(coefficients_BK)
        return self.cone.removed(torch.nan_to_num(coefficients_BK))


class Space(ABC):
    """What is hooked into one optimizer.

    Attributes:
        enabled: whether steps are projected.
        basis: the one in use; None until the first refresh.
        metrics: of the last projected step.
        skipped_steps: steps skipped because the gradient was not finite.
    """

    hooked: tuple[str, ...]
    """The optimizer's methods that stand replaced; of a leaf or a chain, which has not all of them."""

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard, *, check_leak: bool) -> None:
        self.enabled = True
        self.basis: Basis | None = None
        self.metrics: dict[str, float] = {}
        self.skipped_steps = 0
        self._optimizer = optimizer
        self._shard = shard
        self._check_leak = check_leak
        self._megatrons = {name: getattr(optimizer, name) for name in self.hooked if hasattr(optimizer, name)}
        for name in self._megatrons:
            setattr(optimizer, name, getattr(self, name))

    def remove(self) -> None:
        """Give the optimizer its own methods back and free the basis."""
        for name in self.hooked:
            self._optimizer.__dict__.pop(name, None)
        self.basis = None
        self.enabled = False

    @abstractmethod
    def prepare_grads(self) -> bool:
        """In place of Megatron's; returns whether the step must be skipped."""

    def _ranks(self, basis: Basis) -> dict[str, float]:
        return {"rank": float(basis.rank), "rank_total": float(basis.rank_total)}


class GradientSpace(Space):
    """The paper's rule: the gradient is projected before the optimizer rescales it and adds momentum."""

    hooked = ("prepare_grads", "get_grad_norm", "clip_grad_norm")

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard, *, check_leak: bool) -> None:
        super().__init__(optimizer, shard, check_leak=check_leak)
        self.added_weight = 0.0
        self._norm_after: float | None = None

    @override
    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Megatron's ``prepare_grads``, then the projection of what it prepared; true if the step must be skipped."""
        self._norm_after = None
        added_weight, self.added_weight = self.added_weight, 0.0
        found_inf: bool = self._megatrons["prepare_grads"]()
        if not self.enabled or self.basis is None:
            return found_inf
        if found_inf or not self._project(self.basis, added_weight):
            self.skipped_steps += 1
            return True
        return False

    def _project(self, basis: Basis, added_weight: float) -> bool:
        """g ← g − Q·r; returns whether the gradient was finite, which every rank reads off the same sums."""
        layout = self._shard.layout
        self._shard.load()
        sums = sum_over_ranks(gram_and_dots(layout, basis.rows_KN, self._shard.spans), self._shard.reduction.group)
        coefficients_BK, squared_norm_B = sums[:, :-1], sums[:, -1]
        removed_BK = basis.removed(coefficients_BK)
        projected_B = removal.squared_norm_after(squared_norm_B, coefficients_BK, removed_BK)
        added_BK = added_weight * basis.reference_BKK.sum(dim=-1)
        if added_weight:
            removed_BK = removed_BK - added_BK
        after_B = removal.squared_norm_after(squared_norm_B, coefficients_BK, removed_BK)
        before, projected, added, after = torch.stack(
            (sums.sum() * 0 + squared_norm_B.sum(), projected_B.sum(), added_BK.square().sum(), after_B.sum())
        ).tolist()
        if not math.isfinite(before):
            return False
        subtract_combination(layout, self._shard.spans, basis.rows_KN, removed_BK)
        self._shard.store()
        self._norm_after = math.sqrt(after)
        self.metrics = self._ranks(basis) | {
            "removed": 1.0 - projected / before if before > 0 else 0.0,
            "grad_norm_before": math.sqrt(before),
            "grad_norm_after": self._norm_after,
        }
        if added_weight:
            self.metrics["added"] = added / before if before > 0 else math.inf
        if self._check_leak:
            self.metrics["leak"] = self._leak(basis)
        return True

    def _leak(self, basis: Basis) -> float:
        sums = sum_over_ranks(
            gram_and_dots(self._shard.layout, basis.rows_KN, self._shard.spans), self._shard.reduction.group
        )
        left, squared_norm = sums[:, :-1].abs().max().item(), sums[:, -1].sum().item()
        return left / math.sqrt(squared_norm) if squared_norm > 0 else 0.0

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """‖g'‖ from the projection's own all-reduce, in the form that Megatron's clipping expects."""
        if self._norm_after is None:
            return self._megatrons["get_grad_norm"]()
        if clip_grads.multi_tensor_scale_tensor_impl is not None:  # Transformer Engine clips by a device scalar
            return torch.tensor([self._norm_after], dtype=torch.float32, device=self._shard.layout.device)
        return self._norm_after

    @torch.no_grad()
    def clip_grad_norm(self, clip_grad: float) -> Any:
        """``MegatronOptimizer.clip_grad_norm`` of an optimizer outside a chain, with the norm that is known already."""
        if self._norm_after is None:
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


class UpdateSpace(Space):
    """What the optimizer is about to do is projected: Δ ← Δ − Q·Qᵀ·Δ, momentum and weight decay included.

    Δ = θ_after − θ_before is never stored. Qᵀ·θ is K numbers for each block, taken before and after the inner step and
    subtracted; sums in fp64 keep what the difference of two long vectors would lose. It happens on the fp32 main
    parameters, before Megatron copies them to lower precision and gathers them.

    All inner optimizers of a chain step first, then one all-reduce serves them together; PyTorch's own step hooks would
    need one for each, and a block of the whole model lies in several of them.
    """

    hooked = ("prepare_grads", "get_grad_norm", "clip_grad_norm", "step_with_ready_grads")

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard, *, check_leak: bool) -> None:
        super().__init__(optimizer, shard, check_leak=check_leak)
        self._layout = shard.parameter_layout
        self._norm: float | None = None

    @override
    def prepare_grads(self) -> bool:
        """Megatron's own; also forgets the last step's norm, and counts steps that are skipped."""
        self._norm = None
        found_inf: bool = self._megatrons["prepare_grads"]()
        if self.enabled and self.basis is not None:
            self.skipped_steps += int(found_inf)
        return found_inf

    def get_grad_norm(self) -> Any:
        """Megatron's own, which every rank knows alike: it decides whether the gradient is finite."""
        norm = self._megatrons["get_grad_norm"]()
        self._norm = float(norm)
        return norm

    def clip_grad_norm(self, clip_grad: float) -> Any:
        """Megatron's own, of an optimizer outside a chain; gives the norm before it clips."""
        norm = self._megatrons["clip_grad_norm"](clip_grad)
        self._norm = float(norm)
        return norm

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """The inner optimizers' steps, the projection of what they did, then the rest of Megatron's step.

        Returns:
            False if the gradient is not finite: nothing was changed, on all ranks alike.
        """
        megatrons: Callable[[], bool] = self._megatrons["step_with_ready_grads"]
        if not self.enabled or self.basis is None:
            return megatrons()
        if self._norm is None:  # an optimizer outside a chain that does not clip
            self.get_grad_norm()
        assert self._norm is not None
        if not math.isfinite(self._norm):
            self.skipped_steps += 1
            return False
        inner = [
            leaf.optimizer for leaf in leaf_optimizers(self._optimizer) if not getattr(leaf, "is_stub_optimizer", False)
        ]
        self._step(inner, self.basis, self._norm)
        with _stepped_already(inner):
            return megatrons()

    def _step(self, inner: Sequence[torch.optim.Optimizer], basis: Basis, norm: float) -> None:
        parameters = self._shard.parameters
        before = [parameter.clone() for parameter in parameters] if self._check_leak else None
        along_BK = self._along(basis, parameters)
        for optimizer in inner:
            optimizer.step()
        change_BK = sum_over_ranks(self._along(basis, parameters) - along_BK, self._shard.reduction.group)
        # The cone is of gradients, and an update goes against the gradient.
        removed_BK = -basis.removed(-change_BK)
        subtract_combination(self._layout, parameters, basis.rows_KN, removed_BK)
        self.metrics = self._ranks(basis) | {
            "removed_length": float(removed_BK.square().sum().sqrt()),
            "grad_norm_before": norm,
            "grad_norm_after": norm,
        }
        if before is not None:
            self.metrics |= self._checked(basis, before, float(removed_BK.square().sum()))

    def _along(self, basis: Basis, parameters: Sequence[Tensor]) -> Tensor:
        """Qᵀθ, this rank's share."""
        return gram_and_dots(self._layout, basis.rows_KN, parameters)[:, :-1].contiguous()

    def _checked(self, basis: Basis, before: Sequence[Tensor], squared_removed: float) -> dict[str, float]:
        """The leak, and the share that was removed, of an update that was kept for it."""
        update = [after - old for after, old in zip(self._shard.parameters, before, strict=True)]
        sums = sum_over_ranks(gram_and_dots(self._layout, basis.rows_KN, update), self._shard.reduction.group)
        squared = float(sums[:, -1].sum())
        leak = float(sums[:, :-1].abs().max()) / math.sqrt(squared) if squared > 0 else 0.0
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


SPACES: dict[str, type[GradientSpace | UpdateSpace]] = {"gradient": GradientSpace, "update": UpdateSpace}
