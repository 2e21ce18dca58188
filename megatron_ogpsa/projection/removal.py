"""How much of each basis vector is taken out of a gradient.

Both rules see the gradient only through its coefficients c = Qᵀg, so that they need no communication of their own.
Shape legend: B = blocks, K = references; the basis has K columns, zero beyond a block's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(coefficients_BK: Tensor) -> Tensor:
    """Remove the whole component: g' = g − Q·Qᵀg, so r = c (arXiv:2602.07892)."""
    return coefficients_BK


def nearest_without_conflict(coefficients_BK: Tensor, reference_BKK: Tensor) -> Tensor:
    """Project onto GEM's cone: argmin ‖g' − g‖² subject to ⟨g', a_j⟩ ≥ 0 for each reference j (arXiv:1706.08840, eq.
    11).

    With a_j = Q·ρ_j (ρ = ``reference_BKK``, columns) the problem lives in the basis: g' = g + Q·u, u = ρ·v, where v ≥ 0
    are the multipliers. K is small, so the exact solution is found by trying each of the 2^K active sets: for a set S
    the multipliers solve (ρᵀρ)_SS v_S = −(ρᵀc)_S; the right one is feasible in both problems, and among feasible ones
    (several when references are dependent) all give the same u.

    Args:
        coefficients_BK: c = Qᵀg of the reduced gradient, fp64.
        reference_BKK: QᵀA, fp64.

    Returns:
        r = −u, fp64 [B, K]: what is to be subtracted in the basis, zero where no reference is hurt.
    """
    num_references = coefficients_BK.shape[-1]
    # Unit references: the constraint's sign does not depend on length, and tolerances become relative.
    lengths_B1K = reference_BKK.norm(dim=-2, keepdim=True)
    unit_BKK = reference_BKK / torch.where(lengths_B1K > 0, lengths_B1K, 1.0)
    gram_BKK = unit_BKK.transpose(-1, -2) @ unit_BKK
    overlap_BK = (unit_BKK.transpose(-1, -2) @ coefficients_BK[:, :, None]).squeeze(-1)
    size_B = coefficients_BK.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)

    best_violation_B = torch.full_like(size_B, torch.inf)
    best_shift_BK = torch.zeros_like(coefficients_BK)
    for active in range(2**num_references):
        mask_K = torch.tensor([bool(active >> j & 1) for j in range(num_references)], device=coefficients_BK.device)
        system_BKK = torch.where(mask_K[:, None] & mask_K[None, :], gram_BKK, 0.0)
        inverse_BKK = torch.linalg.pinv(system_BKK, hermitian=True)
        multipliers_BK = (inverse_BKK @ (-overlap_BK * mask_K)[:, :, None]).squeeze(-1)
        slack_BK = overlap_BK + (gram_BKK @ multipliers_BK[:, :, None]).squeeze(-1)
        violation_B = torch.maximum((-multipliers_BK).amax(dim=-1), (-slack_BK).amax(dim=-1)).clamp_min(0) / size_B
        shift_BK = (unit_BKK @ multipliers_BK[:, :, None]).squeeze(-1)
        better_B = violation_B < best_violation_B
        best_violation_B = torch.where(better_B, violation_B, best_violation_B)
        best_shift_BK = torch.where(better_B[:, None], shift_BK, best_shift_BK)
    return -best_shift_BK


def squared_norm_after(squared_norm_B: Tensor, coefficients_BK: Tensor, removed_BK: Tensor) -> Tensor:
    """‖g − Q·r‖² = ‖g‖² − 2⟨c, r⟩ + ‖r‖² for each block, without touching the gradient again; never negative."""
    change_B = (removed_BK * (removed_BK - 2 * coefficients_BK)).sum(dim=-1)
    return (squared_norm_B + change_B).clamp_min(0)
