"""The plugin: a basis kept beside Megatron's optimizer, and a projection inside its step.

```
every refresh                                     every step
 begin_refresh()                                   optimizer.step()
 for each reference:                                ├ prepare_grads()      Megatron's: copy, unscale, check inf/nan
   a gradient, the loop's own way                   │   └ then ours: local dots, one all-reduce, g ← g − Q·r
   capture(name)          local copy                ├ get_grad_norm()      known already, no all-reduce
 finish_refresh()         one all-reduce            └ clip, step           Megatron's
```
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.config import MAX_CONFLICT_REFERENCES, OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError
from megatron_ogpsa.projection import removal
from megatron_ogpsa.projection.basis import orthonormalise
from megatron_ogpsa.projection.conflict import Cone
from megatron_ogpsa.projection.segments import combine_rows, gram_and_dots, subtract_combination
from megatron_ogpsa.sharding.gradients import GradientShard
from megatron_ogpsa.support import check_supported

logger = logging.getLogger(__name__)

_HOOKED = ("prepare_grads", "get_grad_norm", "clip_grad_norm")


class OGPSA:
    """Projects the gradients of one Megatron optimizer; made by :func:`attach`.

    Attributes:
        enabled: ``False`` makes ``optimizer.step()`` what it is without the plugin.
        metrics: of the last projected step (``rank``: dimension of the largest protected subspace of any block;
            ``rank_total``: summed over blocks; ``removed``: 1 − ‖g'‖²/‖g‖²; ``grad_norm_before`` and
            ``grad_norm_after``; ``leak``: largest |⟨g', q⟩|/‖g'‖, with ``check_leak``; ``added``: ‖w·Σ_j a_j‖²/‖g‖²,
            after :meth:`add_references_once`). Empty until a step was projected.
        skipped_steps: steps skipped because the gradient was not finite.
        rejected_refreshes: refreshes in a row whose references were not finite, so that the last good basis was kept.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], config: OGPSAConfig
    ) -> None:
        check_supported(optimizer, chunks)
        self.config = config
        self.enabled = True
        self.metrics: dict[str, float] = {}
        self.skipped_steps = 0
        self.rejected_refreshes = 0
        self.reference_names: list[str] = []
        self._optimizer = optimizer
        self._shard = GradientShard(optimizer, chunks, by_tensor=config.granularity == "tensor")
        self._basis_KN: Tensor | None = None
        self._reference_BKK: Tensor | None = None
        self._cone: Cone | None = None
        self._added_weight = 0.0
        self._rank = 0
        self._rank_total = 0
        self._captured_names: list[str] | None = None
        self._captured_KN: Tensor | None = None
        self._norm_after: float | None = None
        self._megatrons = {name: getattr(optimizer, name) for name in _HOOKED if hasattr(optimizer, name)}
        # On the instance, so that type checks and checkpoint code still see the optimizer that they know.
        optimizer.prepare_grads = self._prepare_grads
        optimizer.get_grad_norm = self._get_grad_norm
        optimizer.clip_grad_norm = self._clip_grad_norm

    # ------------------------------------------------------------------------------------------------- refresh

    def begin_refresh(self) -> None:
        """Start collecting reference gradients; until :meth:`finish_refresh` the last basis stays in use."""
        self._captured_names = []
        self._captured_KN = self._rows(len(self.reference_names))

    def capture(self, name: str) -> None:
        """Keep the gradient that lies in Megatron's buffers now as the reference ``name``. Local, no communication.

        Call it after ``finalize_model_grads``, when the gradient is reduced as a training gradient is, and before
        anything else touches the buffers. The loss scale is divided out.

        Raises:
            RuntimeError: outside begin_refresh/finish_refresh, or a name given twice.
        """
        if self._captured_names is None or self._captured_KN is None:
            raise RuntimeError("capture() outside a refresh: call begin_refresh() first")
        if name in self._captured_names:
            raise RuntimeError(
                f"reference {name!r} is captured twice in one refresh: give each reference a name of its own"
            )
        index = len(self._captured_names)
        if index == self._captured_KN.shape[0]:  # first refresh: the number of references is not known yet
            self._captured_KN = torch.cat((self._captured_KN, self._rows(1)))
        row_N = self._captured_KN[index]
        self._shard.read_main_grads(row_N)
        scale = self._optimizer.get_loss_scale().item()
        if scale != 1.0:
            row_N.div_(scale)
        self._captured_names.append(name)

    def _rows(self, num_rows: int) -> Tensor:
        layout = self._shard.layout
        return torch.empty(num_rows, layout.num_elements, dtype=torch.float32, device=layout.device)

    @torch.no_grad()
    def finish_refresh(self) -> bool:
        """Orthonormalise the captured gradients: one all-reduce of the blocks' Gram matrices, the rest is local.

        Rank deficiency (zero, equal or parallel references) is normal and shows as ``metrics["rank"]``. If a reference
        is not finite, the last good basis is kept on all ranks, and a warning names the reference.

        Returns:
            Whether the basis is new.

        Raises:
            RuntimeError: outside a refresh, or nothing was captured.
            UnsupportedError: more references than ``mode="conflict"`` solves for.
        """
        names, rows_KN = self._captured_names, self._captured_KN
        if not names or rows_KN is None:
            raise RuntimeError("finish_refresh() without references: begin_refresh() and capture() come first")
        self._captured_names = self._captured_KN = None
        rows_KN = rows_KN[: len(names)]
        if self.config.mode == "conflict" and len(names) > MAX_CONFLICT_REFERENCES:
            raise UnsupportedError(
                f"--ogpsa-mode conflict with {len(names)} references: it solves for up to {MAX_CONFLICT_REFERENCES}; "
                "join some references into one, or use mode orthogonal"
            )
        layout = self._shard.layout
        gram_BKK = sum_over_ranks(gram_and_dots(layout, rows_KN), self._shard.reduction.group).cpu()
        if bad := _not_finite(gram_BKK, names):
            self.rejected_refreshes += 1
            kept = "no basis yet: steps are not projected" if self._basis_KN is None else "the last good basis is kept"
            logger.warning("the gradient of reference %s is not finite; %s", ", ".join(bad), kept)
            return False
        self.rejected_refreshes = 0
        transform = orthonormalise(gram_BKK, self.config.rank_tolerance)
        self._basis_KN = self._stored(rows_KN, transform.weights_BKK.to(layout.device))
        self._reference_BKK = transform.reference_BKK.to(layout.device)
        if self.config.mode == "conflict":
            self._cone = Cone(self._reference_BKK)
        self._rank, self._rank_total = int(transform.rank_B.max()), int(transform.rank_B.sum())
        self.reference_names = names
        return True

    def _stored(self, rows_KN: Tensor, weights_BKK: Tensor) -> Tensor:
        """Q = A·W in the dtype and on the device that the config asks for; in A's own memory where it can be."""
        dtype = self.config.torch_basis_dtype
        device = torch.device("cpu") if self.config.basis_device == "cpu" else rows_KN.device
        out_KN = rows_KN if (dtype, device) == (rows_KN.dtype, rows_KN.device) else None
        if out_KN is None:
            out_KN = torch.empty(rows_KN.shape, dtype=dtype, device=device, pin_memory=device != rows_KN.device)
        combine_rows(self._shard.layout, rows_KN, weights_BKK, out_KN)
        return out_KN

    def add_references_once(self, weight: float) -> None:
        """Add w·Σ_j a_j to the gradient of the next step, after its projection and before it is clipped.

        Undoes what the projection is for. It is what the authors' released code does by mistake after a refresh (under
        ZeRO the reference passes leave their gradient in the optimizer's accumulators), and is here so that its share of
        published results can be measured. The a_j come out of the basis, as Q·Qᵀa_j: nothing else is kept.

        Args:
            weight: w, of reference gradients as they were captured, for every reference alike.

        Raises:
            RuntimeError: there is no basis yet.
        """
        if self._basis_KN is None:
            raise RuntimeError("add_references_once() before the first refresh: there are no references yet")
        self._added_weight = weight

    # ---------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def _prepare_grads(self) -> bool:
        """Megatron's ``prepare_grads``, then the projection of what it prepared; true if the step must be skipped."""
        self._norm_after = None
        added_weight, self._added_weight = self._added_weight, 0.0
        found_inf: bool = self._megatrons["prepare_grads"]()
        if not self.enabled or self._basis_KN is None:
            return found_inf
        if found_inf or not self._project(added_weight):
            self.skipped_steps += 1
            return True
        return False

    def _project(self, added_weight: float) -> bool:
        """g ← g − Q·r; returns whether the gradient was finite, which every rank reads off the same sums."""
        assert self._basis_KN is not None
        assert self._reference_BKK is not None
        layout = self._shard.layout
        self._shard.load()
        sums = sum_over_ranks(gram_and_dots(layout, self._basis_KN, self._shard.spans), self._shard.reduction.group)
        coefficients_BK, squared_norm_B = sums[:, :-1], sums[:, -1]
        if self.config.mode == "orthogonal":
            removed_BK = removal.orthogonal(coefficients_BK)
        else:
            assert self._cone is not None
            removed_BK = self._cone.removed(torch.nan_to_num(coefficients_BK))
        projected_B = removal.squared_norm_after(squared_norm_B, coefficients_BK, removed_BK)
        added_BK = added_weight * self._reference_BKK.sum(dim=-1)
        if added_weight:
            removed_BK = removed_BK - added_BK
        after_B = removal.squared_norm_after(squared_norm_B, coefficients_BK, removed_BK)
        before, projected, added, after = torch.stack(
            (sums.sum() * 0 + squared_norm_B.sum(), projected_B.sum(), added_BK.square().sum(), after_B.sum())
        ).tolist()
        if not math.isfinite(before):
            return False
        subtract_combination(layout, self._shard.spans, self._basis_KN, removed_BK)
        self._shard.store()
        self._norm_after = math.sqrt(after)
        self.metrics = {
            "rank": float(self._rank),
            "rank_total": float(self._rank_total),
            "removed": 1.0 - projected / before if before > 0 else 0.0,
            "grad_norm_before": math.sqrt(before),
            "grad_norm_after": self._norm_after,
        }
        if added_weight:
            self.metrics["added"] = added / before if before > 0 else math.inf
        if self.config.check_leak:
            self.metrics["leak"] = self._leak()
        return True

    def _leak(self) -> float:
        assert self._basis_KN is not None
        sums = sum_over_ranks(
            gram_and_dots(self._shard.layout, self._basis_KN, self._shard.spans), self._shard.reduction.group
        )
        left, squared_norm = sums[:, :-1].abs().max().item(), sums[:, -1].sum().item()
        return left / math.sqrt(squared_norm) if squared_norm > 0 else 0.0

    @torch.no_grad()
    def _get_grad_norm(self) -> Any:
        """‖g'‖ from the projection's own all-reduce, in the form that Megatron's clipping expects."""
        if self._norm_after is None:
            return self._megatrons["get_grad_norm"]()
        if clip_grads.multi_tensor_scale_tensor_impl is not None:  # Transformer Engine clips by a device scalar
            return torch.tensor([self._norm_after], dtype=torch.float32, device=self._shard.layout.device)
        return self._norm_after

    @torch.no_grad()
    def _clip_grad_norm(self, clip_grad: float) -> Any:
        """``MegatronOptimizer.clip_grad_norm`` of an optimizer outside a chain, with the norm that is known already."""
        if self._norm_after is None:
            return self._megatrons["clip_grad_norm"](clip_grad)
        norm = self._get_grad_norm()
        params = self._optimizer.get_parameters()
        if clip_grad > 0.0 and params:
            clip_grads.clip_grad_by_total_norm_fp32(
                params,
                clip_grad,
                norm,
                use_decoupled_grad=self._optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
        return norm

    # -------------------------------------------------------------------------------------------------- others

    @property
    def has_basis(self) -> bool:
        """Whether a refresh has succeeded, so that steps are projected."""
        return self._basis_KN is not None

    @property
    def basis_bytes(self) -> int:
        """Bytes of the basis on this rank."""
        return 0 if self._basis_KN is None else self._basis_KN.numel() * self._basis_KN.element_size()

    @property
    def block_names(self) -> list[str]:
        """The blocks that are projected on their own, in the whole model."""
        return self._shard.block_names

    def detach(self) -> None:
        """Give the optimizer its own methods back and free the basis."""
        for name in _HOOKED:
            self._optimizer.__dict__.pop(name, None)
        self._basis_KN = self._reference_BKK = self._cone = self._captured_KN = self._captured_names = None
        self.enabled = False


def _not_finite(gram_BKK: Tensor, names: Sequence[str]) -> list[str]:
    """References whose own squared norm is not finite in some block."""
    is_finite_K = gram_BKK.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=0)
    return [name for name, is_finite in zip(names, is_finite_K.tolist(), strict=True) if not is_finite]


def attach(
    optimizer: MegatronOptimizer,
    model: DistributedDataParallel | Sequence[DistributedDataParallel],
    config: OGPSAConfig | None = None,
) -> OGPSA:
    """Project the gradients of ``optimizer``. Collective: every rank of the model calls it.

    Args:
        optimizer: a Megatron optimizer with fp32 or 16-bit parameters, distributed or not, or a chain of them.
        model: this rank's model chunks, wrapped in megatron.core's ``DistributedDataParallel``.
        config: by default one block for each logical tensor, both signs removed.

    Raises:
        UnsupportedError: a Megatron feature that is not supported, by its flag's name.
        UserError: not a Megatron model, or the optimizer has a plugin already.
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    if "prepare_grads" in optimizer.__dict__:
        raise UnsupportedError("attach(): this optimizer is hooked already; detach() the plugin that holds it first")
    return OGPSA(optimizer, chunks, config or OGPSAConfig())


__all__ = ["OGPSA", "attach"]
