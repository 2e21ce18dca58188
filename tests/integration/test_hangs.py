"""One of four ranks freezes, computes for ever, dies or raises: the others end in time, and one line says who and where."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Outcome, Train
from tests.integration.test_dpo import dpo_flags

TIMEOUT = 3
LIMIT = TIMEOUT + 20
"""Seconds from the moment in which a rank freezes to the end of the last of the others."""

MODULE = "tests.integration.freezing"
SHORT = ("--ogpsa-hang-timeout", str(TIMEOUT))

LAST_SEEN = r"frozen or lost: it has not been heard of for \d+ s and was last seen at .* in .*"

CASES = {  # what a rank does: rank, step, phase, how; then how the line tells of it
    "refresh of rank 0, which holds the store": (
        "0|3|refresh|stop",
        r"holds the job's store at [^ ]+, is frozen or lost: .*",
    ),
    "save, after a step that took almost too long": ("1|3|save|sleep, stop", LAST_SEEN),
    "reference log-probabilities": ("3|1|reference log-probabilities|sleep, stop", LAST_SEEN),
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
            self._look()
        self._look()  # on a busy machine the command may have ended since

    def _look(self) -> None:
        for path in self._folder.glob("rank-*"):
            rank, pid = int(path.name.partition("-")[2]), path.read_text(encoding="utf-8")
            if pid and rank not in self._ended and not _is_running(int(pid)):
                self._ended[rank] = time.time()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter: reaped between opening and reading
        return False


def others(rank: int) -> list[int]:
    return [other for other in range(4) if other != rank]


def assert_told(outcome: Outcome, freeze: str, expected: str) -> None:
    """One line: a rank that waits, its step, its collective, and the rank that it waits for."""
    rank, step, phase, _ = freeze.split("|")
    assert outcome.exit_code == 3, outcome.output[-4000:]
    assert len(outcome.error_lines) == 1, outcome.output[-4000:]
    during = "" if phase == "step" else rf"(?: \({phase}\))?"  # a rank may wait where it is to come next
    waits = rf"rank \d \(host \S+, pid \d+\) has waited for \d+ s at step {step}{during} in (?:\w+|\S+\.wait\(\)) "
    line = outcome.error_lines[0].removeprefix("megatron-ogpsa: error: ")
    assert re.fullmatch(rf"{waits}\(\S+\.py:\d+\): rank {rank}\b.*{expected}", line), line
    assert "Traceback" not in outcome.output, outcome.output[-4000:]


@pytest.mark.parametrize("case", CASES)
def test_the_others_end_and_say_who_is_behind(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    freeze, expected = CASES[case]
    monkeypatch.setenv("FREEZE", freeze)
    flags = dpo_flags(tmp_path, "tp2-pp2", "run") if "log-prob" in freeze else []
    with Ends(tmp_path) as ends:
        outcome = train(*flags, *SHORT, module=MODULE)
    assert_told(outcome, freeze, expected)
    assert ends.seconds(*others(int(freeze[0]))) < LIMIT


def test_under_torchrun_s_agent_a_frozen_rank_0_is_seen_last_where_it_was(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step. The agent holds the store; it asks the frozen rank to end, which the launcher lets it see."""
    monkeypatch.setenv("FREEZE", "0|3|step|stop")
    with Ends(tmp_path) as ends:
        outcome = train(*SHORT, module=MODULE, agent=True)
    assert_told(outcome, "0|3|step|stop", LAST_SEEN)
    assert ends.seconds(*range(4)) < LIMIT


def test_a_rank_that_raises_ends_the_run_with_its_message(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, under torchrun's agent. No timeout: that is nine minutes here."""
    monkeypatch.setenv("FREEZE", "1|3|step|raise")
    with Ends(tmp_path) as ends:
        outcome = train("--nproc-per-node", "2", "--pipeline-model-parallel-size", "1", module=MODULE, agent=True)
    assert outcome.exit_code == 1, outcome.output[-4000:]
    assert outcome.output.count("Traceback") == 1, outcome.output[-4000:]
    lines = outcome.output.splitlines()
    assert lines[-1] == "megatron-ogpsa: rank 1 ended with exit code 1: MemoryError: not enough room for rank 1"
    assert ends.seconds(0, 1) < 10
