"""What is finished: a small JSON file in each stage's folder, beside the checkpoints.

To train a stage again, delete its folder: everything that is known of it is in there. A later stage that began with the
deleted result is noticed by that result's name, which is drawn anew.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import Stage
from megatron_ogpsa.system.files import is_there, read_sealed_json, write_sealed_json

RECORD_FILE = "stage.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""Megatron's (training/checkpointing.py): the iteration of the newest checkpoint in a folder."""

State = Literal["new", "begun", "finished"]


@dataclass(frozen=True)
class Record:
    """What is known of a stage.

    Attributes:
        settings: flag → value, when it was started last.
        began_with: the result of the stage before; None for the first stage.
        result: a name drawn when the stage was finished; None before.
    """

    settings: dict[str, str]
    began_with: str | None
    result: str | None


def state_of(stage: Stage) -> State:
    """Whether the stage must be run, goes on, or is finished.

    Raises:
        UserError: the folder holds checkpoints of something else, or what it holds began with another result.
    """
    record, has_checkpoint = _read(stage), is_there(stage.folder / TRACKER_FILE)
    if record is None:
        if has_checkpoint:
            raise UserError(
                f"{stage.folder} holds checkpoints that this pipeline has not made: move them away, or name another 'save'"
            )
        return "new"
    if record.began_with != _result_before(stage):
        raise UserError(
            f"{stage.folder} began with an earlier result of the stage {_previous(stage)}: delete it to train the stage "
            f"{stage.name} again"
        )
    if record.result is not None:
        if not has_checkpoint:
            raise UserError(
                f"{stage.folder}: the stage {stage.name} is finished, but its checkpoint is gone: restore it, or delete the "
                "folder to train the stage again"
            )
        return "finished"
    return "begun" if has_checkpoint else "new"


def begin(stage: Stage) -> None:
    """Note that the stage is being run; on one rank.

    Raises:
        UserError: the stage before it is not finished, or as :func:`state_of`.
    """
    state_of(stage)
    began_with = _result_before(stage)
    if stage.previous is not None and began_with is None:
        raise UserError(
            f"the stage {stage.name} begins with the stage {stage.previous.name}, which is not finished: run that first, or "
            "the whole pipeline without --stage"
        )
    _write(stage, Record(stage.settings, began_with, None))


def finish(stage: Stage) -> None:
    """Note that the stage has reached its last step and has saved; on one rank."""
    record = _read(stage)
    if record is None or not (stage.folder / TRACKER_FILE).exists():
        raise RuntimeError(f"the stage {stage.name} ended without a checkpoint in {stage.folder}")
    _write(stage, Record(record.settings, record.began_with, uuid.uuid4().hex))


def changed_settings(stage: Stage) -> list[str]:
    """Flags that are no longer what they were when the stage was started last."""
    record = _read(stage)
    if record is None:
        return []
    before, now = record.settings, stage.settings
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _previous(stage: Stage) -> str:
    return stage.previous.name if stage.previous else ""


def _result_before(stage: Stage) -> str | None:
    record = _read(stage.previous) if stage.previous else None
    return None if record is None else record.result


def _read(stage: Stage) -> Record | None:
    path = stage.folder / RECORD_FILE
    remedy = f"restore it, or delete {stage.folder} to train the stage again"
    fields = read_sealed_json(path, remedy=remedy)
    if fields is None:
        return None
    try:
        return Record(dict(fields["settings"]), fields["began_with"], fields["result"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is another program's ({error!r}): {remedy}") from None


def _write(stage: Stage, record: Record) -> None:
    write_sealed_json(stage.folder / RECORD_FILE, asdict(record), remedy="free space, or name another 'save'")
