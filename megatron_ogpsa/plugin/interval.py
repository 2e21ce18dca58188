"""What a refresh tells of the steps since each reference was last captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ogpsa.plugin.basis import Basis


@dataclass(frozen=True, kw_only=True)
class ReferenceInterval:
    """What a refresh tells of one reference over the steps since it was last captured.

    Attributes:
        captured: ‖Qᵀa‖²/‖a‖², the share of the fresh gradient's energy in the subspace that was protected; 1 if the basis
            is not stale at all and was not cut by ``energy``, NaN for a gradient that is zero.
        predicted_change: ⟨a, θ_now − θ_then⟩, a being the gradient as it was captured before: what the steps since have
            done to the reference's loss, to first order. Of projected updates it is zero up to rounding in mode orthogonal,
            and not positive in mode conflict; of projected gradients it is Adam's doing. None if the reference is new, if
            the basis was cut by ``energy``, or if the parameters lie within the inner optimizer
            (``--optimizer-cpu-offload``, ``--use-precision-aware-optimizer``).
    """

    captured: float
    predicted_change: float | None


class Intervals:
    """Adds up what the steps between refreshes have done to each reference, for references that are not captured at each."""

    def __init__(self) -> None:
        self._changes: dict[str, float] = {}  # to first order, from a reference's capture to the last refresh

    def forget(self) -> None:
        """After a basis that was not finite."""
        self._changes = {}

    def told(
        self,
        captured: Sequence[str],
        kept: Sequence[str],
        gram_BKK: Tensor,
        with_old_BKJ: Tensor,
        moved_BJ: Tensor | None,
        old: Basis,
        old_names: Sequence[str],
    ) -> dict[str, ReferenceInterval]:
        """What the sums of a refresh tell of each reference that was captured anew. All are fp64 on the host.

        Args:
            captured: names of the K rows of A, those of ``kept`` first.
            kept: references that came out of the basis, of which nothing new is known.
            gram_BKK: A·Aᵀ of each block.
            with_old_BKJ: A·Qᵀ with the basis in use until now.
            moved_BJ: Q·(θ − θ at its refresh); None where parameters are out of reach.
            old: that basis.
            old_names: its references.
        """
        energy_K = gram_BKK.diagonal(dim1=-2, dim2=-1).sum(dim=0)
        captured_K = with_old_BKJ.square().sum(dim=(0, 2)) / energy_K
        predicted: dict[str, float] = {}
        if moved_BJ is not None:  # a_j = Q·(Qᵀa_j), so that ⟨a_j, Δ⟩ = ⟨Qᵀa_j, QᵀΔ⟩
            changes_K = torch.einsum("bjk,bj->k", old.reference_BKK.cpu(), moved_BJ)
            predicted = {
                name: self._changes.get(name, 0.0) + change
                for name, change in zip(old_names, changes_K.tolist(), strict=True)
            }
        self._changes = {name: predicted[name] for name in kept if name in predicted}
        return {
            name: ReferenceInterval(captured=share, predicted_change=predicted.get(name))
            for name, share in zip(captured, captured_K.tolist(), strict=True)
            if name not in kept
        }
