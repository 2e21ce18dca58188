"""The watch over one rank: a thread that sees it wait for too long, and the end of a run in which some rank has failed."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from megatron_ogpsa.console.telling import ERRORS_VARIABLE, tell_once, write_error
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.watchdog.board import Address, Ending, run_prefix
from megatron_ogpsa.watchdog.link import Link, StoreSilent
from megatron_ogpsa.watchdog.place import Place, fingerprint, place_of, thread_stack, traceback_stack
from megatron_ogpsa.watchdog.progress import progress
from megatron_ogpsa.watchdog.standing import Standing
from megatron_ogpsa.watchdog.story import Record, Suspect, story, story_of_loss, story_of_silence, suspects

HANG_EXIT_CODE = 3
"""Of every rank, when one hangs or is lost."""

TICK_SECONDS = 0.5
BEAT_SECONDS = 1.0
"""From one record to the next."""

LOOK_SECONDS = 2.5 * BEAT_SECONDS
"""Between two looks at the records: a rank that lives has told meanwhile."""

GRACE_SECONDS = 5.0
"""What a rank gets to end with its own message, or to be ended by its launcher, when some rank has raised."""

CONSEQUENCE_SECONDS = 3.0
"""How long a rank whose collective has failed waits for another one to say why."""

QUIET_SECONDS = 1.0
"""Delay before a silent rank exits, so that the one that reports prints before the launcher ends them all."""

LEAVE_SECONDS = 10.0
"""How long the holder of the store keeps it for ranks that have not left yet."""


class Watch:
    """Watches over the thread that enters it, until it leaves."""

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        timeout: float,
        is_ready: Callable[[], bool],
        collective_in_flight: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Nothing is watched yet.

        Args:
            timeout: seconds that a rank may wait in one collective.
            is_ready: whether the job's store is there.
            collective_in_flight: what the accelerator waits for; asked of a rank that has stood still for long.
        """
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timeout
        self._is_ready = is_ready
        self._in_flight = collective_in_flight
        self._host = socket.gethostname()
        self._link: Link | None = None
        self._beat = 0
        self._place = Place("the beginning")
        self._standing = Standing(time.monotonic())
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        """Start watching the calling thread."""
        self._process = os.getpid()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="ogpsa-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching. An exception of this rank's alone is announced; one that another rank's end has caused ends
        this process here, without a word."""
        if os.getpid() != self._process:
            return  # in a process that the watched one has forked
        self._stop.set()
        self._thread.join()
        if self._link is None:
            return
        try:
            if isinstance(error, UserError) and not error.is_alike:
                self._end_others(self._link, error)
            elif error is None or isinstance(error, UserError | SystemExit | KeyboardInterrupt):
                self._leave(self._link)
            else:
                self._fail(self._link, error, traceback)
        except StoreSilent:
            pass  # nobody can be told any more
        self._link.close(TICK_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            self._look()
            if self._link is None:
                if not self._is_ready():
                    continue
                self._link = Link(Address.from_environment(), self._record(), self._num_ranks)
            is_late = self._standing.seconds > self._timeout / 2
            self._link.tell(self._record(), 0 if is_late else BEAT_SECONDS)
            if self._link.ending is not None:
                self._obey(self._link, self._link.ending)
            if self._hangs():
                self._investigate(self._link)

    def _look(self) -> None:
        stack = thread_stack(self._watched)
        seconds = self._standing.observe((progress.pulses, fingerprint(stack)), time.monotonic())
        self._place = place_of(stack)
        if self._place.collective is None and seconds > self._timeout / 2:
            self._place = Place(self._place.line, self._in_flight())

    def _hangs(self) -> bool:
        return self._place.collective is not None and self._standing.seconds >= self._timeout

    def _record(self, *, has_left: bool = False) -> Record:
        self._beat += 1
        return Record(
            rank=self._rank,
            host=self._host,
            pid=self._process,
            beat=self._beat,
            told_at=time.time(),
            step=progress.step,
            phase=progress.phase,
            line=self._place.line,
            collective=self._place.collective,
            standing=self._standing.seconds,
            has_left=has_left,
        )

    def _investigate(self, link: Link) -> None:
        """Find who is behind, and end the run; returns if this rank goes on meanwhile, or if another one investigates."""
        try:
            if (
                link.ask(lambda board: board.count(f"investigations/{progress.step}")) > 1
                and not self._was_left_alone()
            ):
                return
            found, records = self._two_looks(link)
            self._look()
            if self._hangs():
                waiting = self._record()
                message = story(waiting, found, records, waiting.told_at)
                self._obey(link, self._announced(link, message, HANG_EXIT_CODE))
        except StoreSilent as silence:
            self._look()
            if self._hangs():
                message, start = story_of_silence(self._record(), str(silence)), run_prefix()
                tell_once(message, key=f"hang/{start}", write=write_error)  # ranks that are started again may hang anew
                self._exit(HANG_EXIT_CODE)

    def _was_left_alone(self) -> bool:
        """Whether the rank that investigates has had its time and has announced no end."""
        return self._standing.seconds > self._timeout + LOOK_SECONDS + GRACE_SECONDS

    def _two_looks(self, link: Link) -> tuple[list[Suspect], dict[int, Record]]:
        before = link.ask(lambda board: board.records())
        self._wait_for_an_ending(link, LOOK_SECONDS)
        now = link.ask(lambda board: board.records())
        return suspects(before, now, self._num_ranks), now

    def _wait_for_an_ending(self, link: Link, seconds: float) -> None:
        """Go on telling that this rank lives, until the run's end is known or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and link.ending is None:
            time.sleep(TICK_SECONDS)
            link.tell_now(self._record())

    def _fail(self, link: Link, error: BaseException, traceback: TracebackType | None) -> None:
        """This rank has raised: end without a word if that is a consequence, else let the others know."""
        self._place = place_of(traceback_stack(traceback))
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, RuntimeError) and self._place.collective is not None:
            self._end_if_a_consequence(link, told)
        me = self._record()
        self._announced(link, f"{me.identity} has failed {me.whereabouts}: {told}", exit_code=1, is_failure=True)
        self._keep_store(link, "informed", self._num_ranks - 1, CONSEQUENCE_SECONDS)

    def _end_others(self, link: Link, error: UserError) -> None:
        """They may be in a collective with this rank, which alone has the error and has told it already."""
        message, host = str(error), self._host
        own = Ending(message=message, host=host, rank=self._rank, exit_code=error.exit_code, is_failure=False)
        link.ask(lambda board: board.announce(own))
        link.ask(lambda board: board.count(f"told/{host}"))
        self._keep_store(link, "informed", self._num_ranks - 1, CONSEQUENCE_SECONDS)

    def _end_if_a_consequence(self, link: Link, told: str) -> None:
        """End with the others if another rank has ended or is lost; returns if this rank's collective failed by itself.

        All have failed at once, and the first to come looks at the records of all: it announces an end whatever it finds.

        Raises:
            StoreSilent: it cannot be known.
        """
        try:
            if link.ask(lambda board: board.count("consequences")) > 1:
                self._wait_for_an_ending(link, LOOK_SECONDS + GRACE_SECONDS)
            found = [] if link.ending else self._two_looks(link)[0]
        except StoreSilent:
            if link.ending is None:
                raise
            found = []  # the holder of the store has ended as announced, as soon as all knew of it
        dead = [suspect for suspect in found if suspect.kind in ("silent", "unheard")]
        if link.ending is None and dead:
            me = self._record()
            self._announced(link, story_of_loss(me, told, dead, me.told_at), HANG_EXIT_CODE)
        if link.ending is not None:
            if link.ending.is_failure:
                time.sleep(GRACE_SECONDS)  # its own rank, or the launcher, is to speak and act first
            self._end(link, link.ending)

    def _announced(self, link: Link, message: str, exit_code: int, *, is_failure: bool = False) -> Ending:
        """The end of the run: this one, told on this node, unless another rank has announced one."""
        own = Ending(message=message, host=self._host, rank=self._rank, exit_code=exit_code, is_failure=is_failure)
        link.ending = link.ask(lambda board: board.announce(own))
        if link.ending == own and not is_failure:
            write_error(message)
        return link.ending

    def _obey(self, link: Link, ending: Ending) -> None:
        """End this process, whose main thread cannot be interrupted; one that raises by itself gets the time for it."""
        if ending.is_failure and self._stop.wait(GRACE_SECONDS):
            return
        self._end(link, ending)

    def _end(self, link: Link, ending: Ending) -> NoReturn:
        try:
            if ending.host != self._host and link.ask(lambda board: board.count(f"told/{self._host}")) == 1:
                self._tell_here(ending.message)
            elif ending.rank != self._rank:
                time.sleep(QUIET_SECONDS)
            self._keep_store(link, "informed", self._num_ranks - 1, CONSEQUENCE_SECONDS)
        except StoreSilent:
            pass  # its holder has ended already
        self._exit(ending.exit_code)

    def _tell_here(self, message: str) -> None:
        """Unless a rank of this node that has failed by itself has found and told it already."""
        if ERRORS_VARIABLE in os.environ:
            tell_once(message, write=write_error)
        else:
            write_error(message)

    def _exit(self, code: int) -> NoReturn:
        sys.stdout.flush()
        os._exit(code)

    def _leave(self, link: Link) -> None:
        link.tell_now(self._record(has_left=True))
        link.ask(lambda board: board.count("left"))
        self._keep_store(link, "left", self._num_ranks, LEAVE_SECONDS)

    def _keep_store(self, link: Link, key: str, number: int, seconds: float) -> None:
        """Keep the store that this process holds until ``number`` ranks have counted ``key``, or for so many seconds."""
        end = time.monotonic() + seconds
        while link.address.is_own and time.monotonic() < end:
            if link.ask(lambda board: board.counted(key)) >= number:
                return
            time.sleep(TICK_SECONDS / 10)
