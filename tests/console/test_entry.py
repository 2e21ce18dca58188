"""How the command ends where neither it nor its flags are to blame."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_ogpsa.cli import main as entry

COMMAND = [sys.executable, "-W", "ignore", "-m", "megatron_ogpsa.cli.main", "--version"]


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    """``megatron-ogpsa doctor | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(COMMAND, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_below_the_output_is_told() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "megatron-ogpsa: error: the output cannot be written (No space left on device): make room, or send it elsewhere\n"
    )


def test_ctrl_c_is_no_traceback() -> None:
    """And still the signal's end, at which a shell ends a loop over such commands."""
    interrupted = (
        "import sys; from megatron_ogpsa.cli import main as entry\n"
        "def run(argv): raise KeyboardInterrupt\n"
        "entry._run = run; sys.exit(entry.main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", interrupted], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "\nmegatron-ogpsa: interrupted\n")


def test_without_a_folder_for_temporary_files_its_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    assert entry.main(["doctor"]) == 2
    assert "no folder for temporary files can be written to: set TMPDIR" in capsys.readouterr().err
