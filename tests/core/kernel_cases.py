"""Jobs for ranks whose shards are small, with the loops that are compiled for large ones."""

from __future__ import annotations

from typing import Any

from megatron_ogpsa.projection import passes
from megatron_ogpsa.projection.segments import SegmentLayout
from tests.core.update_cases import update_parity


def compiled_update(layout: str) -> dict[str, Any]:
    """:func:`update_parity` of Adam, per tensor; ``compiled``: for how many shards loops were made."""
    made: list[str] = []
    usual, make = passes.COMPILED_FROM, passes._made

    def making(shard: SegmentLayout, device: str) -> passes.Kernels:
        made.append(device)
        return make(shard, device)

    passes.COMPILED_FROM, passes._made = 0, making
    try:
        settings = [{"optimizer": "adam", "granularity": "tensor", "mode": "orthogonal"}]
        (result,) = update_parity(layout=layout, settings=settings)
        return result | {"compiled": len(made)}
    finally:
        passes.COMPILED_FROM, passes._made = usual, make
