"""What a file system says when it refuses, and whether a folder can be written."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from megatron_ogpsa.system.files import may_pass

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT),
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
)
"""What a file system says when it refuses, and what one in a network says of a server that is away."""

_PROBE_BYTES = 4096


def disk_remedy(error: OSError, again: str = "start again (--max-restarts does)") -> str:
    """What the user can do about it.

    Args:
        again: how to try once more.
    """
    if may_pass(error):
        return f"{again}; if that ends alike, mend the file system or name another folder"
    return "free space there, or name another folder"


def probe(folder: Path) -> None:
    """Write and remove a small file in ``folder``, or in the nearest folder above it that is there.

    Raises:
        OSError: it cannot be written.
    """
    file = nearest_folder(folder) / f".{uuid.uuid4().hex}.tmp"
    try:
        with file.open("wb") as stream:
            stream.write(bytes(_PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        file.unlink(missing_ok=True)


def nearest_folder(folder: Path) -> Path:
    """The folder, or what is there above it: a file, below which nothing can be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def disk_error(error: BaseException | None) -> OSError | None:
    """What the file system said, if that is what ``error`` comes from.

    torch's writer fails once more while it handles the first failure, with a RuntimeError about positions in a file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None
