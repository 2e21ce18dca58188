"""``--help`` of ``train``: its own, or all flags where a configuration is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_ogpsa.cli import main as entry

ALL_FLAGS = (
    "train a.yaml --help",
    "train a.yaml --lr 1 -h",
    "train --nnodes 1 a.yaml --help",  # launch/train.sh a.yaml --help
    "train --nnodes=1 --stage sft a.yaml --help",
)
OWN = ("train --help", "train --nnodes 1 --help", "train --nnodes --help", "evaluate a.yaml --help", "train -h")


@pytest.mark.parametrize("line", [*ALL_FLAGS, *OWN])
def test_what_is_listed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(entry, "_show_flags", lambda: print("all flags") or 0)
    if line in ALL_FLAGS:
        assert entry.main(line.split()) == 0
        assert capsys.readouterr().out == "all flags\n"
    else:
        with pytest.raises(SystemExit) as ended:
            entry.main(line.split())
        assert ended.value.code == 0
        assert f"megatron-ogpsa {line.split()[0]}" in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    """``megatron-ogpsa doctor | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-W", "ignore", "-m", "megatron_ogpsa.cli.main", "--version"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
