"""What a Megatron checkpoint holds, read without Megatron."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest ``torch_dist`` checkpoint below ``folder``, whatever layout wrote it."""
    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    reader = dcp.FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
