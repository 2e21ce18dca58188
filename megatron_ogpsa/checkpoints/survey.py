"""What lies in a run's folder of checkpoints, as Megatron lays it out: a tracker and a folder for each iteration.

::

    latest_checkpointed_iteration.txt    the tracker: "6", or "release"
    iter_0000003/  iter_0000006/         checkpoints
        .metadata metadata.json __0_0.distcp …   Megatron's (torch_dist)
        ogpsa.json                       ours: the state of the run's hooks, and that there is a manifest
        integrity.json                   SHA-256 of all of these; written last, so that it marks what is complete

(megatron/training/checkpointing.py of 0.19.) Megatron writes the tracker in place, so that a killed run can leave an empty
one, and ends with exit code 0 when it cannot read it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.checkpoints.manifest import MANIFEST_FILE, ManifestError, read_manifest, seen
from megatron_ogpsa.system.files import file_error, write_atomically

TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE_FILE = "ogpsa.json"
HAS_MANIFEST = "has manifest"
"""Key of the state file: whether a manifest is written after it."""

RELEASE = "release"

_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")
_MARKERS = ("metadata.json", ".metadata", MANIFEST_FILE, "mp_rank_00", "mp_rank_00_000")
"""Files or folders of which every finished checkpoint has one, by format; most are written last."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One checkpoint of the folder.

    Attributes:
        manifest: file → SHA-256; None if there is none, or none that can be read.
        problem: what is wrong with it before any file is hashed, in one line; None if nothing is.
        is_finished: whether its writing came to an end, as far as the names of its files tell.
    """

    name: str
    iteration: int
    manifest: dict[str, str] | None
    problem: str | None
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is there.

    Attributes:
        tracked: what the tracker names, ``iter_0000006`` or ``release``; None without a readable tracker.
        tracker_problem: why the tracker cannot be read; None if it can, or is not there.
        saved: newest first; a release is the oldest.
    """

    folder: Path
    tracked: str | None
    tracker_problem: str | None
    saved: tuple[Saved, ...]


def checkpoint_folder(folder: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of an iteration."""
    return folder / f"iter_{iteration:07d}"


def survey(folder: Path) -> Survey:
    """Look at the folder, without reading the checkpoints themselves.

    Raises:
        UserError: the folder cannot be listed, or what is there cannot be read.
    """
    tracked, problem = _read_tracker(folder / TRACKER_FILE)
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise file_error(error, f"{folder}: cannot be listed ({error.strerror}): make it readable") from None
    saved = [_saved(folder / name, iteration) for name in names if (iteration := _iteration(name)) is not None]
    return Survey(
        folder=folder,
        tracked=tracked,
        tracker_problem=problem,
        saved=tuple(sorted(saved, key=lambda checkpoint: checkpoint.iteration, reverse=True)),
    )


def write_tracker(folder: Path, name: str) -> None:
    """Let the tracker name a checkpoint; at once, as Megatron does not.

    Raises:
        OSError: the file system refuses.
    """
    write_atomically(folder / TRACKER_FILE, name.encode() if name == RELEASE else str(_iteration(name)).encode())


def _read_tracker(path: Path) -> tuple[str | None, str | None]:
    try:
        text = seen(path, Path.read_bytes).decode("ascii").strip()
    except FileNotFoundError:
        return None, None
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read ({type(error).__name__})"
    if text == RELEASE:
        return RELEASE, None
    if not text.isdecimal():
        shown = f"holds {text[:20]!r}" if text else "is empty"
        return None, f"{path} {shown}, not the number of an iteration"
    return checkpoint_folder(path.parent, int(text)).name, None


def _iteration(name: str) -> int | None:
    """Of a checkpoint's folder; a release has iteration 0 with Megatron, and is older than any other here."""
    if name == RELEASE:
        return 0
    match = _ITERATION_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def _saved(path: Path, iteration: int) -> Saved:
    try:
        manifest, problem = read_manifest(path), None
    except ManifestError as error:
        manifest, problem = None, str(error)
    has_marker = any((path / name).exists() for name in _MARKERS)
    is_cut_short = manifest is None and problem is None and _says_that_it_has_a_manifest(path / STATE_FILE)
    if is_cut_short:
        problem = f"{path / MANIFEST_FILE} is missing"
    return Saved(
        name=path.name,
        iteration=iteration,
        manifest=manifest,
        problem=problem,
        is_finished=has_marker and not is_cut_short,
    )


def _says_that_it_has_a_manifest(path: Path) -> bool:
    """The state file is written before the manifest: without one, a save was cut short, or the manifest was lost."""
    try:
        state = json.loads(seen(path, Path.read_bytes))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and bool(state.get(HAS_MANIFEST))
