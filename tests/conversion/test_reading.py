"""Which of a checkpoint's chunks a piece is looked for in; what is read, in every layout, is in test_layouts.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from megatron_ogpsa.conversion.checkpoint_reader import Checkpoint, _ChunksOfTensor
from megatron_ogpsa.errors import UserError


def chunk(offsets: tuple[int, ...], *sizes: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


EXPERTS = [
    chunk((layer, expert, 0, column), 1, 1, 8, 4) for layer in range(3) for expert in range(5) for column in (0, 4)
]
"""Of three layers of five, each matrix on two ranks."""


def test_an_expert_is_looked_for_where_it_lies() -> None:
    found = _ChunksOfTensor(EXPERTS).near(chunk((2, 3, 0, 0), 1, 1, 8, 8))
    assert [tuple(one.offsets) for one in found] == [(2, 3, 0, 0), (2, 3, 0, 4)]
    assert _ChunksOfTensor(EXPERTS).near(chunk((3, 0, 0, 0), 1, 1, 8, 8)) == []


def test_a_piece_over_several_of_them_is_looked_for_everywhere() -> None:
    assert _ChunksOfTensor(EXPERTS).near(chunk((0, 3, 0, 0), 2, 1, 8, 8)) == EXPERTS
    rows = [chunk((0, 0), 8, 4), chunk((8, 0), 8, 4)]
    assert _ChunksOfTensor(rows).near(chunk((4, 0), 8, 4)) == rows
    assert _ChunksOfTensor([]).near(chunk((0,), 1)) == []


def test_a_piece_of_which_a_part_was_not_saved_is_not_read() -> None:
    """What is missing would be whatever lay in memory."""
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.path = Path("run/iter_0000001")
    half = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size((8, 4)), [chunk((0, 0), 4, 4)])
    checkpoint._tensors, checkpoint._chunks = {"weight": half}, {"weight": _ChunksOfTensor(half.chunks)}
    piece: Any = SimpleNamespace(
        key="weight", keys=["weight"], extent=(8, 4), shard=SimpleNamespace(global_offset=(0, 0))
    )
    with pytest.raises(UserError, match=r"^run/iter_0000001: weight is not whole: restore it"):
        checkpoint.read(piece)
