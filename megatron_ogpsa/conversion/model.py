"""What a Megatron checkpoint of a model is made of, read off Megatron's own unsharded model without memory.

The model is built on torch's meta device (:mod:`megatron_ogpsa.integration.runtime.fake_world`); its ``sharded_state_dict``
has the checkpoint's keys, shapes and offsets, which are those of any layout. The keys are those of Megatron's own layers;
where Transformer Engine's keep the same tensor under another one, the piece knows that too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ogpsa.conversion.families import Family, Flags
from megatron_ogpsa.sharding.logical import RowPattern, joined_rows, logical_name, row_pattern, split_rows

CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""How tensors are laid out in a checkpoint, as Megatron's training of 0.19 does by default and notes in it
(``_build_sharded_state_dict_metadata`` in training/checkpointing.py)."""

_NORM_OF_LINEAR, _NORM = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
"""Keys of the norm before an MLP: fused into its first linear layer, as Megatron's own layers always call it
(``sharded_state_dict_keys_map`` in core/models/gpt/gpt_layer_specs.py), and by itself."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of a checkpoint's tensor, which one or several whole Hugging Face tensors fill.

    Attributes:
        shard: Megatron's ShardedTensor, without data.
        names: of the Hugging Face tensors, in the pattern's order.
        shapes: of each of them.
        pattern: how their rows lie in the piece.
        layer: counted from zero; None outside the layers.
        other_key: of the same values in models of Transformer Engine's layers; None if that is :attr:`key`.
    """

    shard: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    pattern: RowPattern
    layer: int | None
    other_key: str | None

    @property
    def key(self) -> str:
        """Of the checkpoint's tensor."""
        return str(self.shard.key)

    @property
    def keys(self) -> tuple[str, ...]:
        """All that it may have."""
        return (self.key,) if self.other_key is None else (self.key, self.other_key)

    def under_each_key(self) -> list[Piece]:
        """A piece for each of its keys, for a checkpoint that models of any layers load."""
        return [replace(self, shard=replace(self.shard, key=key), other_key=None) for key in self.keys]

    @property
    def extent(self) -> torch.Size:
        """Its shape within the checkpoint's tensor, whose leading axes count layers and experts."""
        return torch.Size((1,) * self.shard.prepend_axis_num + tuple(self.shard.local_shape))

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shard.local_shape)

    def fused(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The piece, of its Hugging Face tensors."""
        return joined_rows([tensors[name] for name in self.names], self.pattern)

    def split(self, fused: Tensor) -> dict[str, Tensor]:
        """Its Hugging Face tensors."""
        return dict(zip(self.names, split_rows(fused, self.pattern), strict=True))


def arguments_of(flags: Flags) -> argparse.Namespace:
    """Megatron's validated arguments of the model alone, on one rank.

    Raises:
        UserError: Megatron refuses them.
    """
    from megatron_ogpsa.planning.arguments import megatron_arguments

    batch = ["--seq-length", "1", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1"]
    return megatron_arguments([*_command_line(flags), *batch], world_size=1)


def _command_line(flags: Flags) -> list[str]:
    return [
        part for key, value in flags.items() for part in ((f"--{key}",) if value is True else (f"--{key}", str(value)))
    ]


@contextmanager
def unsharded(args: argparse.Namespace, family: Family, content: Mapping[str, Any]) -> Iterator[list[Piece]]:
    """The pieces of a model's checkpoint in the order of its parameters, within Megatron's groups of one rank.

    Args:
        args: of :func:`arguments_of`; the process has called
            :func:`megatron_ogpsa.integration.runtime.cpu.install_on_meta`.
        content: how a checkpoint is laid out, as noted in it; :data:`CONTENT` for a new one.
    """
    from megatron_ogpsa.integration.runtime.cpu import META
    from megatron_ogpsa.integration.runtime.fake_world import build_chunks, fake_world
    from megatron_ogpsa.sharding.names import named_parameters, unwrapped

    with fake_world(args, rank=0):
        from megatron.core import parallel_state

        chunks = build_chunks(args, META)
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        shards = unwrapped(chunks[0]).sharded_state_dict(metadata={**content, **groups})
        yield [
            piece
            for parameter in named_parameters(chunks, trainable_only=False)
            for piece in _pieces(shards[parameter.name], parameter.name, row_pattern(parameter), family)
        ]


def _pieces(shard: Any, name: str, pattern: RowPattern, family: Family) -> Iterator[Piece]:
    """Of one parameter; a factory makes one of each part: gate and up lie apart in checkpoints."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(shard, ShardedTensorFactory):
        for part, (part_name, rows) in zip(shard.build(), pattern.parts, strict=True):
            yield _piece(part, name, RowPattern(((part_name, rows),)), family)
    else:
        yield _piece(shard, name, pattern, family)


def _piece(shard: Any, name: str, pattern: RowPattern, family: Family) -> Piece:
    groups = shard.local_shape[0] // pattern.period
    is_whole = len(pattern.parts) == 1
    return Piece(
        shard=shard.without_data(),
        names=tuple(family.hugging_face_name(logical_name(name, part)) for part, _ in pattern.parts),
        shapes=tuple(
            tuple(shard.local_shape) if is_whole else (groups * rows, *shard.local_shape[1:])
            for _, rows in pattern.parts
        ),
        pattern=pattern,
        layer=int(name.split(".")[2]) if name.startswith("decoder.layers.") else None,
        other_key=_other_key(shard.key, family),
    )


def _other_key(key: str, family: Family) -> str | None:
    """Experts have no linear layer in common, into which Transformer Engine could fuse the norm before them."""
    if family.experts is None or _NORM_OF_LINEAR not in key:
        return None
    return key.replace(_NORM_OF_LINEAR, _NORM)


def dtype_named(name: str) -> torch.dtype:
    """fp32, bf16 or fp16, as Megatron's flags call them."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
