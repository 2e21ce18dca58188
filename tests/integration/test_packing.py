"""Packed conversations do not see each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.layouts import LAYOUTS
from tests.harness import WorkerGroup


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_document_has_the_same_logits_in_a_pack_and_alone(
    distributed: Callable[[int], WorkerGroup], layout: str
) -> None:
    """Up to fp32 rounding of logits of size 1: rotary angles are those of another position, sums have more zeros."""
    for difference in distributed(LAYOUTS[layout].world_size).run(
        "tests.integration.cases:packed_logits", layout=layout
    ):
        assert difference < 1e-5
