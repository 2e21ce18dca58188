"""A fingerprint of a sharded model's weights, the same in every layout.

Each element is mixed with its parameter's name into 64 bits, and the results are added up modulo 2⁶⁴. Integer addition
is exact in any order, so it does not matter how the elements are spread over ranks. What it cannot see is a
permutation of elements within one parameter; weights that training has changed are told apart with certainty enough
(2⁻¹²⁸ from two independent sums).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_ogpsa.sharding.names import named_parameters
from megatron_ogpsa.sharding.ownership import is_one_copy

# Odd constants of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

_CHUNK = 2**22
"""Elements that are mixed at once: 32 MiB of integers beside the weights."""


def weights_fingerprint(chunks: Sequence[DistributedDataParallel]) -> str:
    """128 bits as 32 hexadecimal digits; collective over all ranks, which get the same."""
    sums = [0, 0]
    for parameter in named_parameters(chunks, trainable_only=False):
        if is_one_copy(parameter):
            for index in range(2):
                salt = zlib.crc32(f"{index}:{parameter.name}".encode()) * _GOLDEN
                sums[index] += _mixed_sum(_plain(parameter.param), salt)
    total = torch.tensor(
        [_signed(value) for value in sums], dtype=torch.int64, device=next(chunks[0].parameters()).device
    )
    dist.all_reduce(total)
    return "".join(f"{value % 2**64:016x}" for value in total.tolist())


def _plain(param: torch.nn.Parameter) -> Tensor:
    """The values of a parameter; those of ``--fp8-param-gather`` cannot all be flattened as they are."""
    return dequantize_fp8_tensor(param) if is_float8tensor(param) else param.detach()


def _mixed_sum(values: Tensor, salt: int) -> int:
    """Σ mix(bits(x) + salt) modulo 2⁶⁴; values are widened to fp32 first, which is exact for 16-bit types."""
    total = 0
    for part in values.reshape(-1).split(_CHUNK):
        mixed = part.float().view(torch.int32).long() + _signed(salt)
        mixed = (mixed ^ (mixed >> 30)) * _MIX_1
        mixed = (mixed ^ (mixed >> 27)) * _MIX_2
        total += int((mixed ^ (mixed >> 31)).sum())
    return total


def _signed(value: int) -> int:
    """``value`` modulo 2⁶⁴ in the range of int64."""
    return (value + 2**63) % 2**64 - 2**63
