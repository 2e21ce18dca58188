"""Logical tensors inside Megatron's fused parameters.

Megatron stores q, k and v as one parameter and gate and up as another; Hugging Face, and so the authors' per-tensor
rule, stores them apart. A fused parameter is described by a *row pattern*: logical names with numbers of rows,
repeated over dim 0. This table is all that the projection knows about architecture; a parameter that is not in it is
one block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ogpsa.sharding.names import NamedParameter

_QKV = re.compile(r"\.self_attention\.linear_qkv\.(weight|bias)$")
_LATENT_DOWN = re.compile(r"\.self_attention\.linear_qkv_down_proj\.weight$")
_GATE_UP = re.compile(r"\.linear_fc1\.(weight|bias)\d*$")


@dataclass(frozen=True)
class RowPattern:
    """Rows of dim 0 of a local parameter, as a repeating pattern of logical tensors.

    Attributes:
        parts: (logical name, rows) in memory order; the pattern repeats until the parameter ends.
        first_row: where in the pattern the local parameter begins; not zero only where tensor parallelism cuts through
            a query group.
    """

    parts: tuple[tuple[str, int], ...]
    first_row: int = 0

    @property
    def period(self) -> int:
        """Rows after which the pattern repeats."""
        return sum(rows for _, rows in self.parts)


WHOLE = RowPattern(parts=(("", 1),))
"""A parameter that is one logical tensor."""


def row_pattern(parameter: NamedParameter) -> RowPattern:
    """The logical tensors of a parameter.

    * QKV: for each query group the rows of its query heads, then k, then v
      (``core/transformer/attention.py``, ``get_query_key_value_tensors``); an output gate's rows stand behind the query's,
      and are one tensor with them. Tensor parallelism splits the groups, or, with fewer groups than ranks, cuts through
      them.
    * Latent attention's projections down, with ``mla_down_proj_fusion``: each tensor-parallel rank stores its rows of the
      queries', then its rows of the keys' and values' (``core/transformer/multi_latent_attention.py``,
      ``FusedMLASelfAttention``); without it they are parameters of their own.
    * Gated MLP: each tensor-parallel rank stores its rows of gate, then its rows of up (``core/transformer/mlp.py``);
      with ``moe_mlp_glu_interleave_size`` they alternate in chunks of that size.
    """
    config = parameter.config
    if _QKV.search(parameter.name):
        return _qkv_pattern(parameter)
    if _LATENT_DOWN.search(parameter.name):
        rows = parameter.param.shape[0]
        whole = config.q_lora_rank + config.kv_lora_rank + config.qk_pos_emb_head_dim
        query_rows = config.q_lora_rank * rows // whole
        return RowPattern(parts=(("q_down", query_rows), ("kv_down", rows - query_rows)))
    if config.gated_linear_unit and _GATE_UP.search(parameter.name):
        rows = _interleave_size(config, parameter.name) or parameter.param.shape[0] // 2
        return RowPattern(parts=(("gate", rows), ("up", rows)))
    return WHOLE


def logical_name(name: str, part: str) -> str:
    """Of a part of a fused parameter; the parameter's own name where it is one logical tensor."""
    return f"{name}[{part}]" if part else name


def joined_rows(parts: Sequence[Tensor], pattern: RowPattern) -> Tensor:
    """The fused parameter that whole logical tensors, in the pattern's order, make up along dim 0."""
    if len(parts) == 1:
        return parts[0]
    blocks = [part.unflatten(0, (-1, rows)) for part, (_, rows) in zip(parts, pattern.parts, strict=True)]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def split_rows(fused: Tensor, pattern: RowPattern) -> tuple[Tensor, ...]:
    """The logical tensors, in the pattern's order, of a whole fused parameter; undoes :func:`joined_rows`."""
    if len(pattern.parts) == 1:
        return (fused,)
    blocks = fused.unflatten(0, (-1, pattern.period)).split([rows for _, rows in pattern.parts], dim=1)
    return tuple(block.flatten(0, 1) for block in blocks)


def _interleave_size(config: Any, name: str) -> int | None:
    if ".shared_experts." in name:
        return getattr(config, "moe_shared_expert_glu_interleave_size", None)
    if ".experts." in name:
        return getattr(config, "moe_mlp_glu_interleave_size", None)
    return None


def _qkv_pattern(parameter: NamedParameter) -> RowPattern:
    config = parameter.config
    query_rows = config.num_attention_heads // config.num_query_groups * config.kv_channels
    if getattr(config, "attention_output_gate", False):
        query_rows *= 2  # Hugging Face's q_proj has the gate's rows too
    parts = (("q", query_rows), ("k", config.kv_channels), ("v", config.kv_channels))
    first_row = parameter.chunk.tp_group.rank() * parameter.param.shape[0]
    return RowPattern(parts, first_row % sum(rows for _, rows in parts))


def logical_runs(parameter: NamedParameter, start: int, stop: int) -> Iterator[tuple[str, int]]:
    """Runs of one logical tensor within the elements [start, stop) of a flattened local parameter.

    Yields:
        (logical name in the unsharded model, number of elements), in memory order, adding up to ``stop - start``.
    """
    pattern = row_pattern(parameter)
    if pattern is WHOLE:
        yield parameter.name, stop - start
        return
    row_size = parameter.param.numel() // parameter.param.shape[0]
    edges = []  # end of each part within one period, in elements
    end = 0
    for name, rows in pattern.parts:
        end += rows * row_size
        edges.append((end, logical_name(parameter.name, name)))
    position = start
    while position < stop:
        within = (position + pattern.first_row * row_size) % end
        edge, name = next((edge, name) for edge, name in edges if within < edge)
        length = min(edge - within, stop - position)
        yield name, length
        position += length
