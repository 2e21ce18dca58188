"""This rank's link to the board: tells regularly without ever waiting, and asks with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from megatron_ogpsa.watchdog.board import Address, Board, Ending
from megatron_ogpsa.watchdog.courier import Courier
from megatron_ogpsa.watchdog.story import Record

ANSWER_SECONDS = 5.0
"""A store that takes longer is silent."""


class StoreSilent(Exception):
    """The job's store cannot be asked: its holder is frozen, or has ended."""


class Link:
    """One rank's conversation with the board. Used by one thread at a time.

    Attributes:
        ending: the end of the run, once it is known here.
    """

    def __init__(self, address: Address, first: Record, num_ranks: int) -> None:
        """Begins to connect, and to tell the first record."""
        self.address = address
        self.ending: Ending | None = None
        self._courier = Courier()
        self._board: Board | None = None
        self._lost: BaseException | None = None
        self._sent_at = time.monotonic()
        self._pending: Future[Any] | None = self._courier.send(lambda: self._connect(first, num_ranks))

    def tell(self, record: Record, interval: float) -> None:
        """Send ``record`` if the last one was sent ``interval`` seconds ago and has arrived; returns at once."""
        now = time.monotonic()
        if not self._is_free() or self._lost or now - self._sent_at < interval:
            return
        self._sent_at = now
        self._pending = self._courier.send(lambda: self._exchange(record))

    def tell_now(self, record: Record) -> None:
        """Send ``record`` and wait until it has arrived.

        Raises:
            StoreSilent: it does not arrive.
        """
        self.ask(lambda board: self._keep(board.exchange(record)))

    def ask[T](self, question: Callable[[Board], T]) -> T:
        """The board's answer.

        Raises:
            StoreSilent: there is none, now or when the rank last told where it is.
        """
        if not self._is_free(ANSWER_SECONDS) or self._lost or self._board is None:
            raise StoreSilent(self.silence())
        board = self._board
        self._sent_at = time.monotonic()
        self._pending = self._courier.send(lambda: question(board))
        pending = self._pending
        if not self._is_free(ANSWER_SECONDS) or self._lost:
            raise StoreSilent(self.silence())
        answer: T = pending.result()
        return answer

    def silence(self) -> str:
        """What is known of a store that does not answer."""
        where = f"{self.address.holder}, which holds the job's store at {self.address.host}:{self.address.port},"
        if self._lost is not None:
            return f"{where} has ended or cannot be reached"
        return f"{where} is frozen or lost: it has not answered for {time.monotonic() - self._sent_at:.0f} s"

    def close(self, seconds: float) -> None:
        """End the conversation."""
        self._courier.close(seconds)
        self._board = self._pending = None

    def _is_free(self, seconds: float = 0.0) -> bool:
        """Whether the last call has come back, within ``seconds``; its failure is the store's loss."""
        if self._pending is None:
            return True
        try:
            self._lost = self._pending.exception(timeout=seconds)
        except TimeoutError:
            return False
        self._pending = None
        return True

    def _connect(self, first: Record, num_ranks: int) -> None:
        self._board = Board(self.address, num_ranks)
        self._exchange(first)

    def _exchange(self, record: Record) -> None:
        assert self._board is not None
        self._keep(self._board.exchange(record))

    def _keep(self, ending: Ending | None) -> None:
        self.ending = self.ending or ending
