"""The code of the pages in ``docs/adoption``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/adoption"


def blocks(page: str, language: str) -> list[str]:
    """All blocks of a language, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), flags=re.DOTALL)
