"""Fixtures and rules for all tests: worker groups for distributed tests, and tests that need a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness import WorkerGroup
    from tests.harness.preloaded import PreloadedCommand

# Before anything imports transformers or datasets: tests never go to the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def distributed(preloaded: PreloadedCommand) -> Iterator[Callable[[int], WorkerGroup]]:
    """``distributed(world_size)``: the session's worker group of that size, started when it gets its first job."""
    from tests.harness import WorkerGroup  # imports torch, which tests of the scripts do without

    groups: dict[int, WorkerGroup] = {}

    def group_of(world_size: int) -> WorkerGroup:
        return groups.setdefault(world_size, WorkerGroup(world_size, preloaded))

    yield group_of
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def preloaded() -> Iterator[PreloadedCommand]:
    """The command with everything imported."""
    from tests.harness.preloaded import PreloadedCommand

    command = PreloadedCommand()
    yield command
    command.close()


@pytest.fixture(autouse=True)
def _docstrings_are_read_once() -> None:
    if "megatron.training.argument_utils" in sys.modules:  # most tests do without
        from tests.harness.docstrings import keep_docstrings

        keep_docstrings()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no GPU, with the reason."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide GPUs from what tests without the mark start: their layouts, tolerances and times are of CPU ranks.

    pytest's own process has seen its GPUs by then, and keeps them for the tests that are marked.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if item.get_closest_marker("gpu") is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return (yield)
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
