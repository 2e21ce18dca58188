"""Jobs for ranks whose shards are small, with the loops that are compiled for large ones."""

from __future__ import annotations

from typing import Any

from megatron_ogpsa.projection import passes
from tests.core.update_cases import update_parity


def compiled_update(layout: str) -> dict[str, Any]:
    """:func:`update_parity` of Adam, per tensor."""
    usual, passes.COMPILED_FROM = passes.COMPILED_FROM, 0
    try:
        settings = [{"optimizer": "adam", "granularity": "tensor", "mode": "orthogonal"}]
        (result,) = update_parity(layout=layout, settings=settings)
        return result | {"compiled": len(passes._known) > 0}
    finally:
        passes.COMPILED_FROM = usual
