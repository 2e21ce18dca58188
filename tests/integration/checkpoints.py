"""What a Megatron checkpoint holds, read without Megatron's own code."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest ``torch_dist`` checkpoint below ``folder``, whatever layout wrote it."""
    reader = _newest(folder)
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def checkpoint_objects(folder: Path) -> dict[str, Any]:
    """Everything else in it: random states, the optimizer's step and settings, schedules, counters, the rerun machine."""
    reader = _newest(folder)
    objects: dict[str, Any] = {
        name: None
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, BytesStorageMetadata)
    }
    dcp.load(objects, storage_reader=reader, no_dist=True)  # unpickled by torch: the checkpoint is the test's own
    return objects


def differences(one: Path, other: Path) -> list[str]:
    """Where the newest checkpoints of two runs are not bitwise the same, beside the flags, which name their folders."""
    found: list[str] = []
    for read in (checkpoint_tensors, checkpoint_objects):
        left, right = (dict(_leaves("", read(folder))) for folder in (one, other))
        assert left
        found += sorted(left.keys() ^ right.keys())
        found += [name for name in left.keys() & right.keys() if not _equal(left[name], right[name])]
    return found


def _newest(folder: Path) -> dcp.FileSystemReader:
    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    return dcp.FileSystemReader(str(folder / f"iter_{iteration:07d}"))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything inside nested mappings and sequences."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}.{index}", item)
    elif not isinstance(value, argparse.Namespace):
        yield prefix, value


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, tuple):  # NumPy's state is one, with an array in it
        return (
            isinstance(right, tuple)
            and len(left) == len(right)
            and all(_equal(a, b) for a, b in zip(left, right, strict=True))
        )
    return bool(left == right)
