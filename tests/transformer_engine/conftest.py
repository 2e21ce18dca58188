"""Worker groups and commands of processes that have Transformer Engine, emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness import WorkerGroup
from tests.harness.preloaded import PreloadedCommand
from tests.transformer_engine.wheel import python_of_wheel


@pytest.fixture(scope="session")
def on_hopper() -> Iterator[PreloadedCommand]:
    """The command with everything imported, Transformer Engine too, on what it takes for a Hopper GPU."""
    try:
        python_of_wheel()
    except OSError as error:
        pytest.skip(str(error))
    command = PreloadedCommand(prepare="tests.transformer_engine.importing:install")
    yield command
    command.close()


@pytest.fixture(scope="session")
def distributed_te(on_hopper: PreloadedCommand) -> Iterator[Callable[[int], WorkerGroup]]:
    """``distributed_te(world_size)``: like ``distributed``."""
    groups: dict[int, WorkerGroup] = {}
    yield lambda world_size: groups.setdefault(world_size, WorkerGroup(world_size, on_hopper))
    for group in groups.values():
        group.close()
