"""Whether a run can go on where it was, or begin where it is told to: the checkpoints that it would load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ogpsa.checkpoints import Examined, examine
from megatron_ogpsa.checkpoints.survey import RELEASE
from megatron_ogpsa.doctor.findings import Finding, fail, ok, size_in_words, warn

MOST_HASHED = 20 * 10**9
"""Bytes of a checkpoint that is hashed here: seconds. Of a larger one only the files' presence is looked at; training
hashes it on all ranks before it loads it."""


def check_checkpoints(
    *,
    load: str | None,
    save: str | None,
    pretrained: str | None,
    step: int | None,
    previous: Path | None,
    may_be_older: bool,
) -> Iterator[Finding]:
    """Whether the run can go on where it was, or begin where it is told to.

    Args:
        load, save, pretrained, step: Megatron's flags.
        previous: of a pipeline's later stage, where the stage before it saves.
        may_be_older: whether training may take an older checkpoint of ``load`` for a damaged one.
    """
    goes_on = False
    if load is not None:
        examined = _examined(Path(load), step)
        goes_on = examined.chosen is not None
        yield _last_checkpoint(Path(load), examined, may_be_older=may_be_older)
    elif save is not None:
        yield _overwritten(Path(save))
    if pretrained is not None and not goes_on:
        yield _beginning(Path(pretrained), step, is_to_come=previous is not None and Path(pretrained) == previous)


def _last_checkpoint(folder: Path, examined: Examined, *, may_be_older: bool) -> Finding:
    name, chosen, problems = "last checkpoint", examined.chosen, "; ".join(examined.problems[:3])
    if chosen is None and problems:
        remedy = "restore a checkpoint, or move the folder away to begin anew"
        return fail(name, f"{problems}: none is left in {folder}", remedy)
    if chosen is None:
        return ok(name, f"none in {folder} yet: the run begins anew")
    if not problems:
        return ok(name, f"{folder / chosen.name}: {_how_verified(folder, examined)}")
    if chosen.name == RELEASE or not (may_be_older or examined.is_tracked):
        return fail(name, problems, f"restore it, or say --ckpt-step {chosen.iteration} to begin with {chosen.name}")
    return warn(name, f"{problems}; training would go on from {chosen.name}", "restore it, or accept the older one")


def _overwritten(folder: Path) -> Finding:
    chosen = examine(folder, contents=False).chosen
    if chosen is None:
        return ok("last checkpoint", f"none in {folder} yet, and no --load: the run begins anew")
    text = f"{folder / chosen.name} is there, and without --load the run begins anew and writes over it"
    return warn("last checkpoint", text, f"say --load {folder} to go on from it, or name another --save")


def _beginning(folder: Path, step: int | None, *, is_to_come: bool) -> Finding:
    name, examined = "first weights", _examined(folder, step)
    if examined.chosen is None and is_to_come and not examined.problems:
        return ok(name, f"{folder}, which the stage before this one will write")
    if examined.chosen is None:
        text = "; ".join(examined.problems[:3]) or f"{folder} holds no checkpoint"
        return fail(name, text, "name a folder of Megatron checkpoints as --pretrained-checkpoint, or restore it")
    if examined.problems and not examined.is_tracked:
        remedy = f"restore it, or say --ckpt-step {examined.iteration} to begin with {examined.chosen.name}"
        return fail(name, "; ".join(examined.problems[:3]), remedy)
    return ok(name, f"{folder / examined.chosen.name}: {_how_verified(folder, examined)}")


def _examined(folder: Path, step: int | None) -> Examined:
    """With the files' content, if that is not too much of it."""
    examined = examine(folder, step, contents=False)
    if examined.chosen is None or _size(folder / examined.chosen.name) > MOST_HASHED:
        return examined
    return examine(folder, step)


def _how_verified(folder: Path, examined: Examined) -> str:
    assert examined.chosen is not None
    if not examined.is_verified:
        return "there, not verified: it has no manifest"
    if (size := _size(folder / examined.chosen.name)) > MOST_HASHED:
        return f"all files are there; {size_in_words(size)} are hashed by training, not here"
    return "complete, all files are what was written"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
