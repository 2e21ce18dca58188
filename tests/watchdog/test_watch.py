"""A rank whose collective fails because the run has been ended says nothing, also where nobody can be asked any more."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_ogpsa.console.telling import ERRORS_VARIABLE
from megatron_ogpsa.errors import TransientError, UserError
from megatron_ogpsa.integration.ranks.agreement import of_this_rank
from megatron_ogpsa.watchdog import HANG_EXIT_CODE, Watch, watch
from megatron_ogpsa.watchdog.board import Address, Ending
from megatron_ogpsa.watchdog.link import StoreSilent

ANNOUNCED = Ending(message="rank 1 is frozen", host="a", rank=0, exit_code=HANG_EXIT_CODE, is_failure=False)


class Exited(BaseException):
    """In place of the process's end."""


class LinkToAStoreThatHasEnded:
    """What a rank has that was told of the end, or was not, before rank 0 took the store away."""

    address = Address("localhost", 1, "rank 0")

    def __init__(self, ending: Ending | None) -> None:
        self.ending = ending

    def ask(self, question: Callable[[Any], Any]) -> NoReturn:
        raise StoreSilent("has ended")

    tell_now = ask

    def close(self, seconds: float) -> None:
        pass


class LinkToABoard(LinkToAStoreThatHasEnded):
    """A board on which another rank looks already, and announces what it finds after so many tellings of this one."""

    def __init__(self, after: float) -> None:
        super().__init__(None)
        self.looks = 0
        self.announced: list[Ending] = []
        self.counts: list[str] = []
        self.informed = iter(range(4))  # one more each time that it is asked
        self._after = after

    def ask(self, question: Callable[[Any], Any]) -> Any:
        return question(self)

    def count(self, key: str) -> int:
        self.counts.append(key)
        return 2 if key == "consequences" else 1

    def counted(self, key: str) -> int:
        return next(self.informed)

    def records(self) -> dict[int, Any]:
        self.looks += 1
        return {}

    def announce(self, ending: Ending) -> Ending:
        self.announced.append(ending)
        return ending

    def tell_now(self, record: Any) -> None:  # type: ignore[override]
        self._after -= 1
        self.ending = ANNOUNCED if self._after <= 0 else None


def lost_connection() -> Future[NoReturn]:
    """Its ``result`` raises, and no frame of it is this project's, as where a collective fails."""
    lost: Future[NoReturn] = Future()
    lost.set_exception(RuntimeError("Connection closed by peer"))
    return lost


def run_watched(
    monkeypatch: pytest.MonkeyPatch, link: Ending | LinkToABoard | None, fail: Callable[[Watch], object]
) -> None:
    def leave(self: Watch, code: int) -> NoReturn:
        raise Exited(code)

    monkeypatch.setattr(distributed_c10d, "_get_default_group", lost_connection().result)
    monkeypatch.setattr(Watch, "_exit", leave)
    monkeypatch.setattr(watch, "QUIET_SECONDS", 0.0)
    with Watch(rank=2, num_ranks=4, timeout=60.0, is_ready=lambda: False) as watching:
        watching._link = link if isinstance(link, LinkToABoard) else LinkToAStoreThatHasEnded(link)  # type: ignore[assignment]
        fail(watching)


def test_a_rank_that_knows_of_the_end_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its collective fails as rank 0 ends, which does so as soon as all ranks have been told, with the store."""
    with pytest.raises(Exited, match=str(HANG_EXIT_CODE)):
        run_watched(monkeypatch, ANNOUNCED, lambda _: dist.barrier())


def test_a_rank_that_knows_of_none_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="Connection closed"):
        run_watched(monkeypatch, None, lambda _: dist.barrier())


@pytest.mark.parametrize(("after", "looks"), [(2, 0), (float("inf"), 2)])
def test_one_rank_looks_for_who_is_lost_and_the_others_wait_for_its_word(
    monkeypatch: pytest.MonkeyPatch, after: float, looks: int
) -> None:
    """But not for ever: it may be lost itself. A thousand ranks would read a million records twice."""
    for name, seconds in (("LOOK_SECONDS", 0.05), ("TICK_SECONDS", 0.05), ("GRACE_SECONDS", 1.0)):
        monkeypatch.setattr(watch, name, seconds)
    link = LinkToABoard(after)
    with pytest.raises(Exited, match=str(HANG_EXIT_CODE)):
        run_watched(monkeypatch, link, lambda _: dist.barrier())
    assert link.looks == looks


def test_so_does_one_that_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(watching: Watch) -> None:
        raise MemoryError("not enough room")

    with pytest.raises(MemoryError):
        run_watched(monkeypatch, ANNOUNCED, fail)


@pytest.mark.parametrize("kind", [UserError, TransientError])
def test_what_one_rank_alone_has_met_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: type[UserError]
) -> None:
    """They may be in a collective with it, and its store may end with it: they are told before it goes."""

    def fail(watching: Watch) -> None:
        raise of_this_rank(kind("the disk is full"))

    board = LinkToABoard(after=1)
    board.address = Address("localhost", 1, "rank 0", is_own=True)
    with pytest.raises(kind, match="the disk is full"):
        run_watched(monkeypatch, board, fail)
    assert next(board.informed, "all") == "all"  # three others: it has kept its store until they knew
    assert board.counts == [f"told/{socket.gethostname()}"]
    told = [(ending.message, ending.rank, ending.exit_code, ending.is_failure) for ending in board.announced]
    assert told == [("the disk is full", 2, kind.exit_code, False)]
    assert capfd.readouterr().err.count("the disk is full") == 1


@pytest.mark.parametrize("is_told", [False, True])
def test_the_word_of_another_node_is_told_once_on_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], is_told: bool
) -> None:
    """By a watch, unless the main thread of some rank has found it first, as its collective failed."""
    monkeypatch.setenv(ERRORS_VARIABLE, str(tmp_path))
    if is_told:
        of_this_rank(UserError("the disk is full"))
    ending = Ending(message="the disk is full", host="elsewhere", rank=0, exit_code=2, is_failure=False)
    with pytest.raises(Exited, match="2"):
        run_watched(monkeypatch, LinkToABoard(after=1), lambda watching: watching._end(watching._link, ending))  # type: ignore[arg-type]
    assert capfd.readouterr().err.count("the disk is full") == 1


def test_what_all_ranks_have_met_is_nobodys_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(watching: Watch) -> None:
        raise UserError("no such file")

    board = LinkToABoard(after=1)
    with pytest.raises(UserError):
        run_watched(monkeypatch, board, fail)
    assert board.announced == []


def test_a_lost_store_is_told_once_in_each_start_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks of all starts note in one folder what they have told."""
    monkeypatch.setenv(ERRORS_VARIABLE, str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(Watch, "_hangs", lambda self: True)
    told = []
    for port in ("20001", "20001", "20002"):  # two ranks, and one that was started again
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(Exited, match=str(HANG_EXIT_CODE)):
            run_watched(monkeypatch, None, lambda watching: watching._investigate(watching._link))  # type: ignore[arg-type]
        told.append(capfd.readouterr().err.count("has ended"))
    assert told == [1, 0, 1]
