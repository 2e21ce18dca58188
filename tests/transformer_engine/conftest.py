"""Worker groups and commands of processes that have Transformer Engine, emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import WorkerGroup
from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import Train, train_with
from tests.integration.conftest import inputs as inputs
from tests.transformer_engine.wheel import python_of_wheel


def _command(prepare: str) -> Iterator[PreloadedCommand]:
    try:
        python_of_wheel()
    except OSError as error:
        pytest.skip(str(error))
    command = PreloadedCommand(prepare=f"tests.transformer_engine.importing:{prepare}")
    yield command
    command.close()


@pytest.fixture(scope="session")
def on_hopper() -> Iterator[PreloadedCommand]:
    """The command with everything imported, Transformer Engine too, on what it takes for a Hopper GPU."""
    yield from _command("be_hopper")


@pytest.fixture(scope="session")
def on_blackwell() -> Iterator[PreloadedCommand]:
    """The same on what it takes for a Blackwell GPU, which has MXFP8."""
    yield from _command("be_blackwell")


@pytest.fixture(scope="session")
def distributed_te(on_hopper: PreloadedCommand) -> Iterator[Callable[[int], WorkerGroup]]:
    """``distributed_te(world_size)``: like ``distributed``."""
    groups: dict[int, WorkerGroup] = {}
    yield lambda world_size: groups.setdefault(world_size, WorkerGroup(world_size, on_hopper))
    for group in groups.values():
        group.close()


@pytest.fixture
def train_te(inputs: Path, tmp_path: Path, on_hopper: PreloadedCommand) -> Train:
    """``train`` of ``tests/integration`` in processes that have Transformer Engine."""
    return train_with(on_hopper, inputs, tmp_path)


@pytest.fixture
def train_te_blackwell(inputs: Path, tmp_path: Path, on_blackwell: PreloadedCommand) -> Train:
    """The same, for recipes that Hopper does not have."""
    return train_with(on_blackwell, inputs, tmp_path)
