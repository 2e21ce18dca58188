"""A thread for calls that may block for ever, so that who makes them need not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Courier:
    """Makes calls one after the other in a daemon thread, which a blocked call does not keep the process alive for.

    (Threads of ``concurrent.futures`` are waited for at exit.)
    """

    def __init__(self) -> None:
        """Starts the thread."""
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ogpsa-courier", daemon=True)
        self._thread.start()

    def send[T](self, call: Callable[[], T]) -> Future[T]:
        """Make ``call`` when those before it are over."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def ask[T](self, call: Callable[[], T], seconds: float) -> T:
        """The result of ``call``.

        Raises:
            TimeoutError: it takes longer than ``seconds``, or a call before it does.
        """
        return self.send(call).result(timeout=seconds)

    def close(self, seconds: float) -> None:
        """End the thread after the calls that were sent; one that blocks is left behind."""
        self._calls.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:  # whoever asked gets it
                future.set_exception(error)
            del item, future, call
