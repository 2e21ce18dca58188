"""From the Gram matrix of the reference gradients to an orthonormal basis of their span.

Shape legend: B = blocks, K = references. Everything here is tiny (B·K² numbers), fp64 and on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BasisTransform:
    """How each block's basis Q = A·W comes from its reference gradients A (columns are references).

    Attributes:
        weights_BKK: W, fp64; column r gives the r-th basis vector; columns from ``rank_B`` on are zero.
        reference_BKK: QᵀA = Λ^(1/2)·Vᵀ·S^(-1), fp64; column j holds reference j in the basis, for ``mode="conflict"``.
        rank_B: dimension of each block's span, int64.
    """

    weights_BKK: Tensor
    reference_BKK: Tensor
    rank_B: Tensor

    def without_empty_columns(self) -> BasisTransform:
        """With as many columns of W, R, as the block of the largest rank has (at least one): [B, K, R] and [B, R, K]."""
        largest = max(1, int(self.rank_B.max()))
        return BasisTransform(self.weights_BKK[:, :, :largest], self.reference_BKK[:, :largest], self.rank_B)

    def kept_energy(self, gram_BKK: Tensor) -> float:
        """‖Qᵀa_j‖²/‖a_j‖² over all blocks, the smallest retained share of any reference; 1 if all are zero."""
        energy_K = gram_BKK.diagonal(dim1=-2, dim2=-1).sum(dim=0)
        share_K = self.reference_BKK.square().sum(dim=(0, 1)) / energy_K
        return float(share_K.nan_to_num(nan=1.0).min())


def orthonormalise(gram_BKK: Tensor, tolerance: float, energy: float = 1.0) -> BasisTransform:
    """Solve for W with (A·W)ᵀ(A·W) = I on the span of A, given only M = AᵀA.

    Scale to unit diagonal, S = diag(M)^(-1/2), then S·M·S = V·Λ·Vᵀ, and W = S·V·Λ^(-1/2) over the eigenvalues above
    ``tolerance`` times the largest. Scaling first makes the rank independent of the references' magnitudes; duplicate,
    parallel and zero references lower the rank and nothing else. The error of the result is that of the fp64 dot
    products in M times the condition number of S·M·S: 2e-6 for two references 1e-5 apart, where Gram-Schmidt in
    fp32 gives 0.8.

    Args:
        gram_BKK: symmetric positive semi-definite, fp64, finite.
        tolerance: relative to the largest eigenvalue, without unit.
        energy: share of ‖a_j‖² that each reference keeps in each block; below 1 the basis ends with the first leading
            vectors that hold as much of every one. Scaling makes that fair: by the references' own lengths the leading
            vectors would be those of the longest, and a reference with small gradients would be given up first.
    """
    diagonal_BK = gram_BKK.diagonal(dim1=-2, dim2=-1)
    scale_BK = torch.where(diagonal_BK > 0, diagonal_BK, 1.0).rsqrt() * (diagonal_BK > 0)
    unit_BKK = scale_BK[:, :, None] * gram_BKK * scale_BK[:, None, :]
    eigenvalues_BK, vectors_BKK = torch.linalg.eigh(unit_BKK)
    # Largest first; and one sign for all, because every rank multiplies its own shard with its own copy of W.
    eigenvalues_BK, vectors_BKK = eigenvalues_BK.flip(-1), vectors_BKK.flip(-1)
    largest_B1K = vectors_BKK.abs().argmax(dim=-2, keepdim=True)
    vectors_BKK = vectors_BKK * torch.where(vectors_BKK.gather(-2, largest_B1K) < 0, -1.0, 1.0)
    keep_BK = eigenvalues_BK > tolerance * eigenvalues_BK[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    if energy < 1.0:
        keep_BK &= _needed(eigenvalues_BK, vectors_BKK, energy * (diagonal_BK > 0))
    root_BK = torch.where(keep_BK, eigenvalues_BK, 1.0).sqrt() * keep_BK
    inverse_root_BK = torch.where(keep_BK, eigenvalues_BK, 1.0).rsqrt() * keep_BK
    weights_BKK = scale_BK[:, :, None] * vectors_BKK * inverse_root_BK[:, None, :]
    return BasisTransform(
        weights_BKK=weights_BKK,
        # WᵀM is the same, but small coordinates would be differences of large numbers.
        reference_BKK=(vectors_BKK * root_BK[:, None, :]).mT * diagonal_BK.sqrt()[:, None, :],
        rank_B=keep_BK.sum(dim=-1),
    )


def _needed(eigenvalues_BK: Tensor, vectors_BKK: Tensor, energy_BK: Tensor) -> Tensor:
    """Which eigenvectors, largest first, it takes until each unit reference keeps such a share of its square."""
    # A unit reference is Q·Λ^(1/2)·Vᵀ: along the r-th basis vector it has the share λ_r·V_jr² of its square.
    held_BKK = (eigenvalues_BK[:, None, :] * vectors_BKK.square()).cumsum(dim=-1)
    is_enough_BK = (held_BKK >= energy_BK[:, :, None]).all(dim=1)
    return torch.cat((torch.ones_like(is_enough_BK[:, :1]), ~is_enough_BK[:, :-1]), dim=1)
