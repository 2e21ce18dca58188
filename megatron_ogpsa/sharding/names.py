"""The name of each local parameter in the unsharded model.

Every pipeline stage counts its layers from zero, every expert-parallel rank its experts. Blocks must have the same name
on each rank that holds a piece of them, so both numbers are made global. Tied embeddings are one tensor with two names
(first and last stage); the name of the first stage stands for both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from torch import nn

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")
_SEQUENTIAL_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(\.)")
_GROUPED_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")
_OUTPUT_WEIGHT = "output_layer.weight"
_EMBEDDING_WEIGHT = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class NamedParameter:
    """A local parameter (or shard of one, under tensor or expert parallelism).

    Attributes:
        name: its name in the unsharded model, layers and experts counted globally.
        param: the model parameter, whose ``main_grad`` is the reduced gradient.
        chunk: the model chunk that it belongs to, wrapped for data parallelism.
        config: of the innermost module that holds it and has one: layers of a heterogeneous model have their own.
    """

    name: str
    param: nn.Parameter
    chunk: DistributedDataParallel
    config: Any


def unwrapped(chunk: nn.Module) -> Any:
    """The model inside Megatron's data-parallel and 16-bit wrappers."""
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


def named_parameters(
    chunks: Sequence[DistributedDataParallel], *, trainable_only: bool = True
) -> Iterator[NamedParameter]:
    """Parameters of this rank's model chunks, in the chunks' order; by default those that are trained."""
    for chunk in chunks:
        module: nn.Module = unwrapped(chunk)
        num_experts = getattr(unwrapped(chunk).config, "num_moe_experts", None) or 0
        layer_prefixes = _global_layer_prefixes(module)
        for local_name, param in module.named_parameters():
            if param.requires_grad or not trainable_only:
                name = _with_global_layer(local_name, layer_prefixes)
                name = _with_global_expert(name, num_experts, chunk)
                yield NamedParameter(_with_tied_embedding(name, param), param, chunk, _config_of(module, local_name))


def _config_of(module: Any, local_name: str) -> Any:
    config = module.config
    *path, _ = local_name.split(".")
    for part in path:
        module = getattr(module, part)
        config = getattr(module, "config", config)
    return config


def _global_layer_prefixes(module: nn.Module) -> dict[str, str]:
    """``decoder.layers.0`` → ``decoder.layers.12`` from the ``layer_number`` (one-based, global) of each layer."""
    prefixes = {}
    for prefix, submodule in module.named_modules():
        if (match := _LAYER.search(prefix)) and isinstance(getattr(submodule, "layer_number", None), int):
            prefixes[prefix] = f"{prefix[: match.start(1)]}{submodule.layer_number - 1}"
    return prefixes


def _with_global_layer(name: str, prefixes: dict[str, str]) -> str:
    for local, global_ in prefixes.items():
        if name.startswith(local + "."):
            return global_ + name[len(local) :]
    return name


def _with_global_expert(name: str, num_experts: int, chunk: DistributedDataParallel) -> str:
    ep_axis_size = chunk.ep_group.size() if chunk.ep_group is not None else 1
    if ep_axis_size == 1 or not (match := _SEQUENTIAL_EXPERT.search(name) or _GROUPED_EXPERT.search(name)):
        return name
    num_local_experts = num_experts // ep_axis_size
    expert = int(match.group(2)) + chunk.ep_group.rank() * num_local_experts
    return f"{name[: match.start(2)]}{expert}{name[match.end(2) :]}"


def _with_tied_embedding(name: str, param: torch.Tensor) -> str:
    # Megatron marks both copies `shared_embedding` and the one on the last stage also `shared`
    # (core/models/common/language_module/language_module.py).
    if name == _OUTPUT_WEIGHT and getattr(param, "shared_embedding", False):
        return _EMBEDDING_WEIGHT
    return name
