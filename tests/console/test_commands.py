"""Commands that run one after the other, and how one of them ends with this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.console.commands import Command, CommandFailed, run_commands


def test_a_failed_step_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('the cause'); sys.exit(3)"
    step = Command("a step", [sys.executable, "-c", code], tmp_path / "a.log", seconds=1.0)
    with pytest.raises(CommandFailed, match="'a step' failed"):
        run_commands([step])
    assert "the cause" in capsys.readouterr().err


def test_told_to_end_it_ends_the_step_first(tmp_path: Path) -> None:
    """The step tells it to, and would outlive it by far."""
    code = "import os, signal, time; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run_commands([Command("a step", [sys.executable, "-c", code], tmp_path / "a.log", seconds=1.0)])
    assert ended.value.code == 128 + signal.SIGTERM
    left = int((tmp_path / "a.log").read_text(encoding="utf-8"))
    with pytest.raises(ProcessLookupError):  # as a signal it ends one that was left behind after all
        os.kill(left, signal.SIGKILL)
    assert signal.getsignal(signal.SIGTERM) is before


def test_told_to_end_while_a_step_is_being_started_it_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, list[subprocess.Popen[bytes]]()

    def start_when_told(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        started.append(start(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start_when_told)
    with pytest.raises(SystemExit) as ended:
        run_commands([Command("a step", ["sleep", "600"], tmp_path / "a.log", seconds=1.0)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert started[0].poll() == -signal.SIGTERM
