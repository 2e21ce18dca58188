"""The plugin: a basis kept beside Megatron's optimizer, refreshed from reference gradients, used in every step.

```
every refresh                                     every step
 begin_refresh()                                   optimizer.step()
 for each reference:                                └ the basis at work: see spaces.py
   a gradient, the loop's own way
   capture(name)          local copy
 finish_refresh()         one all-reduce
```
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.config import MAX_CONFLICT_REFERENCES, OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError
from megatron_ogpsa.projection.basis import orthonormalise
from megatron_ogpsa.projection.conflict import Cone
from megatron_ogpsa.projection.segments import combine_rows, gram_and_dots
from megatron_ogpsa.sharding.gradients import GradientShard
from megatron_ogpsa.spaces import SPACES, Basis, GradientSpace
from megatron_ogpsa.support import check_supported

logger = logging.getLogger(__name__)


class OGPSA:
    """Projects the steps of one Megatron optimizer; made by :func:`attach`.

    Attributes:
        rejected_refreshes: refreshes in a row whose references were not finite, so that the last good basis was kept.
        reference_names: of the basis in use.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], config: OGPSAConfig
    ) -> None:
        check_supported(optimizer, chunks, config)
        self.config = config
        self.rejected_refreshes = 0
        self.reference_names: list[str] = []
        self._optimizer = optimizer
        self._shard = GradientShard(optimizer, chunks, by_tensor=config.granularity == "tensor")
        self._space = SPACES[config.space](optimizer, self._shard, check_leak=config.check_leak)
        self._captured_names: list[str] | None = None
        self._captured_KN: Tensor | None = None

    @property
    def enabled(self) -> bool:
        """``False`` makes ``optimizer.step()`` what it is without the plugin."""
        return self._space.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._space.enabled = value

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last projected step; empty until a step was projected.

        ``rank``: dimension of the largest protected subspace of any block; ``rank_total``: summed over blocks;
        ``grad_norm_before`` and ``grad_norm_after`` the projection. With ``space="gradient"`` also ``removed``:
        1 − ‖g'‖²/‖g‖², and after :meth:`add_references_once` ``added``: ‖w·Σ_j a_j‖²/‖g‖². With ``space="update"``
        ``removed_length``: ‖QᵀΔ‖ in the parameters' units. With ``check_leak``: ``leak``, the largest |⟨g', q⟩|/‖g'‖,
        and ``removed`` also of updates.
        """
        return self._space.metrics

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because the gradient was not finite."""
        return self._space.skipped_steps

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
            kept = "the last good basis is kept" if self.has_basis else "no basis yet: steps are not projected"
            logger.warning("the gradient of reference %s is not finite; %s", ", ".join(bad), kept)
            return False
        self.rejected_refreshes = 0
        transform = orthonormalise(gram_BKK, self.config.rank_tolerance)
        reference_BKK = transform.reference_BKK.to(layout.device)
        self._space.basis = None  # its memory serves the new one
        self._space.basis = Basis(
            rows_KN=self._stored(rows_KN, transform.weights_BKK.to(layout.device)),
            reference_BKK=reference_BKK,
            cone=Cone(reference_BKK) if self.config.mode == "conflict" else None,
            rank=int(transform.rank_B.max()),
            rank_total=int(transform.rank_B.sum()),
        )
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
            RuntimeError: there is no basis yet, or updates are projected.
        """
        if not isinstance(self._space, GradientSpace):
            raise RuntimeError('add_references_once() adds to the gradient: attach with space="gradient"')
        if self._space.basis is None:
            raise RuntimeError("add_references_once() before the first refresh: there are no references yet")
        self._space.added_weight = weight

    # -------------------------------------------------------------------------------------------------- others

    @property
    def has_basis(self) -> bool:
        """Whether a refresh has succeeded, so that steps are projected."""
        return self._space.basis is not None

    @property
    def basis_bytes(self) -> int:
        """Bytes of the basis on this rank."""
        basis = self._space.basis
        return 0 if basis is None else basis.rows_KN.numel() * basis.rows_KN.element_size()

    @property
    def block_names(self) -> list[str]:
        """The blocks that are projected on their own, in the whole model."""
        return self._shard.block_names

    def detach(self) -> None:
        """Give the optimizer its own methods back and free the basis."""
        self._space.remove()
        self._captured_KN = self._captured_names = None


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
