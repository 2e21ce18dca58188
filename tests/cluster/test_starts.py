"""Plain torchrun on several nodes with restarts is refused where its agents share one store."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_ogpsa.cli import train
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.processes import require_common_count

REFUSED = {
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
MESSAGE = r"--max-restarts 3.* 2 nodes.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exported.*launch/train_nodes\.sh"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REFUSED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("refused")
def test_ranks_that_would_count_differently_are_refused() -> None:
    with pytest.raises(UserError, match=MESSAGE):
        require_common_count()


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),  # each start has a store of its own
        ("TORCHELASTIC_USE_AGENT_STORE", None),  # another launcher
        ("GROUP_WORLD_SIZE", "1"),
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
    ],
)
def test_others_are_not(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    require_common_count()


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("text", ["lr: 1.0e-5\n", "save: out\nstages:\n  sft:\n    lr: 1.0e-5\n"])
def test_the_command_looks_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """A single run, and the ranks of a pipeline's job."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = tmp_path / "run.yaml"
    config.write_text(text, encoding="utf-8")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    monkeypatch.setattr(train, "_run_as_rank", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError, match=MESSAGE):
        train.run(parser.parse_args([str(config)]))
