"""The plugin: a basis kept beside Megatron's optimizer, refreshed from reference gradients, used in every step.

```
every refresh                                     every step
 begin_refresh()                                   optimizer.step()
 for each reference:                                └ the basis at work: see space.py
   a gradient, the loop's own way
   capture(name)          local copy
 finish_refresh()         one all-reduce
```

References need not all be captured anew: ``begin_refresh(keep=names)`` takes the others out of the basis, where they are
whole up to the rounding of its storage.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.config import MAX_CONFLICT_REFERENCES, OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError
from megatron_ogpsa.plugin.basis import Basis
from megatron_ogpsa.plugin.gradient_space import GradientSpace
from megatron_ogpsa.plugin.interval import Intervals, ReferenceInterval
from megatron_ogpsa.plugin.space import some_of
from megatron_ogpsa.plugin.storage import Storage
from megatron_ogpsa.plugin.support import check_supported
from megatron_ogpsa.plugin.update_space import UpdateSpace
from megatron_ogpsa.precision.loss_scale import FIRST_SCALE
from megatron_ogpsa.projection.basis import orthonormalise
from megatron_ogpsa.projection.conflict import Cone
from megatron_ogpsa.projection.passes import combine, dots, gram, products, slow_reading
from megatron_ogpsa.projection.segments import Rows
from megatron_ogpsa.sharding.gradients import GradientShard

logger = logging.getLogger(__name__)

SPACES: dict[str, type[GradientSpace | UpdateSpace]] = {"gradient": GradientSpace, "update": UpdateSpace}


class OGPSA:
    """Projects the steps of one Megatron optimizer; made by :func:`attach`.

    Attributes:
        rejected_refreshes: refreshes in a row whose references were not finite, so that the last good basis was kept.
        rejected_references: of the last refresh, what was not finite, and where.
        reference_names: of the basis in use.
        interval: what the last refresh tells of each reference that it captured; empty after the first.
        kept_energy: the smallest share of a reference gradient's square that the basis holds; 1 unless ``energy`` is less.
        reference_loss_scale: of the next reference passes in fp16 at first: the last one that did not overflow.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], config: OGPSAConfig
    ) -> None:
        check_supported(optimizer, chunks, config)
        self.config = config
        self.rejected_refreshes = 0
        self.rejected_references = ""
        self.reference_names: list[str] = []
        self.interval: dict[str, ReferenceInterval] = {}
        self.kept_energy = 1.0
        self.reference_loss_scale = FIRST_SCALE
        self._optimizer = optimizer
        self._shard = GradientShard(optimizer, chunks, by_tensor=config.granularity == "tensor")
        if (told := slow_reading(self._shard.layout)) and dist.get_rank() == 0:
            logger.warning(told)
        self._space = SPACES[config.space](optimizer, self._shard, check_leak=config.check_leak)
        on_host = config.basis_device == "cpu"
        self._storage = Storage(self._shard.layout, config.torch_basis_dtype, on_host=on_host)
        self._captured_names: list[str] | None = None
        self._captured_KN: Tensor | None = None
        self._num_kept = 0  # of these, the first
        self._along_BK: Tensor | None = None  # Qᵀθ as the basis was made, this rank's share
        self._intervals = Intervals()

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
        ``grad_norm_before`` and ``grad_norm_after`` the projection, which are the same with ``space="update"``. With
        ``space="gradient"`` also ``removed``:
        1 − ‖g'‖²/‖g‖², and after :meth:`add_references_once` ``added``: ‖w·Σ_j a_j‖²/‖g‖². With ``space="update"``
        ``removed_length``: ‖QᵀΔ‖ in the parameters' units. With ``check_leak``: ``leak``, the largest |⟨g', q⟩|/‖g'‖,
        or with ``mode="conflict"`` the largest harm −⟨g', a⟩/(‖g'‖‖a‖); and ``removed`` also of updates.

        Waits for the device; :meth:`metrics_on` does not.
        """
        return {name: float(value) for name, value in self._space.figures.items()}

    def metrics_on(self, device: torch.device | int) -> dict[str, Tensor]:
        """The same as fp32 tensors of one element, for a loop that adds figures up and reads them now and then."""
        return self._space.figures_on(device)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because the gradient, or the basis, was not finite."""
        return self._space.skipped_steps

    @property
    def skipped_in_a_row(self) -> int:
        """Consecutive skipped steps up to now, not counting overflows of a loss scale."""
        return self._space.skipped_in_a_row

    @property
    def needs_refresh(self) -> bool:
        """Whether the basis was found not to be finite: every step is skipped until a refresh succeeds."""
        return self._space.needs_refresh

    # ------------------------------------------------------------------------------------------------- refresh

    def begin_refresh(self, keep: Sequence[str] = (), *, num_references: int | None = None) -> None:
        """Start collecting reference gradients; until :meth:`finish_refresh` the last basis stays in use. Local.

        Args:
            keep: references that are not captured anew: their gradients come out of the basis, A = Q·(QᵀA). That adds
                the rounding of fp32 each time, about 3e-8 of their length, and after n times about √n of it.
            num_references: how many there will be, those that are kept too; by default as many as the last refresh had.
                Room for more is found, by copying those that were captured.

        Raises:
            RuntimeError: a reference to be kept is not in the basis, or the basis does not hold it whole.
            UnsupportedError: more references than ``mode="conflict"`` solves for.
        """
        self._require_solvable(len(keep) if num_references is None else num_references)
        if unknown := [name for name in keep if not self.has_basis or name not in self.reference_names]:
            raise RuntimeError(
                f"begin_refresh() is to keep {unknown[0]!r}, which is not in the basis: capture it first"
            )
        if keep and (self.needs_refresh or self.config.basis_dtype != "fp32" or self.config.energy < 1.0):
            raise RuntimeError(
                "begin_refresh(keep=...) needs a finite basis in fp32 that holds all energy: references come out of any "
                "other damaged, and the more so the nearer they are to each other; capture them all"
            )
        self._captured_names, self._captured_KN = list(keep), None  # freed, if a refresh is begun once more
        self._captured_KN = self._storage.rows(len(self.reference_names) if num_references is None else num_references)
        self._num_kept = len(keep)
        if keep:
            self._recover(keep, self._captured_KN[: len(keep)])

    @torch.no_grad()
    def _recover(self, names: Sequence[str], out_JN: Tensor) -> None:
        """Write reference gradients as the basis holds them."""
        basis = self._space.basis
        assert basis is not None
        of_names = [self.reference_names.index(name) for name in names]
        combine(self._shard.layout, basis.rows_KN, basis.reference_BKK[:, :, of_names], out_JN)

    def capture(self, name: str, *, loss_scale: float | None = None) -> None:
        """Keep the gradient that lies in Megatron's buffers now as the reference ``name``. Local, no communication.

        Call it after ``finalize_model_grads``, when the gradient is reduced as a training gradient is, and before
        anything else touches the buffers. The loss scale is divided out: the optimizer's, or ``loss_scale`` if the passes
        had one of their own.

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
        if index == self._captured_KN.shape[0]:  # nobody has said how many there will be
            known_KN, self._captured_KN = self._captured_KN, self._storage.rows(index + 1)
            self._captured_KN[:index] = known_KN
        row_N = self._captured_KN[index]
        self._shard.read_main_grads(row_N)
        scale = self._optimizer.get_loss_scale().item() if loss_scale is None else loss_scale
        if scale != 1.0:
            row_N.div_(scale)
        self._captured_names.append(name)

    def captured_are_finite(self) -> bool:
        """Whether all that was captured since :meth:`begin_refresh` is, on all ranks alike. One all-reduce of a number.

        :meth:`finish_refresh` looks as well; this is for who would take the gradients once more, with a smaller loss scale.
        """
        captured_KN = () if self._captured_KN is None else self._captured_KN[: len(self._captured_names or ())]
        bad = sum(not _is_finite(row_N) for row_N in captured_KN)
        table = torch.tensor([bad], dtype=torch.float64, device=self._shard.layout.device)
        return not sum_over_ranks(table, self._shard.reduction.group).item()

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
        self._require_solvable(len(names))
        layout = self._shard.layout
        gram_BKK, with_old_BKJ, moved_BJ = self._summed_products(self._storage.within_reach(rows_KN))
        self.rejected_references = self._not_finite(gram_BKK, names)
        if self.rejected_references:
            self.rejected_refreshes += 1
            self.interval = {}
            if dist.get_rank() == 0:
                logger.warning("the gradient of reference %s; %s", self.rejected_references, self._what_is_left())
            return False
        self.rejected_refreshes = 0
        self.interval = self._told_of_interval(names, gram_BKK, with_old_BKJ, moved_BJ)
        transform = orthonormalise(gram_BKK, self.config.rank_tolerance, self.config.energy)
        if self.config.energy < 1.0:
            transform, self.kept_energy = transform.without_empty_columns(), transform.kept_energy(gram_BKK)
        reference_BKK = transform.reference_BKK.to(layout.device)
        self._space.basis = None  # its memory serves the new one
        self._space.needs_refresh = False
        self._space.basis = Basis(
            rows_KN=self._storage.combined(rows_KN, transform.weights_BKK.to(layout.device)),
            reference_BKK=reference_BKK,
            cone=Cone(reference_BKK) if self.config.mode == "conflict" else None,
            rank=int(transform.rank_B.max()),
            rank_total=int(transform.rank_B.sum()),
        )
        self.reference_names = names
        self._along_BK = self._along(self._space.basis)
        return True

    def _require_solvable(self, num_references: int) -> None:
        if self.config.mode == "conflict" and num_references > MAX_CONFLICT_REFERENCES:
            raise UnsupportedError(
                f"--ogpsa-mode conflict with {num_references} references: it solves for up to {MAX_CONFLICT_REFERENCES}; "
                "join some references into one, or use mode orthogonal"
            )

    def _summed_products(self, rows_KN: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """In one all-reduce: A·Aᵀ, A·Qᵀ with the basis in use, and Q·(θ − θ at its refresh), fp64 on the host.

        [B, K, K], [B, K, J], [B, J]; the last two are None where there is no basis, or no way to the parameters.
        """
        layout, basis = self._shard.layout, self._space.basis
        tables = [gram(layout, rows_KN)]
        if basis is not None:
            tables.append(products(layout, rows_KN, basis.rows_KN))
            along_BK = self._along(basis)
            if along_BK is not None and self._along_BK is not None:
                tables.append(along_BK - self._along_BK)
        joined = torch.cat([table.flatten(1) for table in tables], dim=1)
        summed = sum_over_ranks(joined, self._shard.reduction.group).cpu()
        parts = summed.split([table.flatten(1).shape[1] for table in tables], dim=1)
        gram_BKK, *others = (part.reshape(table.shape) for part, table in zip(parts, tables, strict=True))
        return gram_BKK, others[0] if others else None, others[1] if others[1:] else None

    @torch.no_grad()
    def _along(self, basis: Basis) -> Tensor | None:
        """Qᵀθ, this rank's share, fp64 [B, K]; None where it is out of reach, or Q does not hold whole references."""
        if not self._shard.reaches_parameters or self.config.energy < 1.0:
            return None
        layout = self._shard.parameter_layout
        return dots(layout, basis.rows_KN, self._shard.parameters)[:, :-1]

    def _told_of_interval(
        self, names: Sequence[str], gram_BKK: Tensor, with_old_BKJ: Tensor | None, moved_BJ: Tensor | None
    ) -> dict[str, ReferenceInterval]:
        """What the sums of a refresh tell of the steps since the last one."""
        old = self._space.basis
        if old is None or with_old_BKJ is None or self.needs_refresh:
            self._intervals.forget()
            return {}
        kept = names[: self._num_kept]
        return self._intervals.told(names, kept, gram_BKK, with_old_BKJ, moved_BJ, old, self.reference_names)

    def _not_finite(self, gram_BKK: Tensor, names: Sequence[str]) -> str:
        """The references whose squared norm is not finite in some block, and where; empty if all are."""
        is_bad_BK = ~gram_BKK.diagonal(dim1=-2, dim2=-1).isfinite()
        bad = [name for name, is_bad in zip(names, is_bad_BK.any(dim=0).tolist(), strict=True) if is_bad]
        blocks = [self.block_names[block] for block in is_bad_BK.any(dim=1).nonzero().flatten().tolist()]
        return f"{', '.join(bad)} is not finite in {some_of(blocks)}" if bad else ""

    def _what_is_left(self) -> str:
        if self.needs_refresh:
            return "nor is the basis in use: steps are skipped"
        return "the last good basis is kept" if self.has_basis else "no basis yet: steps are not projected"

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
        return 0 if basis is None else basis.rows_KN.nbytes

    @property
    def block_names(self) -> list[str]:
        """The blocks that are projected on their own, in the whole model."""
        return self._shard.block_names

    def detach(self) -> None:
        """Give the optimizer its own methods back and free the basis."""
        self._space.remove()
        self._captured_KN = self._captured_names = self._along_BK = None


def _is_finite(row_N: Tensor) -> bool:
    """By its ends, which takes no memory of the row's size: NaN becomes both of them."""
    return not row_N.numel() or all(bool(end.isfinite()) for end in row_N.aminmax())


def attach(
    optimizer: MegatronOptimizer,
    model: DistributedDataParallel | Sequence[DistributedDataParallel],
    config: OGPSAConfig | None = None,
) -> OGPSA:
    """Project the steps of ``optimizer``. Collective: every rank of the model calls it.

    Args:
        optimizer: a Megatron optimizer with fp32 or 16-bit parameters, distributed or not, or a chain of them.
        model: this rank's model chunks, wrapped in megatron.core's ``DistributedDataParallel``.
        config: by default the updates of each logical tensor are projected, and lose what conflicts with a reference.

    Raises:
        UnsupportedError: a Megatron feature that is not supported, by its flag's name; or the optimizer has a plugin already.
        UserError: not a Megatron model.
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    if "prepare_grads" in optimizer.__dict__:
        raise UnsupportedError("attach(): this optimizer is hooked already; detach() the plugin that holds it first")
    return OGPSA(optimizer, chunks, config or OGPSAConfig())


__all__ = ["OGPSA", "attach"]
