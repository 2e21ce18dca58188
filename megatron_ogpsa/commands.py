"""Commands that run one after the other: one progress line with an ETA, and the end of its log where one fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.errors import UserError

LOG_TAIL = 15
"""Lines of a failed command's log that are shown."""


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


def run_commands(commands: Sequence[Command], clock: Callable[[], float] = time.monotonic) -> None:
    """Run those that are left, with one line that says which, and when all will be done.

    Raises:
        CommandFailed: an exit code was not 0.
    """
    pace = 1.0  # measured seconds over expected ones, of the last command
    for index, command in enumerate(commands):
        if command.is_done:
            continue
        rest = sum(later.seconds for later in commands[index + 1 :] if not later.is_done)
        begun = clock()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with command.log.open("w", encoding="utf-8") as log, _raising_when_told_to_end():
            process = subprocess.Popen(command.argv, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None:
                    elapsed = clock() - begun
                    left = max(command.seconds * pace - elapsed, 1.0) + rest * pace
                    _show(f"[{index + 1}/{len(commands)}] {command.title}: {elapsed:3.0f} s, about {left:3.0f} s to go")
                    time.sleep(0.5)
            finally:
                if process.poll() is None:  # Ctrl-C or SIGTERM: torchrun ends its ranks when it is told to
                    process.terminate()
                    process.wait()
        pace = (clock() - begun) / command.seconds
        _show("")
        if process.returncode != 0:
            _fail(command)
        if command.stamp:
            shutil.copyfile(*command.stamp)


@contextmanager
def _raising_when_told_to_end() -> Iterator[None]:
    """SIGTERM unwinds this process, as Ctrl-C does, in place of ending it where it stands and leaving its command behind."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(command: Command) -> None:
    lines = command.log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-LOG_TAIL:]), file=sys.stderr)
    raise CommandFailed(
        f"the step '{command.title}' failed; the end of {command.log} stands above, mend its cause and run again"
    )


def _show(text: str) -> None:
    """Rewrite the progress line; without a terminal each text stands on a line of its own, and only when it is new."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif text and text.split(":")[0] not in _shown:
        _shown.add(text.split(":")[0])
        print(text, flush=True)


_shown: set[str] = set()
