"""Kill -9 of all ranks at random points: whatever was lost is made again, bitwise. ``python -m tests.survival`` does more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.integration.conftest import Train
from tests.survival.kills import KILLED, MODULE, STAGES, killed, undisturbed, write_pairs


@pytest.mark.parametrize(("stage", "seed"), [("sft", 1), ("dpo", 2)])
def test_killed_runs_end_as_if_undisturbed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, seed: int
) -> None:
    """Three kills in all."""

    def start(folder: Path, flags: tuple[str, ...], kill: str) -> tuple[int, str]:
        monkeypatch.setenv("KILL", kill)
        outcome = train(*flags, folder=folder, module=MODULE)
        return outcome.exit_code, outcome.output

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name)
    expected = undisturbed(start, STAGES[stage], tmp_path / "whole")
    attempts = killed(
        start,
        STAGES[stage],
        tmp_path / "killed",
        tmp_path / "whole",
        expected,
        random.Random(seed),
        num_kills=2 if stage == "sft" else 1,
    )
    print(f"seed {seed}: {attempts}")
    assert any(attempt.exit_code == KILLED for attempt in attempts)
