"""The files that we keep between runs, torn in each way: named, with exit code 2, and never taken for whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.cli import main
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import Stage
from megatron_ogpsa.pipeline.progress import RECORD_FILE, TRACKER_FILE, begin, finish, state_of
from megatron_ogpsa.reference_policy.store import LogProbs, read_log_probs, write_log_probs
from tests.checkpoints.damage import DAMAGES
from tests.pipeline.test_plan import stages_of

TORN = [damage for damage in DAMAGES if damage != "deleted"]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A finished one."""
    monkeypatch.chdir(tmp_path)
    stage = stages_of(tmp_path)[0]
    begin(stage)
    (stage.folder / TRACKER_FILE).write_text("6", encoding="utf-8")
    finish(stage)
    return stage


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_record_of_a_stage_ends_the_command(
    stage: Stage, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    DAMAGES[damage](stage.folder / RECORD_FILE)
    assert main.main(["train", "pipeline.yaml"]) == UserError.exit_code
    lines = capsys.readouterr().err.splitlines()
    named = "out/sft holds checkpoints that this pipeline" if damage == "deleted" else f"out/sft/{RECORD_FILE} "
    assert [line for line in lines if line.startswith(f"megatron-ogpsa: error: {named}")] == lines[-1:]


def every_bit(content: bytes) -> list[bytes]:
    """Versions with one bit flipped, another one in each byte."""
    flipped = (content[:i] + bytes([byte ^ 1 << i % 8]) + content[i + 1 :] for i, byte in enumerate(content))
    return list(flipped)


def test_a_flipped_bit_in_any_byte_of_a_record_is_noticed(stage: Stage) -> None:
    path = stage.folder / RECORD_FILE
    for version in every_bit(path.read_bytes()):
        path.write_bytes(version)
        with pytest.raises(UserError, match=RECORD_FILE):
            state_of(stage)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "log_probs.safetensors"
    values = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unknown = LogProbs.unknown(12, weights="ab" * 16, data=("first",), settings={})
    write_log_probs(path, unknown.with_round(values, torch.ones(12, dtype=torch.bool)))
    return path


@pytest.mark.parametrize("damage", TORN)
def test_torn_reference_log_probabilities_are_named(store: Path, damage: str) -> None:
    DAMAGES[damage](store)
    with pytest.raises(UserError, match=rf"{store.name} is damaged: delete it \(a new run computes it again\)"):
        read_log_probs(store)


def test_a_flipped_bit_in_any_byte_of_reference_log_probabilities_is_noticed(store: Path) -> None:
    for version in every_bit(store.read_bytes()):
        store.write_bytes(version)
        with pytest.raises(UserError, match="is damaged"):
            read_log_probs(store)


def test_deleted_reference_log_probabilities_are_unknown_again(store: Path) -> None:
    """None is what makes a run compute them."""
    read: Callable[[Path], LogProbs | None] = read_log_probs
    assert read(store) is not None
    DAMAGES["deleted"](store)
    assert read(store) is None
