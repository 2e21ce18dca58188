"""A Megatron checkpoint of weights (``torch_dist``, a release), written by torch's own writer a tensor at a time.

::

    latest_checkpointed_iteration.txt    "release": weights without optimizer, schedule and counters
    release/
        .metadata __0_*.distcp           torch's: one file for each layer, and one for what is outside of them
        metadata.json                    Megatron's mark of a finished checkpoint
        integrity.json                   SHA-256 of all of these

Each linear layer and each norm also has an ``_extra_state``, which is Transformer Engine's memory of FP8 scales: there is
none, and it says so, so that models with Transformer Engine's layers load it strictly too. For them the norm before experts
is there a second time, under the key that they know it by.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from megatron_ogpsa.checkpoints.manifest import write_manifest
from megatron_ogpsa.checkpoints.survey import RELEASE, write_tracker
from megatron_ogpsa.conversion.model import CONTENT, Piece

_CHECKPOINT_VERSION = 3.0
"""Of Megatron's order of rows in fused QKV (``fix_query_key_value_ordering`` in training/checkpointing.py)."""

_COMMON = "common_state"


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    tensor_of: Callable[[Piece], Tensor],
    dtypes: Mapping[str, torch.dtype],
    arguments: Namespace,
) -> None:
    """Write a release of all ``pieces`` into ``folder``, with tracker and manifest.

    Args:
        pieces: each under one key.
        tensor_of: the values of a piece; asked once for each, layer by layer.
        dtypes: of each key of the checkpoint.
        arguments: Megatron's, of the model; saved with it.

    Raises:
        OSError: the file system refuses.
        CheckpointException: the same, from within torch's writer.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    common = {"args": arguments, "checkpoint_version": _CHECKPOINT_VERSION, "content_metadata": dict(CONTENT)}
    objects = {_object_key(_COMMON, (1,), (0,)): _serialised(common)}
    nothing = _serialised(None)
    for piece in pieces:
        objects |= dict.fromkeys(_extra_states(piece), nothing)
    release = folder / RELEASE
    planner = _LazyPlanner(pieces, tensor_of, dtypes, objects)
    save({}, storage_writer=_FileForEachLayer(release, planner.layers), planner=planner, no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    write_manifest(release)
    write_tracker(folder, RELEASE)


class _LazyPlanner(DefaultSavePlanner):
    """Tells torch's writer what there will be, and makes each tensor when it is about to be written."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        tensor_of: Callable[[Piece], Tensor],
        dtypes: Mapping[str, torch.dtype],
        objects: Mapping[str, bytes],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {(piece.key, torch.Size(piece.shard.global_offset)): piece for piece in pieces}
        self._tensor_of = tensor_of
        self._dtypes = dtypes
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        byte_items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan([*byte_items, *(self._item(piece) for piece in self._pieces.values())])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[index.fqn])
        assert index.offset is not None
        piece = self._pieces[index.fqn, index.offset]
        return self._tensor_of(piece).reshape(piece.extent)

    def layers(self, item: WriteItem) -> int:
        """Of which layer an item is; those outside layers come before."""
        if item.type == WriteItemType.BYTE_IO:
            return -1
        assert item.index.offset is not None
        layer = self._pieces[item.index.fqn, item.index.offset].layer
        return -1 if layer is None else layer

    def _item(self, piece: Piece) -> WriteItem:
        offset = torch.Size(piece.shard.global_offset)
        return WriteItem(
            index=MetadataIndex(piece.key, offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offset, sizes=piece.extent),
                properties=TensorProperties(dtype=self._dtypes[piece.key]),
                size=torch.Size(piece.shard.global_shape),
            ),
        )


class _FileForEachLayer(FileSystemWriter):
    """torch's writer keeps the last tensor of each key alive until a file is whole; a layer at a time is little."""

    def __init__(self, folder: Path, layer_of: Callable[[WriteItem], int]) -> None:
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)
        self._layer_of = layer_of

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        results: list[Any] = []
        prefix = plan.storage_data.prefix
        for number, (_, items) in enumerate(groupby(sorted(plan.items, key=self._layer_of), key=self._layer_of)):
            storage = type(plan.storage_data)(f"{prefix}{number}_")
            part = SavePlan(list(items), storage_data=storage, planner_data=plan.planner_data)
            results += super().write_data(part, planner).wait()
        finished: Future[list[Any]] = Future()
        finished.set_result(results)
        return finished


def _extra_states(piece: Piece) -> list[str]:
    """Keys of what Transformer Engine's and Megatron's own modules keep beside the parameters of a piece."""
    shard = piece.shard
    if not piece.key.startswith("decoder."):
        return []
    module = piece.key.rpartition(".")[0]
    shape, offset = ((tuple(axes)[: shard.prepend_axis_num]) for axes in (shard.global_shape, shard.global_offset))
    modules = [module]
    if module.endswith(".linear_qkv"):
        modules.append(module.replace(".linear_qkv", ".core_attention"))
    return [_object_key(f"{name}._extra_state", shape or (1,), offset or (0,)) for name in modules]


def _object_key(key: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> str:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return str(ShardedObject(key, None, shape, offset).unique_key)


def _serialised(content: Any) -> bytes:
    """As Megatron serialises the objects of one rank: a list of one."""
    buffer = io.BytesIO()
    torch.save([content], buffer)
    return buffer.getvalue()
