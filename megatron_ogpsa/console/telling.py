"""Errors that several ranks have and the user reads once."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

OTHER_RANK_DELAY = 3.0
"""Seconds that ranks other than 0 wait before they tell their error: if rank 0 has the same one, torchrun ends them first,
and the user reads it once. Ranks that this command has started know better, see :data:`ERRORS_VARIABLE`."""

ERRORS_VARIABLE = "MEGATRON_OGPSA_ERRORS"
"""Folder in which the ranks of one launch note the errors that one of them has told."""


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
    if folder := os.environ.get(ERRORS_VARIABLE):
        # What ends ranks that were started again is told again.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            Path(folder, hashlib.sha256(f"{start} {key or message}".encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
    elif os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANK_DELAY)
    write(message)


def _line(message: str) -> str:
    return f"megatron-ogpsa: error: {message}\n"
