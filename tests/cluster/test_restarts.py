"""Restarts that would begin anew are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ogpsa.cluster.restarts import require_resumable, require_resumable_ranks
from megatron_ogpsa.cluster.settings import LaunchSettings
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError

RESUMABLE = {
    "in the file": ("save: runs/a\nload: runs/a\n", ""),
    "by a flag": ("save: runs/a\n", "--load runs/a"),
    "flags of both kinds win": ("save: runs/a\nload: runs/a\n", "--save=runs/b --load runs/b"),
    "the same folder, written otherwise": ("save: runs/a\n", "--load ./runs/a/"),
    "the same folder, absolute": ("save: runs/a\n", f"--load {Path('runs/a').absolute()}"),
    "finetune is off": ("save: runs/a\nload: runs/a\nfinetune: false\n", ""),
    "a pipeline": ("save: runs/a\nstages:\n  sft:\n    lr: 1.0\n", ""),
}

BEGINNING_ANEW = {
    "no checkpoints": ("lr: 1.0\n", "", "saves no checkpoints"),
    "no load": ("save: runs/a\n", "", "load is not given and save is runs/a"),
    "another folder": ("save: runs/a\nload: models/base\n", "", "load is models/base and save is runs/a"),
    "another save": ("save: runs/a\nload: runs/a\n", "--save runs/b", "load is runs/a and save is runs/b"),
    "finetune": ("save: runs/a\nload: runs/a\nfinetune: true\n", "", "finetune loads the weights alone"),
    "a step": ("save: runs/a\nload: runs/a\n", "--ckpt-step 3", "go back to step 3 each time"),
    "finetune, by a flag": ("save: runs/a\nload: runs/a\n", "--finetune", "finetune loads the weights alone"),
}


def read(tmp_path: Path, text: str) -> ConfigFile:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return ConfigFile.read(path)


@pytest.mark.parametrize("case", RESUMABLE)
def test_runs_that_go_on(tmp_path: Path, case: str) -> None:
    text, flags = RESUMABLE[case]
    require_resumable(read(tmp_path, text), flags.split(), LaunchSettings(max_restarts=1))


@pytest.mark.parametrize("case", BEGINNING_ANEW)
def test_runs_that_would_begin_anew(tmp_path: Path, case: str) -> None:
    text, flags, expected = BEGINNING_ANEW[case]
    require_resumable(read(tmp_path, text), flags.split(), LaunchSettings())
    require_resumable_ranks(read(tmp_path, text), flags.split())
    with pytest.raises(UserError) as raised:
        require_resumable(read(tmp_path, text), flags.split(), LaunchSettings(max_restarts=1))
    assert str(raised.value).startswith("--max-restarts 1: ")
    assert expected in str(raised.value)
    assert "pretrained-checkpoint" in str(raised.value) or "leave it out" in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "why"),
    [("TORCHELASTIC_MAX_RESTARTS", "--max-restarts 2"), ("SLURM_RESTART_COUNT", "SLURM has started this job again")],
)
def test_ranks_that_others_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, why: str
) -> None:
    monkeypatch.setenv(variable, "2")
    require_resumable_ranks(read(tmp_path, RESUMABLE["in the file"][0]), [])
    with pytest.raises(UserError, match=f"^{re.escape(why)}.*: ranks that are started again would begin anew"):
        require_resumable_ranks(read(tmp_path, BEGINNING_ANEW["no load"][0]), [])


def test_nodes_that_come_and_go_are_restarts_that_nobody_counts(tmp_path: Path) -> None:
    config = read(tmp_path, BEGINNING_ANEW["no load"][0])
    with pytest.raises(UserError, match=r"^--nnodes 2:4: ranks that are started again would begin anew"):
        require_resumable(config, [], LaunchSettings(min_nodes=2, max_nodes=4))
