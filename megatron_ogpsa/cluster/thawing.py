"""A frozen rank does not see that it is asked to end: a stopped process gets signals when it goes on.

torchrun's agent would wait for it for half a minute before it kills it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOOK_SECONDS = 0.5


@contextmanager
def stopped_processes_end() -> Iterator[None]:
    """Within the with statement, let go on what this process has started, is stopped, and has been asked to end."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            for child in psutil.Process().children(recursive=True):
                if is_to_end(child.pid):
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGCONT)

    thread = threading.Thread(target=look, name="ogpsa-thawing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def is_to_end(pid: int) -> bool:
    """Whether a process is stopped and has a SIGTERM that it has not seen."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return False
    fields = dict(line.split(":", 1) for line in text.splitlines())
    is_pending = int(fields["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1
    return bool(is_pending) and fields["State"].split()[0] == "T"
