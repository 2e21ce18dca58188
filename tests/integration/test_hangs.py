"""One of four ranks freezes, computes for ever, dies or raises: the others end in time, and one line says who and where."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Outcome, Train

TIMEOUT = 3
LIMIT = TIMEOUT + 10
"""Seconds from the moment in which a rank freezes to the end of the last of the others."""

MODULE = "tests.integration.freezing"
SHORT = ("--ogpsa-hang-timeout", str(TIMEOUT), "--ogpsa-reference-samples", "8")

FROZEN = {  # what freezes: rank, step, phase; then how the line tells where it was seen last
    "step": ("2|3|step|stop", r"frozen or lost: it has not been heard of for \d+ s and was last seen at step 3 in .*"),
    "refresh": ("3|3|refresh|stop", r"frozen or lost: .* last seen at step 3 \(refresh\) in .*"),
    "save": ("1|3|save|stop", r"frozen or lost: .* last seen at step 3 \(save\) in .*"),
    "rank 0, which holds the store": ("0|3|refresh|stop", r"holds the job's store at [^ ]+, is frozen or lost: .*"),
    "computes for ever": ("1|3|step|loop", r"is alive and computes at step 3 in .*freezing\.py:\d+, for \d+ s\..*"),
}


class Ends:
    """When the processes of the ranks ended, seen from outside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Ends:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def seconds(self, *ranks: int) -> float:
        """From the moment in which a rank misbehaved to the end of the last of ``ranks``."""
        frozen_at = float((self._folder / "frozen").read_text(encoding="utf-8"))
        return max(self._ended[rank] for rank in ranks) - frozen_at

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for path in self._folder.glob("rank-*"):
                rank, pid = int(path.name.partition("-")[2]), path.read_text(encoding="utf-8")
                if pid and rank not in self._ended and not _is_running(int(pid)):
                    self._ended[rank] = time.time()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def others(rank: int) -> list[int]:
    return [other for other in range(4) if other != rank]


def assert_told(outcome: Outcome, rank: int, expected: str) -> None:
    """One line: a rank that waits, its step, its collective, and the rank that it waits for."""
    assert outcome.exit_code == 3, outcome.output[-4000:]
    assert len(outcome.error_lines) == 1, outcome.output[-4000:]
    waits = r"rank \d \(host \S+, pid \d+\) has waited for \d+ s at step 3(?: \([a-z -]+\))? in (?:\w+|\S+\.wait\(\)) "
    line = outcome.error_lines[0].removeprefix("megatron-ogpsa: error: ")
    pattern = rf"{waits}\(\S+\.py:\d+\): rank {rank}\b.*{expected}"
    assert re.fullmatch(pattern, line), line
    assert "Traceback" not in outcome.output, outcome.output[-4000:]


@pytest.mark.parametrize("case", FROZEN)
def test_the_others_end_and_say_who_is_frozen(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    freeze, expected = FROZEN[case]
    monkeypatch.setenv("FREEZE", freeze)
    rank = int(freeze[0])
    with Ends(tmp_path) as ends:
        outcome = train(*SHORT, module=MODULE)
    assert_told(outcome, rank, expected)
    assert ends.seconds(*others(rank)) < LIMIT
