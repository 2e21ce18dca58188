"""The emulated kernels compute what they stand for."""

from __future__ import annotations

from collections.abc import Callable

from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
CASES = "tests.transformer_engine.kernel_cases"


def test_values_are_rounded_to_fp8_and_read_as_transformer_engine_reads_them(distributed_te: Distributed) -> None:
    """Off by no more than E4M3 is, by rows and by columns; its Python reads three of the formats itself."""
    (found,) = distributed_te(1).run(f"{CASES}:rounding")
    for name, errors in found.items():
        assert 0.5 < errors["rowwise"] <= 1.0, name
        assert 0.5 < errors["columnwise"] <= 1.0, name
        assert errors["read otherwise"] == 0.0, name


def test_products_norms_and_attention_are_pytorchs(distributed_te: Distributed) -> None:
    """fp32, of sums of some ten numbers of size 1 to 10: a few 1e-6."""
    group = distributed_te(1)
    assert group.run(f"{CASES}:products_of_matrices") < [1e-5]
    assert group.run(f"{CASES}:norms") < [1e-5]
    (attention,) = group.run(f"{CASES}:fused_attention")
    assert len(attention) == 3
    assert all(error < 1e-5 for error in attention.values()), attention
