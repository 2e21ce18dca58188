"""Ranks of a job whose store rank 0 holds: they leave together, unless the job has failed. Stages' processes are not real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.preloaded import PreloadedCommand

SLOW = """#!/bin/sh
trap : TERM
: > running-$RANK
sleep 0.5; sleep 0.5; sleep 1; sleep 0.5; exit 0
"""

CASES: dict[str, dict[str, Any]] = {
    "all is done": {"finds": "finished", "late": 1.0, "codes": [0, 0]},
    "a user's mistake": {"finds": "a_mistake", "late": 1.0, "codes": [2, 2]},
    "a stage fails": {"finds": "new", "late": 0.0, "codes": [1, 1]},
    "a stage fails on rank 0 while the other hangs": {"finds": "new", "late": 0.0, "hangs": True, "codes": [1, -9]},
    "a signal that comes too late": {
        "finds": "finished_once_begun",
        "late": 0.0,
        "process": "./slow",
        "stages": 2,
        "signal": True,
        "codes": [0, 0],
        "says": "stage dpo (out/dpo) is not started, because a signal has come",
    },
    "rank 0 raises": {"finds": "a_bug", "late": 600.0, "hangs": True, "codes": [1, -9]},
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_leave_together(preloaded: PreloadedCommand, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    (tmp_path / "slow").write_text(SLOW, encoding="utf-8")
    (tmp_path / "slow").chmod(0o755)
    finished = preloaded.run("tests.pipeline.ranks", [json.dumps(case)], folder=tmp_path, timeout=60)
    codes = [
        line.partition(": ")[2] for line in finished.output.splitlines() if line.startswith("rank ") and ": " in line
    ]
    assert codes == [str(code) for code in case["codes"]], finished.output
    assert case.get("says", "") in finished.output
    assert "stage dpo (out/dpo) begins" not in finished.output
