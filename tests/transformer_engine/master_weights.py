"""FP8 parameters made from a rank's shard of their fp32 main parameters: scales want every rank's part of a block.

``start`` is where the flat shard begins in the flat parameter of ``rows`` times ``columns`` elements. The largest magnitudes
of what a rank has go into ``amax``, which Transformer Engine's Python reduces over ranks; then each rank rounds its part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.casting import (
    BLOCK,
    MX_BIAS,
    MX_BLOCK,
    largest,
    mx_powers,
    rounded,
    scales_for,
    tiles,
)
from tests.transformer_engine.enums import DType


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """amax = max |tensor|."""
    amax.copy_(tensor.abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop: Tensor,
    tensors: list[list[Tensor]],
    largest_value: float,
    powers_of_two: bool,
    epsilon: float,
) -> None:
    """Lists: largest magnitudes, and the scales and their reciprocals that follow from them."""
    for amax, scale, inverse in zip(*tensors, strict=True):
        scale.copy_(scales_for(amax, largest_value, powers_of_two, epsilon))
        inverse.copy_(1 / scale)


def fp8_block_scaling_compute_partial_amax(
    shard: Tensor, amax: Tensor, rows: int, columns: int, start: int, block: int
) -> None:
    """Of each block of 128 x 128 elements."""
    magnitudes = tiles(_whole(shard, rows, columns, start).abs(), BLOCK).amax(dim=(1, 3))
    amax.zero_()[: magnitudes.shape[0], : magnitudes.shape[1]] = magnitudes


def fp8_block_scaling_partial_cast(
    shard: Tensor, output: Tensor, scale: Tensor, rows: int, columns: int, start: int, block: int, dtype: int
) -> None:
    whole = tiles(_whole(shard, rows, columns, start), BLOCK)
    scaled = whole * scale[: whole.shape[0], None, : whole.shape[2], None]
    bits = rounded(scaled.flatten(0, 1).flatten(1, 2)[:rows, :columns], dtype)
    output.copy_(_part(bits, shard, start).reshape(output.shape))


def mxfp8_scaling_compute_partial_amax(
    shard: Tensor, along_rows: Tensor, along_columns: Tensor, rows: int, columns: int, start: int
) -> None:
    """Of each 32 elements along a row, and along a column."""
    whole = _whole(shard, rows, columns, start).abs()
    for amax, magnitudes in (
        (along_rows, whole.unflatten(1, (-1, MX_BLOCK)).amax(-1)),
        (along_columns, whole.T.unflatten(1, (-1, MX_BLOCK)).amax(-1).T),
    ):
        amax.zero_()[: magnitudes.shape[0], : magnitudes.shape[1]] = magnitudes.to(amax.dtype)


def multi_tensor_compute_scale_inv_e8m0(chunk_size: int, noop: None, tensors: list[list[Tensor]]) -> None:
    """Lists: largest magnitudes, and the biased exponents of the powers of two that they want."""
    for amax, exponent in zip(*tensors, strict=True):
        exponent.copy_((mx_powers(amax.float(), largest(DType.kFloat8E4M3)) + MX_BIAS).to(torch.uint8))


def mxfp8_scaling_partial_cast(
    shard: Tensor,
    by_rows: Tensor,
    by_columns: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    rows: int,
    columns: int,
    start: int,
) -> None:
    whole = _whole(shard, rows, columns, start)
    for output, power in (
        (by_rows, row_scale[:rows, : columns // MX_BLOCK].repeat_interleave(MX_BLOCK, 1)),
        (by_columns, column_scale[: rows // MX_BLOCK, :columns].repeat_interleave(MX_BLOCK, 0)),
    ):
        bits = rounded(torch.ldexp(whole, MX_BIAS - power.int()), DType.kFloat8E4M3)
        output.copy_(_part(bits, shard, start).reshape(output.shape))


def _whole(shard: Tensor, rows: int, columns: int, start: int) -> Tensor:
    """The parameter, zero where other ranks have it."""
    whole = torch.zeros(rows * columns)
    whole[start : start + shard.numel()] = shard.flatten().float()
    return whole.view(rows, columns)


def _part(whole: Tensor, shard: Tensor, start: int) -> Any:
    return whole.flatten()[start : start + shard.numel()]
