"""Files that are either the old ones or the new ones, whenever the machine stops."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
