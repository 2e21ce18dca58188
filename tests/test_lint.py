"""The house's own checks, run with the versions that are installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_tools_find_nothing(command: str) -> None:
    tool, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_way_to_run_code_from_data() -> None:
    """No pickle, no unsafe torch.load, no trust_remote_code switched on, in the package itself."""
    forbidden = re.compile(r"\bimport pickle\b|weights_only\s*=\s*False|trust_remote_code\s*=\s*True")
    for path in (ROOT / "megatron_ogpsa").rglob("*.py"):
        assert not forbidden.search(path.read_text(encoding="utf-8")), path
