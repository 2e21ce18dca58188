"""Commands that run one after the other, and how one of them ends with this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


@pytest.mark.parametrize(("on_cpu", "seen"), [(True, "''"), (False, "'0'")])
def test_gpus_are_hidden_from_what_is_written_for_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, seen: str
) -> None:
    """On a workstation with one, two ranks of the demo would meet on it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    run_commands([Command("a step", [sys.executable, "-c", code], tmp_path / "a.log", seconds=1.0)], on_cpu=on_cpu)
    assert (tmp_path / "a.log").read_text() == f"{seen}\n"


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


def test_a_step_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """Where nothing is left to end it, as by SIGKILL of who is short of memory."""
    log = tmp_path / "a.log"
    step = f"Command('a step', ['sh', '-c', 'echo $$; exec sleep 600'], Path({str(log)!r}), seconds=1.0)"
    module = "megatron_ogpsa.console.commands"
    code = f"from pathlib import Path; from {module} import Command, run_commands; run_commands([{step}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as command:
        wait_until(lambda: log.exists() and log.read_text(encoding="utf-8").endswith("\n"))
        command.kill()
    left = int(log.read_text(encoding="utf-8"))
    try:
        wait_until(lambda: not is_running(left))
    finally:
        if is_running(left):
            os.kill(left, signal.SIGKILL)


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
