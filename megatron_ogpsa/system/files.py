"""Files that are either the old ones or the new ones, whenever the machine stops, and tell if they were changed since."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ogpsa.errors import TransientError, UserError

SEAL = "sha256"
"""The key of a sealed JSON object that holds the SHA-256 of the others."""

_TRANSIENT = frozenset(
    {
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
        *(
            errno.ECONNRESET,
            errno.ECONNREFUSED,
            errno.ECONNABORTED,
            errno.EHOSTUNREACH,
            errno.ENETDOWN,
            errno.ENETUNREACH,
        ),
        *(
            errno.EAGAIN,
            errno.EINTR,
            errno.EBUSY,
            errno.ETXTBSY,
            errno.ENFILE,
            errno.EMFILE,
            errno.ENOMEM,
            errno.ENOLCK,
        ),
    }
)
"""What may be over at the next start; all else is the same until somebody mends it."""


def may_pass(error: BaseException) -> bool:
    """Whether the file system may do at the next try what it refuses now: EIO and ESTALE, say."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def file_error(error: BaseException, message: str) -> UserError:
    """``message`` as the error that ends a run; it is one worth a restart if ``error`` may pass."""
    return (TransientError if may_pass(error) else UserError)(message)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder.

    Raises:
        UserError: it cannot be told, as where a folder above it may not be searched.
    """
    try:
        return path.exists()
    except OSError as error:
        raise file_error(
            error, f"{path} cannot be read ({error.strerror}): see to its folder, or name another"
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk and rename it; folders are made.

    Raises:
        OSError: the file system refuses; ``path`` is as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # on a full disk even half a file is in the way
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON object with sorted keys; see :func:`write_atomically`."""
    write_atomically(path, _as_bytes(content))


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The JSON object in the file.

    Args:
        remedy: what the user can do if it cannot be read.

    Raises:
        UserError: it cannot be read, or is not an object.
    """
    return _object_in(path, _bytes_of(path, remedy), remedy)


def write_sealed_json(path: Path, content: Mapping[str, Any], *, remedy: str) -> None:
    """As :func:`write_json`, for a file that no manifest covers: :func:`read_sealed_json` notices any change to it.

    Args:
        content: without the key :data:`SEAL`.
        remedy: what to do if the place cannot be written, for the message.

    Raises:
        UserError: the file system refuses; ``path`` is as it was.
    """
    if SEAL in content:
        raise ValueError(f"{SEAL!r} is the key of the seal")
    try:
        write_atomically(path, _sealed(content))
    except OSError as error:
        raise file_error(error, f"{path} cannot be written ({error.strerror}): {remedy}") from None


def read_sealed_json(path: Path, *, remedy: str) -> dict[str, Any] | None:
    """What :func:`write_sealed_json` wrote, without the seal; ``None`` if there is no file.

    Args:
        remedy: what to do about a file that is not whole, for the message.

    Raises:
        UserError: the file is torn, any byte of it was changed, or it cannot be read.
    """
    if not is_there(path):
        return None
    written = _bytes_of(path, remedy)
    content = _object_in(path, written, remedy)
    if content.pop(SEAL, None) is None:
        raise UserError(f"{path} has no seal ({SEAL!r}), so it may have been changed: {remedy}")
    if written != _sealed(content):
        raise UserError(f"{path} is damaged or was changed (its seal does not fit): {remedy}")
    return content


def _bytes_of(path: Path, remedy: str) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise UserError(f"{path} is not a regular file: {remedy}")
        return path.read_bytes()
    except OSError as error:
        raise file_error(error, f"{path} cannot be read ({error.strerror}): {remedy}") from None


def _object_in(path: Path, written: bytes, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: {remedy}")
    return content


def _sealed(content: Mapping[str, Any]) -> bytes:
    """The only bytes that a sealed file with this content can have."""
    content = json.loads(json.dumps(content))  # keys that are no text become text, and are sorted as such
    return _as_bytes({**content, SEAL: hashlib.sha256(_as_bytes(content)).hexdigest()})


def _as_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
