"""Files that are either the old ones or the new ones, whenever the machine stops."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ogpsa.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk and rename it; folders are made.

    Raises:
        OSError: the file system refuses; ``path`` is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON object with sorted keys; see :func:`write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The JSON object in the file.

    Args:
        remedy: what the user can do if it cannot be read.

    Raises:
        UserError: it cannot be read, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: {remedy}")
    return content
