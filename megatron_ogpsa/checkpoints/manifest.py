"""The manifest of a checkpoint: the SHA-256 of each file, in the form that Megatron's ``--verify-integrity`` gives it.

``integrity.json`` holds ``{"algorithm": "sha256", "files": {name: hexadecimal digest}}`` of the checkpoint's own folder
(megatron/core/dist_checkpointing/validation.py of 0.19). Megatron hashes on one thread of rank 0; here all cores of that
rank do, and on reading each rank takes a share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ogpsa.files import write_json

MANIFEST_FILE = "integrity.json"
ALGORITHM = "sha256"

_PIECE = 2**22
"""Bytes read at once; hashing them releases the interpreter's lock, so that files are hashed side by side."""


class ManifestError(Exception):
    """A manifest that says nothing, in words that name the file."""


def read_manifest(checkpoint: Path) -> dict[str, str] | None:
    """File name → SHA-256 in hexadecimal digits; None if the checkpoint has no manifest.

    Raises:
        ManifestError: it cannot be read, or is not what Megatron writes.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        if content["algorithm"] != ALGORITHM:
            raise ManifestError(f"{path} has digests of {content['algorithm']!r}, which are not known")
        files = {str(name): str(digest) for name, digest in content["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read ({type(error).__name__})") from None
    if bad := [name for name in files if Path(name).name != name]:
        raise ManifestError(f"{path} names {bad[0]!r}, which is not a file of the checkpoint's own folder")
    return files


def write_manifest(checkpoint: Path) -> None:
    """Hash every file of a finished checkpoint and write its manifest, at once or not at all.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    with ThreadPoolExecutor(_num_threads()) as pool:
        digests = list(pool.map(lambda name: _digest(checkpoint / name), names))
    write_json(checkpoint / MANIFEST_FILE, {"algorithm": ALGORITHM, "files": dict(zip(names, digests, strict=True))})


def damaged_files(
    checkpoint: Path,
    manifest: Mapping[str, str],
    names: Collection[str],
    *,
    after_file: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Which of ``names`` are not what the manifest says, one line each that names the file.

    Args:
        after_file: gets the bytes of each file as it has been read.
    """

    def problem_of(name: str) -> str | None:
        path = checkpoint / name
        try:
            digest, size = _digest(path), path.stat().st_size
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        after_file(size)
        return None if digest == manifest[name] else f"{path} is not what {MANIFEST_FILE} says (SHA-256)"

    with ThreadPoolExecutor(_num_threads()) as pool:
        return [problem for problem in pool.map(problem_of, sorted(names)) if problem is not None]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _num_threads() -> int:
    """The cores that this rank has to itself."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
