"""The basis of what is protected, and the rule of what is removed along it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ogpsa.plugin.streaming import HostRows
from megatron_ogpsa.projection import removal
from megatron_ogpsa.projection.conflict import Cone


@dataclass(frozen=True, kw_only=True)
class Basis:
    """An orthonormal basis of every block's protected subspace.

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
