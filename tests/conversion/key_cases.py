"""A norm before experts alone, written as a checkpoint under some of its keys, and read by a rank."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ogpsa.conversion.checkpoint_reader import Checkpoint
from megatron_ogpsa.conversion.checkpoint_writer import write_checkpoint
from megatron_ogpsa.conversion.model import Piece
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.sharding.logical import RowPattern

LAYERS, WIDTH = 2, 8
FUSED, ALONE = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"


def norms() -> list[Piece]:
    """Of each layer."""
    from megatron.core.dist_checkpointing import ShardedTensor

    empty = torch.empty(WIDTH, device="meta")
    return [
        Piece(
            shard=ShardedTensor.from_rank_offsets(FUSED, empty, (0, layer, LAYERS), prepend_axis_num=1),
            names=(f"model.layers.{layer}.post_attention_layernorm.weight",),
            shapes=((WIDTH,),),
            pattern=RowPattern((("", WIDTH),)),
            layer=layer,
            other_key=ALONE,
        )
        for layer in range(LAYERS)
    ]


def values(piece: Piece) -> Tensor:
    """What is written of a piece."""
    assert piece.layer is not None
    return torch.arange(WIDTH, dtype=torch.bfloat16) + 100 * piece.layer


def write(folder: Path, *keys: str) -> Checkpoint:
    """A checkpoint of the norms under ``keys``."""
    pieces = [one for norm in norms() for one in norm.under_each_key() if one.key in keys]
    write_checkpoint(folder, pieces, values, dict.fromkeys(keys, torch.bfloat16), Namespace())
    return Checkpoint(folder)


def read(folder: str) -> list[Tensor]:
    """A job: the norm of each layer."""
    checkpoint, pieces = Checkpoint(Path(folder)), norms()
    checkpoint.require_model(pieces)
    return [checkpoint.read(piece).to(checkpoint.dtype_of(piece)) for piece in pieces]


def error(folder: str) -> str:
    """A job: what the user is told of a checkpoint that cannot be read."""
    try:
        read(folder)
    except UserError as told:
        return str(told)
    return ""
