"""The projected gradient is the one that an unsharded model would get, whatever the sharding."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import LAYOUTS, PRECISIONS, RANDOM
from tests.harness import WorkerGroup

# fp32 activations and gradients against fp64: rounding errors of some 1e-7 per element, independent of each other, in a
# gradient of which the projection removes about half.
FP32_TOLERANCE = 1e-6

# The precision-aware optimizer reads Megatron's bf16 gradients where they lie: the projected gradient is rounded once.
ROUNDED_TO_BF16 = ("tp2-bf16-grads-aware",)
BF16_ROUNDING = 2.0**-9

ALL_LAYOUTS = LAYOUTS | PRECISIONS


def assert_like_one_process(results: dict[str, dict[str, float]]) -> None:
    """What a rank found of the projected gradient, by granularity, is what one fp64 process has."""
    for granularity, result in results.items():
        assert result["num_blocks"] == result["expected_num_blocks"], granularity
        assert result["error"] < FP32_TOLERANCE, granularity
        assert result["norm_error"] < FP32_TOLERANCE, granularity
        assert result["removed"] == pytest.approx(result["expected_removed"], abs=FP32_TOLERANCE), granularity
        assert result["leak"] < FP32_TOLERANCE, granularity
        assert result["rank"] == 3, granularity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projected_gradient_equals_the_unsharded_one(
    distributed: Callable[[int], WorkerGroup], layout: str, record_property: Callable[[str, object], None]
) -> None:
    for results in distributed(LAYOUTS[layout].world_size).run("tests.core.cases:parity", layout=layout):
        for granularity, result in results.items():
            record_property(f"error per {granularity}", result["error"])
        assert_like_one_process(results)


@pytest.mark.parametrize("layout", RANDOM)
def test_passes_with_dropout_are_projected_as_they_came(distributed: Callable[[int], WorkerGroup], layout: str) -> None:
    """Against the fp64 projection of Megatron's own reduced gradients: only the projection itself rounds, fp32, 1e-7."""
    for results in distributed(RANDOM[layout].world_size).run("tests.core.cases:random_parity", layout=layout):
        for granularity, result in results.items():
            assert result["error"] < FP32_TOLERANCE, granularity
            assert result["norm_error"] < FP32_TOLERANCE, granularity
            assert result["removed"] == pytest.approx(result["expected_removed"], abs=FP32_TOLERANCE), granularity
            assert result["removed"] > 0.02, granularity
            assert result["randomness"] > 0.05, granularity  # two passes over the same rows differ


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_gram_matrices_are_bitwise_those_of_the_unsharded_model(
    distributed: Callable[[int], WorkerGroup], layout: str
) -> None:
    """Integer values make sums exact in any order: a block, a copy or a rank too many or too few shows in full."""
    assert all(distributed(ALL_LAYOUTS[layout].world_size).run("tests.core.cases:integer_gram", layout=layout))


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("layout", PRECISIONS)
def test_sixteen_bit_training_projects_in_fp32(
    distributed: Callable[[int], WorkerGroup], layout: str, granularity: str
) -> None:
    """On gradients that 16-bit types represent, so that only the projection can round: fp32, some 1e-7."""
    group = distributed(PRECISIONS[layout].world_size)
    for result in group.run("tests.core.cases:planted_parity", layout=layout, granularity=granularity):
        rounded = layout in ROUNDED_TO_BF16
        assert result["error"] < (BF16_ROUNDING if rounded else FP32_TOLERANCE)
        assert result["norm_error"] < FP32_TOLERANCE  # of what is about to be rounded
        assert result["scale"] == (1024.0 if PRECISIONS[layout].precision == "fp16" else 1.0)
