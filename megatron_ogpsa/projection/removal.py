"""How much of each basis vector is taken out of a gradient.

Rules see the gradient only through its coefficients c = Qᵀg, so that they need no communication of their own. The other
rule is :class:`megatron_ogpsa.projection.conflict.Cone`.
Shape legend: B = blocks, K = references; the basis has K columns, zero beyond a block's rank.
"""

from __future__ import annotations

from torch import Tensor


def orthogonal(coefficients_BK: Tensor) -> Tensor:
    """Remove the whole component: g' = g − Q·Qᵀg, so r = c (arXiv:2602.07892)."""
    return coefficients_BK


def squared_norm_after(squared_norm_B: Tensor, coefficients_BK: Tensor, removed_BK: Tensor) -> Tensor:
    """‖g − Q·r‖² = ‖g‖² − 2⟨c, r⟩ + ‖r‖² for each block, without touching the gradient again; never negative."""
    change_B = (removed_BK * (removed_BK - 2 * coefficients_BK)).sum(dim=-1)
    return (squared_norm_B + change_B).clamp_min(0)
