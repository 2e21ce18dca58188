"""What is put into the checkpoints that Megatron saves: our state, and a manifest that all ranks have made together.

Megatron's ``--verify-integrity`` has rank 0 read the whole checkpoint again, on one thread, while all others wait. Here
each rank takes the digests of what it wrote itself, mostly out of its node's page cache: with ``--async-save`` in the
writer's process, beside the training, otherwise right after it wrote. Rank 0 collects them.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ogpsa.checkpoints.manifest import (
    digests_of,
    drop_digests,
    drop_files_of_ranks,
    files_beside,
    files_of_rank,
    keep_digests,
    take_digests,
    write_manifest,
)
from megatron_ogpsa.checkpoints.survey import HAS_MANIFEST, STATE_FILE, checkpoint_folder
from megatron_ogpsa.console.progress import move_on, progress_bar
from megatron_ogpsa.integration.checkpoints.disk import install_writer_errors, noted_error
from megatron_ogpsa.integration.ranks.agreement import agreed
from megatron_ogpsa.integration.runtime.patching import Patch
from megatron_ogpsa.system.files import file_error, write_json

NON_PERSISTENT = "non_persistent"
"""Megatron's folder for checkpoints that follow each other in one place, below that of the others."""

_states: dict[Path, dict[str, Any]] = {}
"""State files that are still to be written, by their checkpoint's folder: asynchronous saves are finished later."""


def announce_state(args: argparse.Namespace, iteration: int, state: dict[str, Any], *, is_persistent: bool) -> None:
    """Have ``state`` written into the checkpoint that is about to be saved, before its manifest; on rank 0.

    Local checkpoints (``--non-persistent-ckpt-type local``) are no folders, and have none.
    """
    if not is_persistent and args.non_persistent_ckpt_type == "local":
        return
    _states[folder_of(args, iteration, is_persistent)] = state | {HAS_MANIFEST: bool(args.verify_integrity)}


def write_state_without_manifest(args: argparse.Namespace, iteration: int, *, is_persistent: bool) -> None:
    """Write the state of a checkpoint that gets no manifest; on rank 0."""
    folder = folder_of(args, iteration, is_persistent)
    if not args.verify_integrity and folder in _states:
        write_json(folder / STATE_FILE, _states.pop(folder))


def folder_of(args: argparse.Namespace, iteration: int, is_persistent: bool, saved_in: str | None = None) -> Path:
    """Where Megatron saves (``save_checkpoint`` in megatron/training/checkpointing.py)."""
    top = Path(saved_in or args.save)
    if not is_persistent:
        top = Path(args.non_persistent_global_ckpt_dir or top / NON_PERSISTENT)
    return checkpoint_folder(top, iteration)


def _with_manifest_of_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if not call.arguments.get("verify_integrity"):
            return original(*args, **kwargs)
        call.arguments["verify_integrity"] = False
        folder, rank = Path(call.arguments["checkpoint_dir"]), dist.get_rank()
        agreed(_told(folder, lambda: _drop_leftovers(folder, rank)))
        request = original(*call.args, **call.kwargs)
        if request is None:
            _write_manifest_together(folder)
            return None
        request.add_finalize_fn(functools.partial(_write_manifest_together, folder))
        if request.async_fn is None:  # this rank has nothing to write
            return request
        return request._replace(async_fn=functools.partial(_write_and_hash, request.async_fn, folder, rank))

    return save


def _drop_leftovers(folder: Path, rank: int) -> None:
    """Of a save that was cut short: digests of files that are now written again, and files that are not.

    Rank 0 would hash those alone, while all others wait, and they would stay in the manifest for ever.
    """
    drop_digests(folder, rank)
    if rank == 0:
        drop_files_of_ranks(folder)


def _write_and_hash(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """In the process that writes this rank's files beside the training.

    It must not end by what it meets: all ranks would wait for its answer.

    Args:
        write: Megatron's ``write_preloaded_data_multithread``.
        args: of it; the last is the queue for its results, or for the error in their place.
    """
    install_writer_errors()
    try:
        write(*args, **kwargs)
    except Exception as error:  # an assertion of Megatron's about one of several threads
        if noted_error() is None:
            traceback.print_exc()
        args[-1].put(RuntimeError(str(noted_error() or error)))
    with suppress(OSError):  # when all meet it is hashed again, and then told
        keep_digests(folder, rank)


def _write_manifest_together(folder: Path) -> None:
    """Write our state and the manifest of a checkpoint whose other files are complete; on all ranks.

    Raises:
        UserError: a file cannot be read or written; on all ranks alike. Worth a restart if it may pass.
    """
    rank = dist.get_rank()
    own = agreed(_told(folder, lambda: take_digests(folder, rank) or _hashed(folder, files_of_rank(folder, rank))))
    everyones: list[dict[str, str]] | None = [{}] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(own, everyones)

    def finish() -> None:
        if everyones is None:
            return
        if folder in _states:
            write_json(folder / STATE_FILE, _states.pop(folder))
        digests = {name: digest for some in everyones for name, digest in some.items()}
        drop_digests(folder)
        write_manifest(folder, digests | _hashed(folder, files_beside(folder, digests)))

    agreed(_told(folder, finish))


def _hashed(folder: Path, names: list[str]) -> dict[str, str]:
    with progress_bar(f"digests of {folder}", len(names), " files", is_shown=dist.get_rank() == 0) as bar:
        return digests_of(folder, names, after_file=functools.partial(move_on, bar))


def _told[T](folder: Path, action: Callable[[], T]) -> Callable[[], T]:
    def run() -> T:
        try:
            return action()
        except OSError as error:
            raise file_error(
                error,
                f"{error.filename or folder}: the checkpoint's manifest cannot be made ({error.strerror}): make room or "
                f"mend the file system, and resume from the checkpoint before; --no-verify-integrity saves without one",
            ) from error

    return run


SAVING_PATCHES = (
    Patch(
        target="megatron.core.dist_checkpointing:save",
        reason=(
            "its manifest (--verify-integrity) is made by one thread of rank 0, which reads the whole checkpoint while all "
            "ranks wait, and is written in place; our state file is to be covered by it too"
        ),
        replace=_with_manifest_of_all_ranks,
    ),
)
