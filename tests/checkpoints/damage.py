"""Ways in which a file can be torn, as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def truncated(path: Path) -> None:
    """The first half is left."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    """As after open(…, "w") and a kill."""
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    """As file systems leave blocks that were allocated and not written."""
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def deleted(path: Path) -> None:
    """Gone."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (truncated, emptied, zeroed, flipped, deleted)
}
