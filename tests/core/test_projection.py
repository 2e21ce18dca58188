"""The mathematics alone: invariants of the projection on one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from megatron_ogpsa.projection import removal
from megatron_ogpsa.projection.basis import orthonormalise
from megatron_ogpsa.projection.conflict import Cone
from megatron_ogpsa.projection.segments import (
    Segment,
    SegmentLayout,
    TileLimits,
    combine_rows,
    gram_and_dots,
    subtract_combination,
)

CPU = torch.device("cpu")
TOLERANCE = 1e-12

# Long and short segments, two spans, a block on both spans, one block that is not counted here.
SPANS = [
    [Segment(5000, 0, True), Segment(7, 1, True), Segment(9, 2, False), Segment(300, 1, True), Segment(4096, 2, True)],
    [Segment(33, 2, True), Segment(1, 3, True), Segment(9000, 3, True), Segment(64, 0, True)],
]
NUM_BLOCKS = 4
LIMITS = [TileLimits(tile=2**15, short=2**12), TileLimits(tile=512, short=64), TileLimits(tile=2**24, short=2**20)]


def layout_of(limits: TileLimits | None = None, *, all_counted: bool = True) -> SegmentLayout:
    spans = [[Segment(s.length, s.block, all_counted or s.counted) for s in span] for span in SPANS]
    return SegmentLayout(spans, NUM_BLOCKS, CPU, limits)


def block_of_element() -> Tensor:
    segments = [s for span in SPANS for s in span]
    return torch.tensor([s.block for s in segments]).repeat_interleave(torch.tensor([s.length for s in segments]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def project(vector_N: Tensor, rows_KN: Tensor, layout: SegmentLayout, mode: str = "orthogonal") -> Tensor:
    """The product's own sequence of calls, on one process."""
    transform = orthonormalise(gram_and_dots(layout, rows_KN), TOLERANCE)
    basis_KN = torch.empty_like(rows_KN)
    combine_rows(layout, rows_KN, transform.weights_BKK, basis_KN)
    result = vector_N.clone()
    spans = list(result.split(layout.span_lengths))
    coefficients = gram_and_dots(layout, basis_KN, spans)[:, :-1]
    if mode == "orthogonal":
        removed = removal.orthogonal(coefficients)
    else:
        removed = Cone(transform.reference_BKK).removed(coefficients)
    subtract_combination(layout, spans, basis_KN, removed)
    return result


def inner(left: Tensor, right: Tensor, block: int) -> float:
    select = block_of_element() == block
    return float(left.double()[select] @ right.double()[select])


def leak(result: Tensor, rows_KN: Tensor) -> float:
    """Largest |⟨g', a⟩|/(‖g'‖·‖a‖) over blocks and references."""
    values = [
        abs(inner(result, row, block)) / (inner(result, result, block) * inner(row, row, block)) ** 0.5
        for row in rows_KN
        for block in range(NUM_BLOCKS)
    ]
    return max(values)


@pytest.mark.parametrize("limits", LIMITS)
def test_sums_over_blocks_are_exact_for_integers_however_the_work_is_cut(limits: TileLimits) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(limits, all_counted=False)
    rows = torch.randint(-4, 5, (3, layout.num_elements), generator=generator).float()
    vector = torch.randint(-4, 5, (layout.num_elements,), generator=generator).float()
    counted = torch.cat([torch.full((s.length,), s.counted) for span in SPANS for s in span])
    gram, dots = gram_and_dots(layout, rows), gram_and_dots(layout, rows, list(vector.split(layout.span_lengths)))
    for block in range(NUM_BLOCKS):
        select = counted & (block_of_element() == block)
        expected = rows.double()[:, select]
        assert torch.equal(gram[block], expected @ expected.T)
        assert torch.equal(dots[block, :-1], expected @ vector.double()[select])
        assert dots[block, -1] == vector.double()[select].square().sum()


def test_a_small_block_beside_large_ones_is_summed_as_if_it_were_alone() -> None:
    """A bias or a norm weight with a gradient 1e-6 of its neighbours' still has products exact to fp64."""
    lengths = [4000, 4000, 32, 4000, 7]
    layout = SegmentLayout([[Segment(length, block, True) for block, length in enumerate(lengths)]], len(lengths), CPU)
    rows, vector = random(2, layout.num_elements), random(layout.num_elements, seed=1)
    small = slice(8000, 8032)
    rows[:, small] *= 1e-6
    vector[small] *= 1e-6
    gram, dots = gram_and_dots(layout, rows), gram_and_dots(layout, rows, [vector])
    expected = rows.double()[:, small]
    torch.testing.assert_close(gram[2], expected @ expected.T, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(dots[2, :-1], expected @ vector.double()[small], rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("limits", LIMITS)
def test_a_long_block_is_summed_in_fp64(limits: TileLimits) -> None:
    """To 1e-12 of the vectors' lengths, in any order of the sum; fp32 within tiles gives 1e-8."""
    layout = SegmentLayout([[Segment(2**17, 0, True)]], 1, CPU, limits)
    rows, vector = random(2, layout.num_elements), random(layout.num_elements, seed=1) + 3.0
    gram, dots = gram_and_dots(layout, rows), gram_and_dots(layout, rows, [vector])
    sizes = rows.double().norm(dim=1)
    torch.testing.assert_close(gram[0], rows.double() @ rows.double().T, rtol=0.0, atol=1e-12 * float(sizes.max() ** 2))
    size = float(sizes.max() * vector.double().norm())
    torch.testing.assert_close(dots[0, :-1], rows.double() @ vector.double(), rtol=0.0, atol=1e-12 * size)
    torch.testing.assert_close(dots[0, -1], vector.double().square().sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("num_references", [1, 2, 3, 8])
def test_result_is_orthogonal_to_every_reference(limits: TileLimits, num_references: int) -> None:
    layout = layout_of(limits)
    rows = random(num_references, layout.num_elements)
    vector = random(layout.num_elements, seed=1) + 2 * rows.sum(dim=0)
    assert leak(project(vector, rows, layout), rows) < 1e-6


def test_projecting_twice_is_projecting_once() -> None:
    layout = layout_of()
    rows, vector = random(3, layout.num_elements), random(layout.num_elements, seed=1)
    once = project(vector, rows, layout)
    twice = project(once, rows, layout)
    assert (twice - once).norm() < 1e-6 * once.norm()


def test_what_is_orthogonal_already_stays() -> None:
    layout = layout_of()
    rows = torch.zeros(1, layout.num_elements)
    rows[0, ::2] = random(1, layout.num_elements)[0, ::2]
    vector = random(layout.num_elements, seed=1)
    vector[::2] = 0.0
    assert torch.equal(project(vector, rows, layout), vector)


def test_a_gradient_in_the_protected_subspace_vanishes() -> None:
    layout = layout_of()
    rows = random(2, layout.num_elements)
    vector = rows[0] - 3 * rows[1]
    assert project(vector, rows, layout).norm() < 1e-6 * vector.norm()


def test_no_feasible_direction_descends_faster() -> None:
    layout = layout_of()
    rows, gradient = random(2, layout.num_elements), random(layout.num_elements, seed=1)
    projected = project(gradient, rows, layout).double()
    best = gradient.double() @ projected / projected.norm()
    for seed in range(20):
        other = project(gradient + 0.1 * random(layout.num_elements, seed=seed + 2), rows, layout).double()
        assert gradient.double() @ other / other.norm() < best


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.flip(0),
        lambda rows: -rows,
        lambda rows: rows * torch.tensor([1e-6, 1.0, 1e6])[:, None],
        lambda rows: torch.cat((rows, rows[:1], torch.zeros_like(rows[:1]), 3 * rows[1:2])),
        lambda rows: torch.stack((rows[0] + rows[1], rows[1], rows[2] - rows[0])),
    ],
    ids=["order", "sign", "scale", "duplicate-zero-parallel", "same-span"],
)
def test_only_the_span_of_the_references_matters(change: Callable[[Tensor], Tensor]) -> None:
    layout = layout_of()
    rows, vector = random(3, layout.num_elements), random(layout.num_elements, seed=1)
    expected = project(vector, rows, layout)
    # Summands of 1e6 and 1 in fp32 rows ("same-span") move the span itself by fp32 rounding.
    assert (project(vector, change(rows), layout) - expected).norm() < 2e-6 * expected.norm()


def test_rank_counts_independent_directions_in_each_block() -> None:
    layout = layout_of()
    rows = random(4, layout.num_elements)
    rows[1] = 2 * rows[0]
    rows[2] = 0.0
    rows[3][block_of_element() == 1] = -rows[0][block_of_element() == 1]
    transform = orthonormalise(gram_and_dots(layout, rows), TOLERANCE)
    assert transform.rank_B.tolist() == [2, 1, 2, 2]


@pytest.mark.parametrize("separation", [1e-3, 1e-5])
def test_nearly_parallel_references_are_told_apart(separation: float) -> None:
    """Bounds of notes on hazards: 6e-8 at 1e-3 and 2e-6 at 1e-5 for fp64 sums; the last digits differ by machine."""
    layout = SegmentLayout([[Segment(2**20, 0, True)]], 1, CPU)
    first = random(2**20)
    second = first + separation * random(2**20, seed=1)
    vector = random(2**20, seed=2) + 2 * (first + second)
    rows = torch.stack((first, second))
    transform = orthonormalise(gram_and_dots(layout, rows), TOLERANCE)
    assert transform.rank_B.tolist() == [2]
    result = project(vector, rows, layout).double()
    directions = torch.linalg.qr(rows.double().T).Q
    assert (result @ directions).abs().max() / result.norm() < (1e-6 if separation > 1e-4 else 1e-5)


def test_conflict_mode_gives_the_nearest_gradient_that_hurts_no_reference() -> None:
    """Against the optimality conditions of the quadratic program, which determine its solution."""
    layout = SegmentLayout([[Segment(400, 0, True)]], 1, CPU)
    for seed in range(10):
        rows = random(4, 400, seed=seed)
        vector = random(400, seed=100 + seed) - 0.3 * rows[0] - 0.2 * rows[1] + 0.5 * rows[2]
        result = project(vector, rows, layout, mode="conflict").double()
        slack = rows.double() @ result
        multipliers = torch.linalg.lstsq(rows.double().T, result - vector.double()).solution
        size = float(vector.norm() * rows.norm(dim=1).max())
        assert slack.min() > -1e-6 * size  # feasible
        assert multipliers.min() > -1e-6  # only pushes away from conflicts
        assert (slack * multipliers).abs().max() < 1e-6 * size  # and only where it is needed


def test_conflict_mode_leaves_a_harmless_gradient_alone() -> None:
    layout = SegmentLayout([[Segment(400, 0, True)]], 1, CPU)
    rows = random(2, 400)
    vector = rows.sum(dim=0)
    assert torch.equal(project(vector, rows, layout, mode="conflict"), vector)


def test_norm_after_needs_no_second_look_at_the_gradient() -> None:
    layout = layout_of()
    rows, vector = random(3, layout.num_elements), random(layout.num_elements, seed=1)
    result = project(vector, rows, layout)
    transform = orthonormalise(gram_and_dots(layout, rows), TOLERANCE)
    basis = torch.empty_like(rows)
    combine_rows(layout, rows, transform.weights_BKK, basis)
    sums = gram_and_dots(layout, basis, list(vector.split(layout.span_lengths)))
    after = removal.squared_norm_after(sums[:, -1], sums[:, :-1], removal.orthogonal(sums[:, :-1]))
    assert float(after.sum()) == pytest.approx(float(result.double().square().sum()), rel=1e-6)


def test_conflict_mode_with_zero_equal_and_opposed_references_in_many_blocks() -> None:
    """More blocks than are solved at once, each against a descent that needs no sets of active references."""
    num_blocks, num_references = 3000, 8
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(num_blocks, num_references, num_references, generator=generator, dtype=torch.float64)
    references[::3, :, 1] = 2.0 * references[::3, :, 0]
    references[::3, :, 2] = 0.0
    references[1::3, :, 4] = -references[1::3, :, 3]
    references[1::3, :, 5] = references[1::3, :, 0] + references[1::3, :, 1]
    coefficients = torch.randn(num_blocks, num_references, generator=generator, dtype=torch.float64)
    removed = Cone(references).removed(coefficients)
    left = coefficients - removed
    size = coefficients.norm(dim=1, keepdim=True) * references.norm(dim=1)
    slack = (references.mT @ left[:, :, None]).squeeze(-1)
    assert (slack >= -1e-11 * size).all()
    # left is the projection onto a cone: left ⟂ removed, and −removed is in the cone that the references span, whose
    # distance is what non-negative least squares leaves.
    assert ((left * removed).sum(dim=1).abs() <= 1e-11 * coefficients.square().sum(dim=1)).all()
    for block in range(0, num_blocks, 100):
        _, distance = nnls(references[block].numpy(), -removed[block].numpy())
        assert distance <= 1e-9 * float(coefficients[block].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_stay_bitwise_the_same_however_their_tiles_are_cut(dtype: torch.dtype) -> None:
    """Another rank counts other segments, and has other neighbours beside a copy."""
    length, num_references = 333, 5
    segments = [Segment(5000, 0, True), Segment(length, 1, True), Segment(70, 2, True)]
    cuts = [
        (SegmentLayout([segments], 3, CPU), 5000),
        (SegmentLayout([segments], 3, CPU, TileLimits(tile=100, short=64)), 5000),
        (SegmentLayout([[Segment(5000, 1, True), Segment(length, 1, True)]], 3, CPU), 5000),
        (SegmentLayout([[Segment(11, 0, True), Segment(length, 1, False), Segment(1, 1, True)]], 3, CPU), 11),
        (SegmentLayout([[Segment(length, 1, False)]], 3, CPU), 0),
    ]
    copy_KN, vector_N = random(num_references, length), random(length, seed=1).to(dtype)
    weights_BKK = random(3, num_references, num_references, seed=2).double()
    coefficients_BK = random(3, num_references, seed=3).double()
    results = []
    for layout, start in cuts:
        rows_KN = random(num_references, layout.num_elements, seed=4)
        rows_KN[:, start : start + length] = copy_KN
        gradient_N = random(layout.num_elements, seed=5).to(dtype)
        gradient_N[start : start + length] = vector_N
        combine_rows(layout, rows_KN, weights_BKK, rows_KN)
        subtract_combination(layout, [gradient_N], rows_KN, coefficients_BK)
        results.append((rows_KN[:, start : start + length], gradient_N[start : start + length]))
    for basis_KN, result_N in results[1:]:
        assert torch.equal(basis_KN, results[0][0])
        assert torch.equal(result_N, results[0][1])
