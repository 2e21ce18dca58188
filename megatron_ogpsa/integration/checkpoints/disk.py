"""A full, read-only or failing disk under ``--save``: one line on every rank, and the checkpoints before it as they were.

Megatron's ``torch_dist`` format (core/dist_checkpointing/strategies/filesystem_async.py) is written by each rank, which
then agree: if one could not write, all raise CheckpointException, which no longer says why. Folders, metadata and the
tracker are written by rank 0 alone. If that fails the others wait for it in the next collective, until it has gone.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ogpsa.errors import TransientError, UserError
from megatron_ogpsa.integration.ranks.agreement import agreed, of_this_rank
from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches
from megatron_ogpsa.system.disk import DISK_ERRORS, disk_error, disk_remedy, nearest_folder, probe
from megatron_ogpsa.system.files import file_error, may_pass
from megatron_ogpsa.system.processes import attempt_in_store

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(seconds=10)
"""For the message of a rank that has gone; it is set before that rank goes."""


@dataclass
class _Written:
    """What this rank's writers have been given since the last checkpoint, and what stopped them."""

    num_bytes: int = 0
    error: OSError | None = None


_written = _Written()
_has_lost_figures = False
_store: Any = None  # held on to: a rank that fails may be the one that keeps it for the others


def check_folders(*, save: str | None, tensorboard_dir: str | None) -> None:
    """Write a few bytes where a run will write, before it has trained for hours.

    Checkpoints are written by all nodes, TensorBoard's file by the last rank alone, whose node may be the only one that has
    the folder. One that is not there yet is not made: whether it can be is seen from the nearest one above it.

    Args:
        save: of ``--save``, and so on; None if the flag was not given.

    Raises:
        UserError: naming flag, folder and remedy; on the ranks that have looked. Worth a restart if it may pass.
    """
    if save and _is_first_of_node():
        _check_folder(f"--save {save}: cannot be written", save)
    if tensorboard_dir and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        _check_folder(f"--tensorboard-dir {tensorboard_dir}: cannot be written", tensorboard_dir)


def _is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _check_folder(what: str, folder: str) -> None:
    try:
        probe(Path(folder))
    except OSError as error:
        raise file_error(error, f"{what} ({error.strerror}): {disk_remedy(error)}") from None


def install_disk_errors() -> None:
    """Let this process's checkpoints, and its TensorBoard, tell what a disk does to them. Idempotent.

    Raises:
        RuntimeError: the functions to be wrapped are not there.
    """
    apply_patches(_CHECKPOINT_PATCHES)
    if importlib.util.find_spec("tensorboard") is not None:
        apply_patches(_TENSORBOARD_PATCHES)


def install_writer_errors() -> None:
    """Let the process that writes checkpoints beside the training note what the disk said. Idempotent."""
    apply_patches((_WRITER_PATCH,))


def noted_error() -> OSError | None:
    """What has stopped this process's writers."""
    return _written.error


def _telling_disk_errors(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        folder = str(get_args().save)
        what = f"--save {folder}: the checkpoint of step {iteration} could not be written"
        agreed(lambda: _check_folder(what, folder) if _is_first_of_node() else None)
        free = shutil.disk_usage(nearest_folder(Path(folder))).free
        _written.num_bytes, _written.error = 0, None
        with _disk_errors_told(what, free):
            return original(iteration, *args, **kwargs)

    return save_checkpoint


def _telling_late_disk_errors(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if not get_args().async_save:
            return original(*args, **kwargs)
        with _disk_errors_told(f"--save {get_args().save}: a checkpoint could not be written beside the training"):
            return original(*args, **kwargs)

    return maybe_finalize_async_save


@contextmanager
def _disk_errors_told(what: str, free: int | None = None) -> Iterator[None]:
    global _store
    _store = dist.distributed_c10d._get_default_store()
    try:
        yield
    except CheckpointException as error:
        raise _of_all_ranks(what, error, free) or error from None
    except (OSError, RuntimeError) as error:
        if (found := disk_error(error)) is not None:
            message = f"{what} ({found.strerror} on rank {dist.get_rank()}): {disk_remedy(found)}"
            raise _told_to_others(file_error(found, message)) from None
        raise _told_by_another() or error from None  # a collective fails if another rank has gone


def _of_all_ranks(what: str, error: CheckpointException, free: int | None) -> UserError | None:
    """Every rank is here: they tell each other what stopped them. None if that was not the disk.

    What stopped another process, which writes beside the training, rank 0 reads in the words that were handed on.
    """
    own = {dist.get_rank(): _written.error.errno} if _written.error else {}
    handed_on = {rank: _errno_in(str(failure)) for rank, (failure, _) in error.failures.items()}
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, ({**handed_on, **own}, _written.num_bytes))
    reasons = {
        rank: OSError(number, os.strerror(number)) for some, _ in everyones for rank, number in some.items() if number
    }
    if not reasons:
        return None
    rank = min(reasons, key=lambda rank: (may_pass(reasons[rank]), rank))  # a restart would end at what lasts
    size = (
        ""
        if free is None
        else f"; it takes at least {_megabytes(sum(n for _, n in everyones))}, {_megabytes(free)} were free"
    )
    reason = reasons[rank]
    told = f"{what} ({reason.strerror} on rank {rank}{size}): {disk_remedy(reason)}; what was saved before is as it was"
    return file_error(reason, told)


def _errno_in(words: str) -> int | None:
    """What the file system said, out of a sentence with ``[Errno 28]``."""
    found = re.search(r"\[Errno (\d+)\]", words)
    return int(found[1]) if found and int(found[1]) in DISK_ERRORS else None


def _told_to_others(error: UserError) -> UserError:
    """The other ranks are in a collective, which fails once this one has gone; they find ``error`` in the store."""
    _store.set(_told_key(), json.dumps([isinstance(error, TransientError), str(error)]))
    return of_this_rank(error)


def _told_key() -> str:
    """Of this start of the ranks: the store may still hold what was told in one before."""
    return f"megatron-ogpsa/{attempt_in_store()}/disk"


def _told_by_another() -> UserError | None:
    try:
        _store.wait([_told_key()], _PATIENCE)
        is_transient, message = json.loads(_store.get(_told_key()))
        return of_this_rank((TransientError if is_transient else UserError)(message))
    except RuntimeError:  # there is no message, or the store has gone too
        return None


def _noting_errors(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def write_preloaded_data(
        transforms: Any, local_proc_idx: int, write_bucket: Any, results_queue: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _, _, (_, tensors) = write_bucket
        _written.num_bytes += sum(tensor.nbytes for _, tensor in tensors)
        if results_queue is not None:
            results_queue = _NotingQueue(results_queue)
        index, results = original(transforms, local_proc_idx, write_bucket, results_queue, *args, **kwargs)
        if results_queue is None and (found := _note(results)) is not None:
            raise found  # its words are handed on; of what is returned the class alone would be
        return index, results

    return write_preloaded_data


def _note(results: Any) -> OSError | None:
    if isinstance(results, Exception) and (found := disk_error(results)) is not None:
        _written.error = found
        return found
    return None


@dataclass
class _NotingQueue:
    """The results of writers in threads: an error is noted before it is known that there is one."""

    queue: Any

    def put(self, output: tuple[int, Any]) -> None:
        _note(output[1])
        self.queue.put(output)


def _losing_figures(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def write(*args: Any, **kwargs: Any) -> None:
        global _has_lost_figures
        try:
            original(*args, **kwargs)
        except OSError as error:
            if not _has_lost_figures:
                logger.warning("TensorBoard's file cannot be written (%s): figures are lost from here on", error)
            _has_lost_figures = True

    return write


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


_WRITER_PATCH = Patch(
    target="megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data",
    reason="the error that stopped a writer is lost on the way: only its class is handed on",
    replace=lambda original: staticmethod(_noting_errors(original)),
)

_CHECKPOINT_PATCHES = (
    Patch(
        target="megatron.training.training:save_checkpoint",
        reason="what a disk does to a checkpoint ends in a traceback that names neither folder nor remedy",
        replace=_telling_disk_errors,
    ),
    Patch(
        target="megatron.training.training:maybe_finalize_async_save",
        reason="what stopped a writer beside the training is raised here, steps later or at the end",
        replace=_telling_late_disk_errors,
    ),
    _WRITER_PATCH,
)

_TENSORBOARD_PATCHES = tuple(
    Patch(
        target=f"tensorboard.summary.writer.record_writer:RecordWriter.{name}",
        reason="its thread ends in a traceback on a full disk, and then the training step that logs next does",
        replace=_losing_figures,
    )
    for name in ("write", "flush", "close")
)
