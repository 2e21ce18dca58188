"""The manifest of a checkpoint: the SHA-256 of each file, in the form that Megatron's ``--verify-integrity`` gives it.

``integrity.json`` holds ``{"algorithm": "sha256", "files": {name: hexadecimal digest}}`` of the checkpoint's own folder
(megatron/core/dist_checkpointing/validation.py of 0.19). A rank's own files are ``__<rank>_<number>.distcp`` (torch's
``FileSystemWriter``, and Megatron's asynchronous one), so that each rank can take the digests of what it wrote, and keep
them beside its files until all are collected.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ogpsa.system.files import file_error, may_pass, write_json

MANIFEST_FILE = "integrity.json"
ALGORITHM = "sha256"

RETRY_SECONDS = 2.0
"""To a second look at what could not be read."""

_KEPT_PREFIX = ".digests_"

_WRITTEN_BY_RANK = re.compile(r"__\d+_\d+\.distcp")

_PIECE = 2**22
"""Bytes read at once; hashing them releases the interpreter's lock, so that files are hashed side by side."""


class ManifestError(Exception):
    """A manifest that says nothing, in words that name the file."""


def seen[T](path: Path, read: Callable[[Path], T]) -> T:
    """What ``read`` finds in a checkpoint's file; it looks once more if what stops it may pass.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError: there is no such file, which is damage.
        UserError: it is there and cannot be read. Nobody knows that it is damaged, and a run that went on from an older
            checkpoint would train anew, and write over, what may be whole. Worth a restart if it may pass.
    """
    try:
        try:
            return read(path)
        except OSError as error:
            if not may_pass(error):
                raise
            time.sleep(RETRY_SECONDS)
            return read(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        message = (
            f"{path} cannot be read ({error.strerror}), which does not say that it is damaged: mend the file system"
        )
        raise file_error(error, f"{message}, or move the file away to go on without what it belongs to") from None


def read_manifest(checkpoint: Path) -> dict[str, str] | None:
    """File name → SHA-256 in hexadecimal digits; None if the checkpoint has no manifest.

    Raises:
        ManifestError: it is not what Megatron writes.
        UserError: it cannot be read; see :func:`seen`.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        content = json.loads(seen(path, Path.read_bytes))
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


def write_manifest(checkpoint: Path, digests: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a finished checkpoint, at once or not at all.

    Args:
        digests: of every file, where they are known; otherwise all are hashed here.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    files = digests_of(checkpoint, files_beside(checkpoint, ())) if digests is None else digests
    write_json(checkpoint / MANIFEST_FILE, {"algorithm": ALGORITHM, "files": dict(files)})


def files_beside(checkpoint: Path, known: Collection[str]) -> list[str]:
    """The files of a checkpoint that belong into its manifest and are not ``known``, sorted."""
    return sorted(
        path.name
        for path in checkpoint.iterdir()
        if path.name not in known
        and path.name != MANIFEST_FILE
        and not path.name.startswith(_KEPT_PREFIX)
        and path.is_file()
    )


def files_of_rank(checkpoint: Path, rank: int) -> list[str]:
    """The files that ``rank`` wrote; asked for one by one, for thousands of ranks would all list the same folder."""
    numbered = (f"__{rank}_{number}.distcp" for number in itertools.count())
    return list(itertools.takewhile(lambda name: (checkpoint / name).is_file(), numbered))


def keep_digests(checkpoint: Path, rank: int) -> None:
    """Hash the files that ``rank`` wrote and keep the digests beside them; see :func:`take_digests`.

    Raises:
        OSError: a file cannot be read, or the digests cannot be written.
    """
    write_json(_kept(checkpoint, rank), digests_of(checkpoint, files_of_rank(checkpoint, rank)))


def take_digests(checkpoint: Path, rank: int) -> dict[str, str] | None:
    """What :func:`keep_digests` has kept, which is then no longer there; None if it did not come to that.

    Raises:
        OSError: they are there and cannot be read or removed.
    """
    path = _kept(checkpoint, rank)
    try:
        kept: dict[str, str] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    path.unlink()
    return kept


def drop_digests(checkpoint: Path, rank: int | None = None) -> None:
    """Remove the digests that ``rank``, or any rank, has kept and nobody has taken: its save was cut short."""
    kept = checkpoint.glob(f"{_KEPT_PREFIX}*") if rank is None else [_kept(checkpoint, rank)]
    for path in kept:
        path.unlink(missing_ok=True)


def drop_files_of_ranks(checkpoint: Path) -> None:
    """Remove what the ranks of a save before have written into a checkpoint that is about to be saved anew.

    There may have been more of them, whose files nobody would write again: no metadata name them, but the manifest would.
    """
    if not checkpoint.is_dir():
        return
    for path in checkpoint.iterdir():
        if _WRITTEN_BY_RANK.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _kept(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"{_KEPT_PREFIX}{rank}.json"


def digests_of(
    checkpoint: Path, names: Collection[str], *, after_file: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """File name → SHA-256 in hexadecimal digits, hashed side by side on the cores that this rank has to itself.

    Args:
        after_file: called as each file has been read.

    Raises:
        OSError: a file cannot be read.
    """

    def digest_of(name: str) -> str:
        digest = _digest(checkpoint / name)
        after_file()
        return digest

    with ThreadPoolExecutor(_num_threads()) as pool:
        return dict(zip(names, pool.map(digest_of, names), strict=True))


def damaged_files(
    checkpoint: Path,
    manifest: Mapping[str, str],
    names: Collection[str],
    *,
    after_file: Callable[[], None] = lambda: None,
) -> list[str]:
    """Which of ``names`` are not what the manifest says, one line each that names the file.

    Args:
        after_file: called as each file has been read.

    Raises:
        UserError: a file cannot be read; see :func:`seen`.
    """

    def problem_of(name: str) -> str | None:
        path = checkpoint / name
        try:
            digest = seen(path, _digest)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        after_file()
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
