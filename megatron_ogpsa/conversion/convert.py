"""Both directions, each into a folder that is there when it is whole, and not before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ogpsa.checkpoints.survey import TRACKER_FILE
from megatron_ogpsa.console.progress import move_on, progress_bar
from megatron_ogpsa.conversion.chat import carry_chat
from megatron_ogpsa.conversion.checkpoint_reader import Checkpoint, saved_arguments
from megatron_ogpsa.conversion.checkpoint_writer import write_checkpoint
from megatron_ogpsa.conversion.families import Flags, family_of, model_flags
from megatron_ogpsa.conversion.huggingface import (
    CONFIG_FILE,
    Weights,
    carry_files,
    number_of_tokens,
    read_config,
    require_no_adapter,
    require_tensors,
    write_dtype,
)
from megatron_ogpsa.conversion.model import CONTENT, Piece, arguments_of, unsharded
from megatron_ogpsa.conversion.model_file import CARRIED_FOLDER, MODEL_FILE, write_model_file
from megatron_ogpsa.conversion.safetensors_writer import Planned, write_weights
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.disk import disk_error, disk_remedy
from megatron_ogpsa.system.files import file_error, is_there

_MAKE_A_MODEL = (CONFIG_FILE, MODEL_FILE, TRACKER_FILE)
"""Files without which nobody takes a folder for a Hugging Face model, a configuration's ``model``, or a run's checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion came to.

    Attributes:
        flags: Megatron's, of the model.
        notes: what the user is told besides.
    """

    flags: Flags
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()


def to_megatron(source: Path, target: Path, *, dtype: torch.dtype | None = None) -> Converted:
    """From a Hugging Face folder to a Megatron checkpoint that any layout loads.

    Args:
        target: a folder that is not there, or is empty.
        dtype: of all weights; by default each keeps its own.

    Raises:
        UserError: what is wrong with the folder, or with the place to write.
    """
    require_no_adapter(source)
    config = read_config(source)
    flags, family = model_flags(str(source / CONFIG_FILE), config), family_of(str(source / CONFIG_FILE), config)
    weights = Weights(source)
    args = arguments_of(flags)
    with unsharded(args, family, CONTENT) as pieces:
        require_tensors(source, weights, pieces, dtype)
    written = [one for piece in pieces for one in piece.under_each_key()]
    dtypes = {piece.key: dtype or _known(weights.stored[piece.names[0]].dtype) for piece in written}
    num_bytes = sum(piece.numel * dtypes[piece.key].itemsize for piece in written)
    with _written_whole(target, num_bytes) as folder, _progress(num_bytes, "converting") as advance:

        def tensor_of(piece: Piece) -> Tensor:
            value = piece.fused({name: weights[name] for name in piece.names}).to(dtypes[piece.key])
            advance(value.nbytes)
            return value

        carry_files(source, folder / CARRIED_FOLDER)
        write_model_file(folder, flags, source)
        write_checkpoint(folder, written, tensor_of, dtypes, saved_arguments(args))
    return Converted(flags=flags, num_tensors=sum(len(piece.names) for piece in pieces), num_bytes=num_bytes)


def to_hugging_face(
    source: Path,
    target: Path,
    *,
    hugging_face: Path | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    most_bytes: int,
) -> Converted:
    """From a checkpoint of any layout, converted or trained, to a Hugging Face folder.

    Args:
        target: a folder that is not there, or is empty.
        hugging_face: folder with ``config.json`` and tokenizer; by default what the checkpoint carries or was trained with.
        iteration: of the checkpoint; by default what the tracker names.
        dtype: of all weights; by default as they are in the checkpoint.
        most_bytes: of each weights file.

    Raises:
        UserError: what is wrong with the checkpoint, or with the place to write.
    """
    checkpoint = Checkpoint(source, iteration)
    carried = hugging_face or _carried(source, checkpoint)
    config = read_config(carried)
    flags, family = model_flags(str(carried / CONFIG_FILE), config), family_of(str(carried / CONFIG_FILE), config)
    args = arguments_of(flags)
    checkpoint.require_arguments(args)
    with unsharded(args, family, checkpoint.content) as pieces:
        checkpoint.require_model(pieces)
        notes = [f"configuration and tokenizer from {carried}", *_require_rows(args.vocab_size, carried, checkpoint)]
        planned = [
            Planned(name, shape, dtype or checkpoint.dtype_of(piece))
            for piece in pieces
            for name, shape in zip(piece.names, piece.shapes, strict=True)
        ]
        piece_of = {name: piece for piece in pieces for name in piece.names}
        num_bytes = sum(tensor.num_bytes for tensor in planned)
        ready: dict[str, Tensor] = {}

        def tensor_of(name: str) -> Tensor:
            if name not in ready:
                ready.update(piece_of[name].split(checkpoint.read(piece_of[name])))
            value = ready.pop(name)
            return value if dtype is None else value.to(dtype)

        with _written_whole(target, num_bytes) as folder, _progress(num_bytes, "converting") as advance:
            carry_files(carried, folder)
            write_dtype(folder, config, planned[0].dtype)
            notes += carry_chat(carried, folder, checkpoint.arguments)
            write_weights(folder, planned, tensor_of, most_bytes=most_bytes, after_tensor=advance)
    if not checkpoint.is_verified:
        notes.append(f"{checkpoint.path} has no manifest (it was saved without --verify-integrity): not verified")
    return Converted(flags=flags, num_tensors=len(planned), num_bytes=num_bytes, notes=tuple(notes))


def _carried(source: Path, checkpoint: Checkpoint) -> Path:
    """The folder with the model's ``config.json``: the checkpoint's own, or that of the tokenizer it was trained with."""
    tokenizer = getattr(checkpoint.arguments, "tokenizer_model", None)
    for folder in (source / CARRIED_FOLDER, *([Path(tokenizer)] if tokenizer else [])):
        if is_there(folder / CONFIG_FILE):
            return folder
    where = f"its {CARRIED_FOLDER} folder" + (f" or its tokenizer's, {tokenizer}" if tokenizer else "")
    raise UserError(
        f"{source}: there is no {CONFIG_FILE} in {where}: name with --hf the Hugging Face folder that the training began with"
    )


def _require_rows(vocab_size: int, carried: Path, checkpoint: Checkpoint) -> list[str]:
    """That ``config.json`` has a row for each token: what training has added beyond would be cut off with the padding.

    Returns:
        What the user is told, if that cannot be seen.
    """
    if checkpoint.rows_of_embedding <= vocab_size:
        return []
    unseen = []
    trained_with = getattr(checkpoint.arguments, "tokenizer_model", None)
    of_training = [Path(trained_with)] if trained_with else []
    if not of_training:
        unseen.append("the checkpoint does not say which tokenizer it was trained with")
    for folder in dict.fromkeys([carried, *of_training]):
        try:
            number = number_of_tokens(folder)
        except UserError as error:
            unseen.append(str(error))
            continue
        if number is None and folder in of_training:
            unseen.append(f"{folder}, with which it was trained, is no folder with a tokenizer here")
        if number is not None and number > vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has tokens up to {number - 1}, and vocab_size in {carried / CONFIG_FILE} is "
                f"{vocab_size}, so that rows of the embedding would be lost: name with --hf a folder whose "
                f"{CONFIG_FILE} says {number} or more, up to {checkpoint.rows_of_embedding}"
            )
    return [f"rows of the embedding beyond {vocab_size} are taken for padding: {reason}" for reason in unseen]


def _known(dtype: torch.dtype | None) -> torch.dtype:
    assert dtype is not None  # refused by require_tensors
    return dtype


@contextmanager
def _written_whole(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when all is written, and is removed if not.

    A folder that is there is filled instead, from one within: another cannot take the place of a mount point, and not unseen
    that of a shell's own folder.
    """
    try:
        place, partial = _prepared(target, num_bytes)
    except (OSError, RuntimeError) as error:  # a file above it, a folder that may not be searched, a link to itself
        raise _of_disk(target, error) or UserError(
            f"{target}: cannot be made ({getattr(error, 'strerror', None) or error}): name another folder"
        ) from None
    try:
        yield partial
        if partial.parent == place:
            _move_up(partial)
        else:
            partial.replace(place)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _of_disk(target, error) or error from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prepared(target: Path, num_bytes: int) -> tuple[Path, Path]:
    """``target`` without links, and the folder to write into, which is made.

    Raises:
        UserError: something is in ``target``, or its disk is too small.
        OSError, RuntimeError: the file system refuses.
    """
    place = target.resolve()
    partial = place / ".partial" if place.is_dir() else place.with_name(f".{place.name}.partial")
    if place.exists() and not (place.is_dir() and all(path == partial for path in place.iterdir())):
        raise UserError(f"{target}: is not an empty folder: name one that is, or a new one")
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    if free < num_bytes:
        raise UserError(
            f"{target}: takes {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free space there, or name another "
            "folder"
        )
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir()
    return place, partial


def _move_up(folder: Path) -> None:
    """Move what is in a folder into the one around it, last of all what makes that one a model."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name in _MAKE_A_MODEL):
        path.replace(folder.parent / path.name)


def _of_disk(target: Path, error: BaseException) -> UserError | None:
    """What the file system said, in one line, if that is what ``error`` comes from."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    found = disk_error(error)
    if found is None:
        return None
    return file_error(found, f"{target}: cannot be written ({found.strerror}): {disk_remedy(found, 'convert again')}")


@contextmanager
def _progress(num_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
    with progress_bar(what, num_bytes, "B", in_bytes=True) as bar:
        yield partial(move_on, bar)
