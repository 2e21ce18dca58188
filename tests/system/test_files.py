"""Files of which it cannot be told whether they are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import plan_stages
from megatron_ogpsa.pipeline.progress import state_of
from megatron_ogpsa.system.files import is_there, read_sealed_json

UNKNOWN = "x" * 300
"""Longer than a name may be: ``Path.exists`` raises, as where a folder above may not be searched, which root always may."""


def test_what_cannot_be_told_is_told_in_a_line(tmp_path: Path) -> None:
    assert is_there(tmp_path)
    assert not is_there(tmp_path / "a")
    told = r"^\S+ cannot be read \(File name too long\): "
    with pytest.raises(UserError, match=told):
        is_there(tmp_path / UNKNOWN)
    with pytest.raises(UserError, match=told):
        read_sealed_json(tmp_path / UNKNOWN, remedy="name another")


@pytest.mark.parametrize("text", [f"base: {UNKNOWN}/b.yaml\n", f"model: {UNKNOWN}\n"])
def test_so_are_files_that_a_configuration_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        ConfigFile.read(tmp_path / "run.yaml")


def test_so_is_the_folder_of_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"save: {tmp_path / UNKNOWN}\nstages:\n  sft:\n    ogpsa-stage: sft\n", encoding="utf-8"
    )
    (stage,) = plan_stages(ConfigFile.read(tmp_path / "run.yaml"), [])
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        state_of(stage)
