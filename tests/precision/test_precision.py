"""``docs/memory.md`` is what its data say, and small tensors measured again say the same."""

from __future__ import annotations

import json
from pathlib import Path

from tests.precision.measuring import STORAGES, all_measurements
from tests.precision.report import as_markdown

DOCS = Path(__file__).parents[2] / "docs"
RESULT = json.loads((DOCS / "basis_precision.json").read_text(encoding="utf-8"))


def test_the_page_is_made_of_the_data() -> None:
    assert (DOCS / "memory.md").read_text(encoding="utf-8") == as_markdown(RESULT)


def test_storages_rank_as_the_page_says() -> None:
    """On 81,984 elements. bf16 rounds to 2^-9 and gradients here are mostly removed; fp16 has three binary digits more."""
    error, leak, references_error = (dict.fromkeys(STORAGES, 0.0) for _ in range(3))
    for m in all_measurements((64, 16_384, 65_536), [(2, 1.0), (4, 1e-3)]):
        name = m["storage"]
        error[name], leak[name] = max(error[name], m["error"]), max(leak[name], m["span_leak"])
        if m["separation"] == 1e-3:
            references_error[name] = max(references_error[name], m["error"])
    assert error["fp32"] < 1e-6
    assert leak["fp32"] < 1e-6
    assert 2**-9 < error["bf16"] < 8 * 2**-9
    assert 1e-4 < leak["bf16"] < 8 * 2**-9
    assert error["fp16, scaled"] < error["bf16"] / 4
    assert leak["bf16, corrected"] < leak["bf16"] / 3
    assert references_error["bf16 references"] > 0.5
