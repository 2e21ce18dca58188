"""Errors that several ranks have and the user reads once."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

OTHER_RANK_DELAY = 3.0
"""Seconds that ranks other than 0 wait before they tell their error: if rank 0 has the same one, torchrun ends them first,
and the user reads it once. Ranks that this command has started know better, see :data:`ERRORS_VARIABLE`."""

ERRORS_VARIABLE = "MEGATRON_OGPSA_ERRORS"
"""Folder in which the ranks of one launch note the errors that one of them tells, and has told."""

TELLING_SECONDS = 3.0
"""What a rank that has an error to tell gets to write its line, before another one writes it: it may have been ended."""


def print_error(message: str) -> None:
    """One line on stderr."""
    print(_line(message), file=sys.stderr, end="", flush=True)


def write_error(message: str) -> None:
    """The same past Python's buffer, whose lock another thread may hold."""
    os.write(2, _line(message).encode(errors="replace"))


def tell_once(message: str, *, key: str | None = None, write: Callable[[str], None] = print_error) -> None:
    """Print an error if no other rank of this launch has printed it.

    Args:
        key: what the error is about, if ranks say it in different words.
    """
    folder = os.environ.get(ERRORS_VARIABLE)
    if not folder:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(OTHER_RANK_DELAY)
        write(message)
        return
    # What ends ranks that were started again is told again.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    note = Path(folder, hashlib.sha256(f"{start} {key or message}".encode()).hexdigest())
    told = note.with_suffix(".told")
    for turn in itertools.count():
        if _is_first(note.with_suffix(f".{turn}")):
            break
        if _is_there(told, TELLING_SECONDS):
            return
    write(message)
    with suppress(OSError):
        told.touch()


def _is_first(claim: Path) -> bool:
    """Whether this rank is the first to claim; also where none can be noted: told twice is better than not at all."""
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _is_there(path: Path, seconds: float) -> bool:
    """Whether a file is there now, or will be within so many seconds."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _line(message: str) -> str:
    return f"megatron-ogpsa: error: {message}\n"
