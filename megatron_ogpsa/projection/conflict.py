"""``mode="conflict"``: the nearest gradient that hurts no reference, found in the few coordinates of the basis.

Everything here is redone on every rank from the same numbers, and what comes out changes weights of which several ranks
hold a copy: only operations that are rounded one by one in a fixed order are used, no matrix products.

Shape legend: B = blocks, K = references, F = 2^K faces of the cone; K comes first, so that slices are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEPENDENT = 1e-8
"""A unit reference that is nearer than this to the span of others is taken to lie in it. Those that the basis tells
apart are at least √``rank_tolerance`` = 1e-6 away."""

FEASIBLE = 1e-12
"""What rounding may leave of ⟨g', a⟩/(‖c‖·‖a‖) below zero where the exact solution has zero."""

CHUNK_ELEMENTS = 2**20
"""Faces are tried for as many blocks at once as make temporary tables of about this size."""


@dataclass(frozen=True)
class _Chunk:
    """Some blocks' references of length one, [coordinate K, reference K, B], and for each face its last direction."""

    blocks: slice
    unit_KKB: Tensor
    directions_KFB: Tensor


class Cone:
    """GEM's cone {g : ⟨g, a_j⟩ ≥ 0 for each reference j}, block by block (arXiv:1706.08840, eq. 11).

    The nearest point of the cone to g is g without its component in the span of those references whose constraint is
    active. K is small, so each of the 2^K faces (sets of active constraints) is tried; among the feasible results the
    nearest is the solution. All faces' projections grow from one Gram-Schmidt tree: face S ∪ {j}, j larger than all
    in S, takes one direction more out of what S leaves. Orthogonal directions keep the error at the condition number of
    the references, where multipliers, which come from their Gram matrix, have its square.

    Args:
        reference_BKK: QᵀA, fp64; column j holds reference j in the basis.
    """

    def __init__(self, reference_BKK: Tensor) -> None:
        num_blocks, _, num_references = reference_BKK.shape
        step = max(1, CHUNK_ELEMENTS // (2**num_references * num_references))
        self._chunks = [
            _chunk(reference_BKK[start : start + step], slice(start, start + step))
            for start in range(0, num_blocks, step)
        ]

    def removed(self, coefficients_BK: Tensor) -> Tensor:
        """What is to be subtracted from each block's gradient, in the basis: r = c − c', zero where nothing is hurt.

        Args:
            coefficients_BK: c = Qᵀg of the reduced gradient, fp64, finite.
        """
        removed_BK = torch.empty_like(coefficients_BK)
        for chunk in self._chunks:
            coefficients_KB = coefficients_BK[chunk.blocks].T.contiguous()
            removed_BK[chunk.blocks] = (coefficients_KB - _nearest(chunk, coefficients_KB)).T
        return removed_BK


def _chunk(reference_BKK: Tensor, blocks: slice) -> _Chunk:
    reference_KKB = reference_BKK.permute(1, 2, 0).contiguous()
    # Unit references: a constraint's sign does not depend on length, and tolerances become relative.
    unit_KKB = _unit(reference_KKB, smallest=0.0)
    return _Chunk(blocks, unit_KKB, _directions(unit_KKB))


def _directions(unit_KKB: Tensor) -> Tensor:
    """For face number S with the highest bit j: reference j without its component in the span of the others in S, with
    length one, or zero if nothing is left. [K, F, B]"""
    num_references, _, num_blocks = unit_KKB.shape
    directions_KFB = unit_KKB.new_zeros(num_references, 2**num_references, num_blocks)
    for j in range(num_references):
        below = torch.arange(2**j, device=unit_KKB.device)  # the faces of the references before j
        rest_KFB = unit_KKB[:, j, None, :].repeat(1, 2**j, 1)
        for i in [*range(j), *range(j)]:  # twice is enough (Parlett, The Symmetric Eigenvalue Problem, 6.9)
            direction_KFB = directions_KFB[:, below & (2 ** (i + 1) - 1)] * (below >> i & 1)[:, None]
            rest_KFB = rest_KFB - direction_KFB * _sum(direction_KFB * rest_KFB)
        directions_KFB[:, 2**j : 2 ** (j + 1)] = _unit(rest_KFB, smallest=DEPENDENT)
    return directions_KFB


def _nearest(chunk: _Chunk, coefficients_KB: Tensor) -> Tensor:
    """The coordinates c' of the nearest point in the cone, [K, B]."""
    directions_KFB = chunk.directions_KFB
    left_KFB = coefficients_KB[:, None].repeat(1, directions_KFB.shape[1], 1)
    squared_distance_FB = torch.zeros_like(left_KFB[0])
    for j in range(coefficients_KB.shape[0]):
        smaller, larger = slice(0, 2**j), slice(2**j, 2 ** (j + 1))
        overlap_FB = _sum(directions_KFB[:, larger] * left_KFB[:, smaller])
        left_KFB[:, larger] = left_KFB[:, smaller] - directions_KFB[:, larger] * overlap_FB
        squared_distance_FB[larger] = squared_distance_FB[smaller] + overlap_FB * overlap_FB
    slack_FB = torch.stack([_sum(unit_KB[:, None] * left_KFB) for unit_KB in chunk.unit_KKB.unbind(1)]).amin(dim=0)
    size_B = _sum(coefficients_KB * coefficients_KB).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    violation_FB = (-slack_FB / size_B).clamp_min(0)
    feasible_FB = violation_FB <= violation_FB.amin(dim=0).clamp_min(FEASIBLE)
    nearest_B = torch.where(feasible_FB, squared_distance_FB, torch.inf).argmin(dim=0)
    return left_KFB.gather(1, nearest_B.expand(left_KFB.shape[0], 1, -1)).squeeze(1)


def _sum(terms: Tensor) -> Tensor:
    """Over the first axis, in its order."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _unit(vectors: Tensor, smallest: float) -> Tensor:
    """Vectors along the first axis with length one; zero where they are not longer than ``smallest``."""
    length = _sum(vectors * vectors).sqrt()
    return torch.where(length > smallest, vectors / torch.where(length > smallest, length, 1.0), 0.0)
