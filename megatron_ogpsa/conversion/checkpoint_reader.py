"""A Megatron checkpoint (``torch_dist``) of any layout, with or without optimizer state, a tensor at a time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import override

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ogpsa.checkpoints import examine
from megatron_ogpsa.checkpoints.survey import TRACKER_FILE, survey
from megatron_ogpsa.conversion.model import CONTENT, Piece
from megatron_ogpsa.errors import UserError, one_line
from megatron_ogpsa.integration.arguments.model import MODEL_ARGUMENTS, UNCONVERTED_ARGUMENTS
from megatron_ogpsa.system.files import file_error, is_there

_REMEDY = "name with --hf the Hugging Face folder that the training began with"
_OF_THE_MODEL = ("decoder.", "embedding.", "output_layer.")


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a run's checkpoints lie there, whole or not.

    Raises:
        UserError: it cannot be told, as where the folder may not be searched.
    """
    return is_there(folder / TRACKER_FILE) or bool(survey(folder).saved)


class Checkpoint:
    """The checkpoint of a folder that was found to be whole."""

    def __init__(self, folder: Path, iteration: int | None = None) -> None:
        """Verify it and read its table of contents.

        Args:
            iteration: this one; by default what the tracker names.

        Raises:
            UserError: it is torn, or there is none.
        """
        from megatron.core.dist_checkpointing import load_common_state_dict

        examined = examine(folder, iteration)
        if examined.chosen is None or not (examined.is_tracked or iteration is not None):
            found = "; ".join(examined.problems[:3]) or "there is no checkpoint"
            saved = [str(one.iteration) for one in survey(folder).saved if one.iteration and one.iteration != iteration]
            there = f"say --ckpt-step {' or '.join(saved[:3])}" if iteration is not None and saved else ""
            newest = f"say --ckpt-step {examined.iteration}" if examined.iteration else "name another folder"
            other = there or newest
            raise UserError(f"{folder}: {found}: restore it, or {other}")
        self.path = folder / examined.chosen.name
        self.is_verified = examined.is_verified
        try:
            common = load_common_state_dict(self.path)
            self._reader = FileSystemReader(self.path)
            metadata = self._reader.read_metadata()
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"{self.path}: not a torch_dist checkpoint ({one_line(_cause(error))}): restore it, or name a folder that "
                "Megatron saved with --ckpt-format torch_dist"
            ) from error
        self.arguments: Namespace | None = common.get("args")
        content = common.get("content_metadata") or CONTENT
        self.content = {key: value for key, value in content.items() if isinstance(value, (bool, str))}
        self._tensors = {
            key: found
            for key, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        if any(key.startswith("decoder.layers.0.") for key in self._tensors):
            # Megatron does so where layers may differ, also if they do not: --moe-layer-freq '([1]*48)'.
            self.content["non_homogeneous_layers"] = True
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._chunks = {key: _ChunksOfTensor(found.chunks) for key, found in self._tensors.items()}

    @property
    def rows_of_embedding(self) -> int:
        """Padding included; 0 if it has no embedding."""
        embedding = self._tensors.get("embedding.word_embeddings.weight")
        return 0 if embedding is None else int(embedding.size[0])

    def dtype_of(self, piece: Piece) -> torch.dtype:
        """As which its tensor is stored."""
        dtype: torch.dtype = self._tensors[self._key_of(piece)].properties.dtype
        return dtype

    def read(self, piece: Piece) -> Tensor:
        """The values of a piece, whatever layout they were saved in.

        Megatron's own reader compares each piece with all that was saved of its tensor, which is that of all layers and
        experts: its time grows with the square of their number.

        Raises:
            UserError: they cannot be read, as in a checkpoint without a manifest of which a file is missing.
        """
        key = self._key_of(piece)
        tensor = torch.empty(tuple(piece.extent), dtype=self.dtype_of(piece))
        wanted = ChunkStorageMetadata(torch.Size(piece.shard.global_offset), tensor.shape)
        near = replace(self._tensors[key], chunks=self._chunks[key].near(wanted))
        items = create_read_items_for_chunk_list(key, near, [wanted])
        if sum(item.lengths.numel() for item in items) != tensor.numel():
            raise UserError(f"{self.path}: {key} is not whole: restore it, or name another checkpoint")
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except Exception as error:  # whatever torch meets in a torn file
            message = f"{self.path}: {key} cannot be read ({one_line(error)}): restore it, or name another checkpoint"
            raise file_error(error, message) from error
        return tensor.reshape(piece.shard.local_shape)

    def require_model(self, pieces: Sequence[Piece]) -> None:
        """That it holds the model that ``pieces`` are of, and no tensors beside.

        Raises:
            UserError: naming the first tensor that is missing, misshaped or too many.
        """
        for piece in pieces:
            key = self._key_of(piece)
            if key not in self._tensors:
                raise UserError(f"{self.path}: the tensor {key} is missing: {_REMEDY}")
            found, expected = tuple(self._tensors[key].size), tuple(piece.shard.global_shape)
            is_padded = piece.shard.allow_shape_mismatch and found[0] >= expected[0] and found[1:] == expected[1:]
            if found != expected and not is_padded:
                raise UserError(
                    f"{self.path}: {key} is {list(found)}, config.json makes it {list(expected)}: {_REMEDY}"
                )
        known = {key for piece in pieces for key in piece.keys}
        for key in self._tensors:
            if key.startswith(_OF_THE_MODEL) and key not in known:
                raise UserError(f"{self.path}: the tensor {key} is not part of the model of config.json: {_REMEDY}")

    def _key_of(self, piece: Piece) -> str:
        """The first of its keys that is there; the first of all if none is."""
        return next((key for key in piece.keys if key in self._tensors), piece.key)

    def require_arguments(self, expected: Namespace) -> None:
        """That training computed with the model that ``config.json`` describes, as far as its saved arguments tell.

        Raises:
            UserError: naming the first one that differs.
        """
        for name in (*MODEL_ARGUMENTS, *UNCONVERTED_ARGUMENTS):
            trained = getattr(self.arguments, name, getattr(expected, name))
            if trained != getattr(expected, name):
                raise UserError(
                    f"{self.path}: trained with --{name.replace('_', '-')} {trained}, config.json means "
                    f"{getattr(expected, name)}: {_REMEDY}"
                )


class _ChunksOfTensor:
    """What was saved of one tensor, found by its place along the axes on which each chunk has one index: layers, experts."""

    def __init__(self, chunks: Sequence[ChunkStorageMetadata]) -> None:
        self._all = list(chunks)
        axes = range(len(self._all[0].sizes) if self._all else 0)
        self._single = [axis for axis in axes if all(chunk.sizes[axis] == 1 for chunk in self._all)]
        self._at: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in self._all:
            self._at.setdefault(self._place(chunk), []).append(chunk)

    def near(self, wanted: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
        """All that ``wanted`` may overlap."""
        if all(wanted.sizes[axis] == 1 for axis in self._single):
            return self._at.get(self._place(wanted), [])
        return self._all

    def _place(self, chunk: ChunkStorageMetadata) -> tuple[int, ...]:
        return tuple(chunk.offsets[axis] for axis in self._single)


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    @override
    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._tensor


def _cause(error: BaseException) -> BaseException:
    """What stopped torch, whose own exception is not an Exception and quotes a traceback; Ctrl-C is let through."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if not isinstance(error, Exception):
        raise error from None
    return error


def saved_arguments(args: Namespace) -> Namespace:
    """What a converted checkpoint says of itself: the model, and that there is no state of a training run."""
    model = {name: getattr(args, name) for name in (*MODEL_ARGUMENTS, *UNCONVERTED_ARGUMENTS)}
    return Namespace(
        **model,
        add_position_embedding=args.add_position_embedding,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
