"""Restarts that would begin anew are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ogpsa.cli.config_file import ConfigFile
from megatron_ogpsa.cluster.restarts import require_resumable
from megatron_ogpsa.errors import UserError

RESUMABLE = {
    "in the file": ("save: runs/a\nload: runs/a\n", ""),
    "by a flag": ("save: runs/a\n", "--load runs/a"),
    "flags of both kinds win": ("save: runs/a\nload: runs/a\n", "--save=runs/b --load runs/b"),
    "finetune is off": ("save: runs/a\nload: runs/a\nfinetune: false\n", ""),
    "a pipeline": ("save: runs/a\nstages:\n  sft:\n    lr: 1.0\n", ""),
}

BEGINNING_ANEW = {
    "no checkpoints": ("lr: 1.0\n", "", "saves no checkpoints"),
    "no load": ("save: runs/a\n", "", "load is not given and save is runs/a"),
    "another folder": ("save: runs/a\nload: models/base\n", "", "load is models/base and save is runs/a"),
    "another save": ("save: runs/a\nload: runs/a\n", "--save runs/b", "load is runs/a and save is runs/b"),
    "finetune": ("save: runs/a\nload: runs/a\nfinetune: true\n", "", "finetune loads the weights alone"),
    "finetune, by a flag": ("save: runs/a\nload: runs/a\n", "--finetune", "finetune loads the weights alone"),
}


def read(tmp_path: Path, text: str) -> ConfigFile:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return ConfigFile.read(path)


@pytest.mark.parametrize("case", RESUMABLE)
def test_runs_that_go_on(tmp_path: Path, case: str) -> None:
    text, flags = RESUMABLE[case]
    require_resumable(read(tmp_path, text), flags.split(), 1)


@pytest.mark.parametrize("case", BEGINNING_ANEW)
def test_runs_that_would_begin_anew(tmp_path: Path, case: str) -> None:
    text, flags, expected = BEGINNING_ANEW[case]
    require_resumable(read(tmp_path, text), flags.split(), 0)
    with pytest.raises(UserError) as raised:
        require_resumable(read(tmp_path, text), flags.split(), 1)
    assert str(raised.value).startswith("--max-restarts 1: ")
    assert expected in str(raised.value)
    assert "pretrained-checkpoint" in str(raised.value)
