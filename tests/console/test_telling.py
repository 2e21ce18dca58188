"""An error that several ranks have is read once, whichever of them is ended before it has written."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatron_ogpsa.console import telling
from megatron_ogpsa.console.telling import ERRORS_VARIABLE, tell_once


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was written, by ranks that share a folder."""
    monkeypatch.setenv(ERRORS_VARIABLE, str(tmp_path))
    return []


def tell_by_many_ranks(told: list[str]) -> None:
    def write(message: str) -> None:
        time.sleep(0.2)  # the others look meanwhile
        told.append(message)

    ranks = [threading.Thread(target=tell_once, args=("no such file",), kwargs={"write": write}) for _ in range(8)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def test_one_of_many_ranks_writes(told: list[str]) -> None:
    tell_by_many_ranks(told)
    assert told == ["no such file"]


def test_others_go_on_when_it_is_written_and_not_before(told: list[str]) -> None:
    """The first to end may end its launcher, and that all others."""
    in_write, may_write = threading.Event(), threading.Event()

    def write_slowly(message: str) -> None:
        in_write.set()
        may_write.wait()
        told.append(message)

    first = threading.Thread(target=tell_once, args=("no such file",), kwargs={"write": write_slowly})
    second = threading.Thread(target=tell_once, args=("no such file",), kwargs={"write": told.append})
    first.start()
    in_write.wait()
    second.start()
    second.join(0.2)
    assert second.is_alive()
    may_write.set()
    first.join()
    second.join()
    assert told == ["no such file"]


def test_what_an_ended_rank_was_to_write_another_writes(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(message: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(telling, "TELLING_SECONDS", 1.0)
    with pytest.raises(KeyboardInterrupt):
        tell_once("no such file", write=ended)
    tell_by_many_ranks(told)
    assert told == ["no such file"]


def test_where_nothing_can_be_noted_it_is_told_all_the_same(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERRORS_VARIABLE, "/nowhere")
    tell_once("no such file", write=told.append)
    assert told == ["no such file"]


def test_ranks_that_are_started_again_tell_it_again(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        tell_once("no such file", write=told.append)
    assert told == ["no such file"] * 2
