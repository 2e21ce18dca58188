"""A stopped process ends when it has been asked to, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ogpsa.cluster.thawing import LOOK_SECONDS, stopped_processes_end


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[bytes]]:
    """A child that is stopped."""
    with subprocess.Popen(["sleep", "600"]) as process:
        process.send_signal(signal.SIGSTOP)
        yield process
        process.kill()


def test_a_stopped_child_that_was_asked_to_end_ends(stopped: subprocess.Popen[bytes]) -> None:
    with stopped_processes_end():
        stopped.terminate()
        assert stopped.wait(timeout=30) == -signal.SIGTERM


def test_a_stopped_child_that_was_not_asked_stays_stopped(stopped: subprocess.Popen[bytes]) -> None:
    with stopped_processes_end():
        time.sleep(3 * LOOK_SECONDS)
        state = Path(f"/proc/{stopped.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    assert state == "T"


def test_so_does_a_child_s_child() -> None:
    """The process of a stage, which a rank of a job has started."""
    script = "sleep 600 & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        os.kill(grandchild, signal.SIGSTOP)
        with stopped_processes_end():
            os.kill(grandchild, signal.SIGTERM)
            assert parent.wait(timeout=30) == 0
