"""Checkpoints in Megatron's training loop: what is loaded was verified first, and what is saved can be.

Megatron loads what its tracker names, ends with exit code 0 if it cannot read the tracker, begins anew if there is none,
and fails in a traceback if a file is damaged. Here the newest checkpoint whose files are what was written is found first,
by all ranks together, and what was passed over is told; so is what it was saved with and is not loaded with.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ogpsa.attributes import attributes_set
from megatron_ogpsa.checkpoints.choice import Examined, choose
from megatron_ogpsa.checkpoints.manifest import damaged_files
from megatron_ogpsa.checkpoints.survey import (
    RELEASE,
    STATE_FILE,
    TRACKER_FILE,
    Saved,
    survey,
    write_tracker,
)
from megatron_ogpsa.console.progress import move_on, progress_bar
from megatron_ogpsa.errors import UserError, one_line, where
from megatron_ogpsa.integration.checkpoints.saved_arguments import told_differences
from megatron_ogpsa.integration.checkpoints.saving import (
    NON_PERSISTENT,
    SAVING_PATCHES,
    folder_of,
)
from megatron_ogpsa.integration.checkpoints.writer_process import WRITER_PATCHES
from megatron_ogpsa.integration.ranks.agreement import agreed, from_rank_0, of_this_rank
from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches
from megatron_ogpsa.system.files import file_error, read_json


def guard_checkpoints() -> None:
    """Verify checkpoints before this process's training loop loads them, and put our state into those it saves."""
    apply_patches((*_PATCHES, *SAVING_PATCHES, *WRITER_PATCHES))


def read_state(args: argparse.Namespace, iteration: int) -> dict[str, Any]:
    """What our state file says in the checkpoint of ``iteration`` that was loaded; empty if it has none.

    Raises:
        UserError: it is there and is not what we write.
    """
    for is_persistent in (True, False):
        path = folder_of(args, iteration, is_persistent, saved_in=args.load) / STATE_FILE
        if path.exists():
            return read_json(path, remedy="restore it, or delete it to resume unchecked")
    return {}


def examine_together(folder: Path, iteration: int | None = None) -> Examined:
    """As :func:`megatron_ogpsa.checkpoints.examine`, each rank reading its share of the files; the same on all ranks.

    Raises:
        UserError: the folder cannot be listed, or what is there cannot be read; on all ranks alike.
    """
    found = from_rank_0(lambda: survey(folder))

    def damages(saved: Saved) -> list[str]:
        manifest = saved.manifest or {}
        share = sorted(manifest)[dist.get_rank() :: dist.get_world_size()]
        is_first = dist.get_rank() == 0
        with progress_bar(f"verifying {folder / saved.name}", len(share), " files", is_shown=is_first) as bar:
            moves = functools.partial(move_on, bar)
            own = agreed(lambda: damaged_files(folder / saved.name, manifest, share, after_file=moves))
        everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, own)
        return [problem for problems in everyones for problem in problems]

    return choose(found, damages, iteration)


def _verified_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(
        ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, load_arg: str = "load", *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        flags = get_args()
        (kind, is_saved), pretrained = _verified_kind(flags, load_arg), flags.pretrained_checkpoint
        if pretrained is not None and not _is_begun(flags, load_arg):
            # Megatron would begin with the pretrained weights, or take what the run has saved for such.
            is_saved = is_saved or _has_local(kind, kwargs.get("checkpointing_context"))
            kind, pretrained = (kind, None) if is_saved else (None, pretrained)
        settings = {
            "ckpt_step": _verified_step(flags, load_arg, kind, pretrained),
            "verify_integrity": False,
            "non_persistent_ckpt_type": kind,
            "pretrained_checkpoint": pretrained,
        }
        if flags.fp8_param_gather:  # of weights alone Megatron would make fp32 main parameters from rounded ones
            settings["load_main_params_from_ckpt"] = True
        # While it loads: they would be saved in checkpoints otherwise.
        changed = attributes_set([(flags, name, value) for name, value in settings.items()])
        with changed, _told_in_one_line(flags, load_arg), told_differences(flags):
            return original(ddp_model, optimizer, opt_param_scheduler, load_arg, *args, **kwargs)

    return load_checkpoint


def _is_begun(args: argparse.Namespace, load_arg: str) -> bool:
    """Whether the run has saved a checkpoint other than non-persistent ones, whole or not; on all ranks alike."""
    given = getattr(args, load_arg)
    if given is None:
        return False
    found = from_rank_0(lambda: survey(Path(given)))
    return found.tracked is not None or found.tracker_problem is not None or bool(found.saved)


def _has_local(kind: str | None, context: dict[str, Any] | None) -> bool:
    """Whether the run has saved a local checkpoint; on all ranks alike."""
    return kind == "local" and context is not None and context["local_checkpoint_manager"].find_latest() != -1


def _non_persistent_folder(args: argparse.Namespace, load_arg: str) -> Path:
    return Path(args.non_persistent_global_ckpt_dir or Path(getattr(args, load_arg)) / NON_PERSISTENT)


def _verified_kind(args: argparse.Namespace, load_arg: str) -> tuple[str | None, bool]:
    """What ``--non-persistent-ckpt-type`` is to be: none, where the one that Megatron prefers to others is not whole.

    Returns:
        That, and whether there is a whole one in a folder.

    Raises:
        UserError: it is not, and there is no other; on all ranks alike.
    """
    kind: str | None = args.non_persistent_ckpt_type
    given = getattr(args, load_arg)
    if kind != "global" or given is None:
        return kind, False
    folder = _non_persistent_folder(args, load_arg)
    examined = examine_together(folder)
    if not examined.problems:
        return kind, examined.chosen is not None
    flag = f"--{load_arg.replace('_', '-')} {given}"
    if examine_together(Path(given), args.ckpt_step).chosen is None:
        raise UserError(f"{flag}: {_joined(examined)}; no checkpoint is left: restore one, or move {folder} away")
    from megatron.training import print_rank_0

    print_rank_0(f"WARNING: {flag}: {_joined(examined)}; going on without {folder}")
    return None, False


def _verified_step(args: argparse.Namespace, load_arg: str, kind: str | None, pretrained: str | None) -> int | None:
    """What ``--ckpt-step`` is to be, so that Megatron loads what was found to be whole.

    Args:
        kind: of non-persistent checkpoints that it may load instead.
        pretrained: what the run begins with, if it has saved nothing.

    Raises:
        UserError: nothing is whole, or what is not may not be replaced by an older one; on all ranks alike.
    """
    given = getattr(args, load_arg)
    if given is not None:
        flag = f"--{load_arg.replace('_', '-')} {given}"
        examined = examine_together(Path(given), args.ckpt_step)
        if examined.chosen is not None:
            return _step_of(examined, args, flag, Path(given), may_be_older=not args.finetune)
        if examined.problems:
            beside = f", all but {_non_persistent_folder(args, load_arg)}," if kind == "global" else ""
            raise UserError(
                f"{flag}: {_joined(examined)}; no checkpoint is left: restore one, or move the folder{beside} away to begin "
                f"{'with what is there' if beside else 'anew'}"
            )
    if pretrained is not None:
        flag = f"--pretrained-checkpoint {pretrained}"
        examined = examine_together(Path(pretrained), args.ckpt_step)
        if examined.chosen is None:
            what = _joined(examined) if examined.problems else "there is no checkpoint"
            raise UserError(f"{flag}: {what}: name a folder with {TRACKER_FILE} and the checkpoint that it names")
        return _step_of(examined, args, flag, Path(pretrained), may_be_older=False)
    step: int | None = args.ckpt_step
    return step


def _step_of(
    examined: Examined, args: argparse.Namespace, flag: str, folder: Path, *, may_be_older: bool
) -> int | None:
    from megatron.training import print_rank_0

    chosen = examined.chosen
    assert chosen is not None
    if not examined.is_verified:
        print_rank_0(f"{folder / chosen.name} has no manifest (it was saved without --verify-integrity): not verified")
    if not examined.problems:
        return chosen.iteration if args.ckpt_step else None
    if not (may_be_older or examined.is_tracked) or chosen.name == RELEASE:
        raise UserError(
            f"{flag}: {_joined(examined)}: restore it, or say --ckpt-step {chosen.iteration} to begin with {chosen.name}"
        )
    print_rank_0(f"WARNING: {flag}: {_joined(examined)}; going on from {chosen.name}")
    agreed(lambda: _mend_tracker(folder, chosen.name, flag) if dist.get_rank() == 0 else None)
    return chosen.iteration


def _mend_tracker(folder: Path, name: str, flag: str) -> None:
    """Megatron reads the tracker even where it is told the step, and must find a number in it."""
    found = survey(folder)
    if found.tracked is not None:
        return
    try:
        write_tracker(folder, name)
    except OSError as error:
        what = f"{flag}: {folder / TRACKER_FILE} cannot be mended ({error.strerror})"
        raise file_error(error, f"{what}: write {name.removeprefix('iter_')} into it") from None


def _joined(examined: Examined) -> str:
    shown = examined.problems[:3]
    more = len(examined.problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


@contextmanager
def _told_in_one_line(args: argparse.Namespace, load_arg: str) -> Iterator[None]:
    """What Megatron finds wrong with a checkpoint is the user's to mend, and never a success."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    flag = f"--{load_arg.replace('_', '-')} {getattr(args, load_arg) or args.pretrained_checkpoint}"
    try:
        yield
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
        why = "--exit-on-missing-checkpoint, and there is none" if args.exit_on_missing_checkpoint else "see above"
        raise UserError(f"{flag}: Megatron has not loaded a checkpoint ({why})") from None
    except Exception as error:
        # A broken connection is another rank's failure, which that rank tells.
        if remedy := _other_schedule(error):
            raise UserError(f"{flag}: {remedy}") from error
        if not isinstance(error, CheckpointingException) and "checkpoint" not in where(error):
            raise
        layout = "; to go on in another layout, save with --dist-ckpt-optim-fully-reshardable"
        remedy = layout if "(TP, PP) mismatch" in one_line(error) else ""
        text = f"{flag}: Megatron cannot load this checkpoint into this run: {one_line(error)}{remedy}"
        told = file_error(error, text)
        raise (of_this_rank(told) if isinstance(error, OSError) else told) from error
    except CheckpointException as error:  # not an Exception to torch
        first = next(iter(error.failures.values()))[0]
        raise file_error(
            first, f"{flag}: torch cannot read this checkpoint: {type(first).__name__}: {first}"
        ) from error


def _other_schedule(error: Exception) -> str:
    """What to do where learning rate or schedule are not those of the checkpoint's run; empty for other errors."""
    text = one_line(error)
    if isinstance(error, AssertionError) and text.startswith("OptimizerParamScheduler: "):
        return (
            f"{text.removeprefix('OptimizerParamScheduler: ').replace('checkpointvalue', 'checkpoint value')}: give what "
            "its run had, or add --override-opt-param-scheduler for the new schedule"
        )
    is_no_group = isinstance(error, KeyError) and error.args and isinstance(error.args[0], tuple)
    if is_no_group or "Could not find parameter group" in text:
        return (
            "--lr, --min-lr or --weight-decay are not what the checkpoint's optimizer had: give those again, or begin anew "
            "from its weights, with --pretrained-checkpoint in place of --load and another --save"
        )
    return ""


_PATCHES = (
    Patch(
        target="megatron.training.training:load_checkpoint",
        reason=(
            "Megatron 0.19 loads what the tracker names without looking, ends with exit code 0 if it cannot read the "
            "tracker, and its --verify-integrity hashes on one rank and knows no older checkpoint to go on from"
        ),
        replace=_verified_first,
    ),
)
