"""The checkpoint to go on from: the newest that is what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.checkpoints.manifest import damaged_files
from megatron_ogpsa.checkpoints.survey import TRACKER_FILE, Saved, Survey, checkpoint_folder, survey

Damages = Callable[[Saved], list[str]]
"""Of a checkpoint with a manifest: its damaged files, one line each."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What an examination came to.

    Attributes:
        chosen: the checkpoint to go on from; None if there is none.
        problems: of the tracker, and of the checkpoints that were passed over, one line each that names a file.
        is_tracked: whether ``chosen`` is what the tracker names, and so what Megatron would load.
    """

    chosen: Saved | None
    problems: tuple[str, ...]
    is_tracked: bool

    @property
    def iteration(self) -> int | None:
        """Of the checkpoint to go on from; 0 of a release."""
        return None if self.chosen is None else self.chosen.iteration

    @property
    def is_verified(self) -> bool:
        """Whether that checkpoint has a manifest, so that its files were found to be what was written."""
        return self.chosen is not None and self.chosen.manifest is not None


def examine(folder: Path, iteration: int | None = None, *, contents: bool = True) -> Examined:
    """Find the checkpoint in ``folder`` that a run can go on from, on one process.

    Args:
        iteration: look at this one alone.
        contents: hash the files; otherwise see whether they are there.

    Raises:
        UserError: the folder cannot be listed, or what is there cannot be read.
    """

    def damages(saved: Saved) -> list[str]:
        manifest = saved.manifest or {}
        if contents:
            return damaged_files(folder / saved.name, manifest, manifest)
        paths = (folder / saved.name / name for name in manifest)
        return [f"{path} is missing" for path in paths if not path.exists()]

    return choose(survey(folder), damages, iteration)


def choose(found: Survey, damages: Damages, iteration: int | None = None) -> Examined:
    """The newest checkpoint without damage that is no newer than what the tracker names.

    A checkpoint without a manifest cannot be verified: it is taken where it is the one that was asked for or that the
    tracker names, and never in place of another one.

    Args:
        damages: asked from the newest candidate on, until one has none.
        iteration: the only candidate, whatever the tracker says.
    """
    candidates, problems = _candidates(found, iteration)
    for saved in candidates:
        bad = [saved.problem] if saved.problem else damages(saved) if saved.manifest is not None else []
        if not bad:
            return Examined(chosen=saved, problems=tuple(problems), is_tracked=saved.name == found.tracked)
        problems += bad
    return Examined(chosen=None, problems=tuple(problems), is_tracked=False)


def _candidates(found: Survey, iteration: int | None) -> tuple[list[Saved], list[str]]:
    """Checkpoints to be examined, in order, and what is wrong already."""
    by_name = {saved.name: saved for saved in found.saved}
    if iteration is not None:
        name = checkpoint_folder(found.folder, iteration).name
        return ([by_name[name]], []) if name in by_name else ([], [f"{found.folder / name} is missing"])
    with_manifest = [saved for saved in found.saved if saved.is_finished and (saved.manifest or saved.problem)]
    if found.tracked in by_name:
        tracked = by_name[found.tracked]
        newer = [saved for saved in with_manifest if saved.iteration > tracked.iteration]
        # Someone has set the tracker back, or it is damaged, or the run was killed before it was written.
        told = [
            f"{found.folder / saved.name} is complete, but {found.tracked} is what the tracker names"
            for saved in newer[:1]
        ]
        older = [saved for saved in with_manifest if saved.iteration < tracked.iteration]
        return [tracked, *older], told
    problems = []
    if found.tracker_problem:
        problems.append(found.tracker_problem)
    elif found.tracked:
        problems.append(f"{found.folder / found.tracked}, which the tracker names, is missing")
    elif with_manifest:
        problems.append(f"{found.folder / TRACKER_FILE} is missing")
    # Megatron would begin anew here, and overwrite in time what it has not seen.
    unknown = [saved.name for saved in found.saved if saved.is_finished and saved not in with_manifest]
    problems += [f"{found.folder / unknown[0]} is there, but nothing says whether it is complete"] if unknown else []
    return with_manifest, problems
