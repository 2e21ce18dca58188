"""Safetensors files written a tensor at a time: what the library holds in memory for a file lies on the disk here.

A file is the header's length (8 bytes, little endian), the header in JSON, and the tensors' bytes in its order
(https://github.com/huggingface/safetensors). Names and shapes are known before the first tensor is, so the header is too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ogpsa.conversion.huggingface import INDEX_FILE, SINGLE_FILE
from megatron_ogpsa.system.files import write_json

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path,
    planned: Sequence[Planned],
    tensor_of: Callable[[str], Tensor],
    *,
    most_bytes: int,
    after_tensor: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write tensors in their order into files of at most ``most_bytes`` (or one tensor), with an index if several.

    Args:
        tensor_of: asked once for each name.
        after_tensor: gets the bytes of each tensor as it has been written.

    Raises:
        OSError: the file system refuses.
    """
    shards = _in_shards(planned, most_bytes)
    files = [
        SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, tensor_of, after_tensor)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes for tensor in planned)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _in_shards(planned: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.num_bytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(
    path: Path, shard: Sequence[Planned], tensor_of: Callable[[str], Tensor], after_tensor: Callable[[int], None]
) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        header = _header(shard)
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in shard:
            value = tensor_of(tensor.name)
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} is {value.dtype} {tuple(value.shape)}, planned was {tensor}")
            file.write(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))
            after_tensor(tensor.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _header(shard: Sequence[Planned]) -> bytes:
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard:
        end = position + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # tensors begin where they can be mapped
