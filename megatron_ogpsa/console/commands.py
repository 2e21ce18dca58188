"""Commands that run one after the other: one progress line with an ETA, and the end of its log where one fails."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.processes import end_with_parent

LOG_TAIL = 15
"""Lines of a failed command's log that are shown."""

GRACE = 15.0
"""Seconds in which a command that is interrupted may end by itself."""


@dataclass(frozen=True)
class Command:
    """What runs in a process of its own, whose output goes to a log.

    Attributes:
        seconds: what it takes on two cores, for the first ETA; those that are measured correct it.
        is_done: whether an earlier run has left its result.
        stamp: (config, copy): the copy says that the command was done with that config.
    """

    title: str
    argv: list[str]
    log: Path
    seconds: float
    is_done: bool = False
    stamp: tuple[Path, Path] | None = None


class CommandFailed(UserError):
    """A command ended with an error; the end of its log has been shown."""

    exit_code = 1


def run_commands(
    commands: Sequence[Command], clock: Callable[[], float] = time.monotonic, *, on_cpu: bool = False
) -> None:
    """Run those that are left; the first that fails is the last.

    Args:
        on_cpu: hide GPUs from them: they are written for ranks on a CPU, and two of these cannot share a GPU with NCCL.

    Raises:
        CommandFailed: an exit code was not 0.
    """
    for command, exit_code in in_turn(commands, clock, on_cpu=on_cpu):
        if exit_code != 0:
            show_end(command)
            raise CommandFailed(
                f"the step '{command.title}' failed; the end of {command.log} stands above, mend its cause and run again"
            )
        if command.stamp:
            shutil.copyfile(*command.stamp)


def in_turn(
    commands: Sequence[Command],
    clock: Callable[[], float] = time.monotonic,
    *,
    until: float = math.inf,
    on_cpu: bool = False,
) -> Iterator[tuple[Command, int | None]]:
    """Run those that are left, with one line that says which, and when all will be done; each with its exit code.

    Args:
        until: of the clock. What runs then is interrupted, as by Ctrl-C, and gives None; what is left is not begun.
        on_cpu: see :func:`run_commands`.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    pace = 1.0  # measured seconds over expected ones, of the last command
    for index, command in enumerate(commands):
        if command.is_done:
            continue
        if clock() >= until:
            return
        rest = sum(later.seconds for later in commands[index + 1 :] if not later.is_done)
        begun = clock()
        with command.log.open("w", encoding="utf-8") as log, _end_by_sigterm() as end:
            process = _start(command.argv, log, environment)
            try:
                end.may_come()
                while process.poll() is None and clock() < until:
                    elapsed = clock() - begun
                    left = min(max(command.seconds * pace - elapsed, 1.0) + rest * pace, until - clock())
                    _show(f"[{index + 1}/{len(commands)}] {command.title}: {elapsed:3.0f} s, about {left:3.0f} s to go")
                    time.sleep(0.5)
                if was_cut := process.poll() is None:
                    _interrupt(process)
            finally:
                if process.poll() is None:  # Ctrl-C or SIGTERM: torchrun ends its ranks when it is told to
                    process.terminate()
                    process.wait()
        pace = (clock() - begun) / command.seconds
        _show("")
        yield command, None if was_cut else process.returncode


def _start(argv: list[str], log: IO[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """It is told to end if this process is killed: a second run would train in the same folder beside it."""
    end = partial(end_with_parent, os.getpid(), signal.SIGTERM)
    return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=end)


def show_end(command: Command) -> None:
    """Print the last lines of its log, to standard error."""
    lines = command.log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-LOG_TAIL:]), file=sys.stderr)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """SIGINT, after which pytest still writes what it has found."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


class _End:
    """What SIGTERM does: nothing until it may come, so that no command is started that nobody knows of."""

    def __init__(self) -> None:
        self._may_come, self._is_told = False, False

    def may_come(self) -> None:
        """From now on; raises SystemExit if it was told before."""
        self._may_come = True
        if self._is_told:
            self.told(signal.SIGTERM, None)

    def told(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self._is_told = True
        if self._may_come:
            sys.exit(128 + number)


@contextmanager
def _end_by_sigterm() -> Iterator[_End]:
    """SIGTERM unwinds this process, as Ctrl-C does, in place of ending it where it stands and leaving its command behind."""
    end = _End()
    before = signal.signal(signal.SIGTERM, end.told)
    try:
        yield end
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(text: str) -> None:
    """Rewrite the progress line; without a terminal each text stands on a line of its own, and only when it is new."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif text and text.split(":")[0] not in _shown:
        _shown.add(text.split(":")[0])
        print(text, flush=True)


_shown: set[str] = set()
