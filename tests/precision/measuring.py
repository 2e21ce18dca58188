"""What is lost when the basis is stored with fewer digits: the product's own projection against one in fp64.

Shape legend: N = elements, K = references, B = blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ogpsa.config import OGPSAConfig
from megatron_ogpsa.projection.basis import orthonormalise
from megatron_ogpsa.projection.segments import (
    Segment,
    SegmentLayout,
    combine_rows,
    gram_and_dots,
    subtract_combination,
)

SIZES = (64, 1024, 16_384, 262_144, 2_097_152, 11_534_336)
"""Elements of the tensors of a model: a bias, a norm, and matrices; 13.9M together."""

CASES = [(1, 1.0), *((k, separation) for k in (2, 4) for separation in (1.0, 1e-1, 1e-2, 1e-3))]
"""References, and the length of what each has of its own beside a direction that all share."""

SHARE = 2.0
"""Of the gradient along each basis vector, against 1 for the rest: four fifths of its square and more are to be removed."""

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One way of storing in one case; leaks are the largest of all blocks, relative to the block's projected gradient.

    Attributes:
        error: ‖g' − g'_fp64‖/‖g'_fp64‖ over all blocks.
        leak: max_j |⟨g', a_j⟩|/(‖g'‖·‖a_j‖), which is what a step does to a reference's loss.
        span_leak: the same with an exact orthonormal basis of the references' span in their place: of near-parallel
            references it also sees the direction in which they differ.
        span_leak_of_block: for each block.
    """

    storage: str
    granularity: str
    references: int
    separation: float
    error: float
    leak: float
    span_leak: float
    span_leak_of_block: list[float]


Project = Callable[[SegmentLayout, Tensor, list[Tensor]], None]


def project(layout: SegmentLayout, references_KN: Tensor, spans: list[Tensor], *, dtype: torch.dtype) -> None:
    """As the plugin does."""
    stored_KN = _stored_basis(layout, references_KN, dtype)
    coefficients_BK = gram_and_dots(layout, stored_KN, spans)[:, :-1]
    subtract_combination(layout, spans, stored_KN, coefficients_BK)


def project_corrected(layout: SegmentLayout, references_KN: Tensor, spans: list[Tensor]) -> None:
    """Off the span of what was stored, exactly: c = (Q̃ᵀQ̃)⁻¹·Q̃ᵀg. The rounded basis' Gram matrix is one more all-reduce."""
    stored_KN = _stored_basis(layout, references_KN, torch.bfloat16)
    coefficients_BK = gram_and_dots(layout, stored_KN, spans)[:, :-1]
    solved_BK = torch.linalg.pinv(gram_and_dots(layout, stored_KN), hermitian=True) @ coefficients_BK[..., None]
    subtract_combination(layout, spans, stored_KN, solved_BK[..., 0])


def project_scaled(layout: SegmentLayout, references_KN: Tensor, spans: list[Tensor]) -> None:
    """fp16 has three digits more than bf16 and a small range: each block's basis times a power of two near √N fits."""
    basis_KN = _stored_basis(layout, references_KN, torch.float32)
    sizes_B = torch.zeros(layout.num_blocks, dtype=torch.float64)
    for tile in layout.tiles:
        if tile.lengths_S is None:
            sizes_B[tile.block] += tile.stop - tile.start
        else:
            assert tile.blocks_S is not None
            sizes_B.index_add_(0, tile.blocks_S, tile.lengths_S.double())
    scale_B = torch.exp2(sizes_B.sqrt().log2().round())
    scale_BKK = torch.eye(len(references_KN), dtype=torch.float64) * scale_B[:, None, None]
    stored_KN = torch.empty_like(basis_KN, dtype=torch.float16)
    combine_rows(layout, basis_KN, scale_BKK, stored_KN)
    coefficients_BK = gram_and_dots(layout, stored_KN, spans)[:, :-1]
    subtract_combination(layout, spans, stored_KN, coefficients_BK / scale_B[:, None] ** 2)


def project_references(layout: SegmentLayout, references_KN: Tensor, spans: list[Tensor]) -> None:
    """Store the references and not their basis: g ← g − Ã·W·Wᵀ·Ãᵀg, W from the rounded references' Gram matrix."""
    stored_KN = references_KN.bfloat16()
    weights_BKK = orthonormalise(gram_and_dots(layout, stored_KN), OGPSAConfig().rank_tolerance).weights_BKK
    coefficients_BK1 = gram_and_dots(layout, stored_KN, spans)[:, :-1, None]
    subtract_combination(layout, spans, stored_KN, (weights_BKK @ (weights_BKK.mT @ coefficients_BK1))[..., 0])


STORAGES: dict[str, Project] = {
    "fp32": partial(project, dtype=torch.float32),
    "bf16": partial(project, dtype=torch.bfloat16),
    "bf16, corrected": project_corrected,
    "fp16, scaled": project_scaled,
    "bf16 references": project_references,
}
"""The first two are what ``--ogpsa-basis-dtype`` chooses; the others are what else could be done in bf16's memory."""


def _stored_basis(layout: SegmentLayout, references_KN: Tensor, dtype: torch.dtype) -> Tensor:
    transform = orthonormalise(gram_and_dots(layout, references_KN), OGPSAConfig().rank_tolerance)
    stored_KN = torch.empty_like(references_KN, dtype=dtype)
    combine_rows(layout, references_KN, transform.weights_BKK, stored_KN)
    return stored_KN


@dataclass(frozen=True)
class Problem:
    """References and a gradient, in fp32."""

    references_KN: Tensor
    gradient_N: Tensor


def problem(sizes: Sequence[int], num_references: int, separation: float, *, seed: int = 0) -> Problem:
    """Blocks of ``sizes``, each with a scale of its own, over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale_N = torch.cat([torch.full((size,), 10.0 ** (-6 * index / len(sizes))) for index, size in enumerate(sizes)])
    total = sum(sizes)
    references_KN = (normal(1, total) + separation * normal(num_references, total)) * scale_N
    gradient_N = normal(total) * scale_N
    for block in _blocks(sizes):
        rest = gradient_N[block].norm()
        for row_N in _orthonormal(references_KN[:, block]):
            gradient_N[block] += SHARE * rest * row_N
    return Problem(references_KN, gradient_N)


def measured(given: Problem, sizes: Sequence[int], **case: Any) -> Iterator[Measurement]:
    """Each storage, with blocks of ``sizes``."""
    layout = SegmentLayout([[Segment(size, block, counted=True) for block, size in enumerate(sizes)]], len(sizes), CPU)
    bases = [_orthonormal(given.references_KN[:, block]) for block in _blocks(sizes)]
    exact_N = torch.cat(
        [_without(given.gradient_N[block].double(), basis) for block, basis in zip(_blocks(sizes), bases, strict=True)]
    )
    for storage, project_ in STORAGES.items():
        result_N = given.gradient_N.clone()
        project_(layout, given.references_KN, [result_N])
        span_leaks, leaks = [], []
        for block, basis in zip(_blocks(sizes), bases, strict=True):
            own_N = result_N[block].double()
            rows_KN = given.references_KN[:, block].double()
            span_leaks.append(float((basis @ own_N).norm() / own_N.norm()))
            leaks.append(float(((rows_KN @ own_N).abs() / rows_KN.norm(dim=1)).max() / own_N.norm()))
        yield Measurement(
            storage=storage,
            error=float((result_N.double() - exact_N).norm() / exact_N.norm()),
            leak=max(leaks),
            span_leak=max(span_leaks),
            span_leak_of_block=span_leaks,
            **case,
        )


def all_measurements(
    sizes: Sequence[int] = SIZES, cases: Sequence[tuple[int, float]] = CASES
) -> Iterator[dict[str, Any]]:
    """Every storage in every case, per tensor and per model, as JSON."""
    for references, separation in cases:
        given = problem(sizes, references, separation)
        for granularity, blocks in (("tensor", sizes), ("model", [sum(sizes)])):
            for measurement in measured(
                given, blocks, granularity=granularity, references=references, separation=separation
            ):
                yield asdict(measurement)


def _blocks(sizes: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _orthonormal(rows_KN: Tensor) -> Tensor:
    """Modified Gram-Schmidt in fp64, twice: as orthogonal as fp64 is, also where rows are nearly parallel."""
    basis_KN = rows_KN.double()
    for _ in range(2):
        for k in range(basis_KN.shape[0]):
            for before in range(k):
                basis_KN[k] -= (basis_KN[before] @ basis_KN[k]) * basis_KN[before]
            basis_KN[k] /= basis_KN[k].norm()
    return basis_KN


def _without(vector_N: Tensor, basis_KN: Tensor) -> Tensor:
    for _ in range(2):
        vector_N = vector_N - (basis_KN @ vector_N) @ basis_KN
    return vector_N
