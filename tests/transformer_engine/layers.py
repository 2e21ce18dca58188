"""Normalisation, softmax and what else the layers ask of the extension, computed in fp32."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.casting import quantize
from tests.transformer_engine.enums import torch_dtype


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    centered: bool,
) -> tuple[Any, Tensor, Tensor]:
    """y = (x - mean) / std * weight + bias; and mean, 1 / std of each row."""
    rows = x.reshape(-1, x.shape[-1]).float()
    mean = rows.mean(-1)
    rsigma = (rows.var(-1, unbiased=False) + eps).rsqrt()
    y = (rows - mean[:, None]) * rsigma[:, None] * _gain(weight, centered) + bias.float()
    return _delivered(y.reshape(x.shape), out, quantizer, dtype), mean, rsigma


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> tuple[Any, None, Tensor]:
    """y = x / rms * weight; and 1 / rms of each row."""
    rows = x.reshape(-1, x.shape[-1]).float()
    rsigma = (rows.square().mean(-1) + eps).rsqrt()
    y = rows * rsigma[:, None] * _gain(weight, centered)
    return _delivered(y.reshape(x.shape), out, quantizer, dtype), None, rsigma


def layernorm_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dy_rows, rows = (t.reshape(-1, t.shape[-1]).float() for t in (dy, x))
    normal = (rows - mean[:, None]) * rsigma[:, None]
    through = dy_rows * _gain(weight, centered)
    parts = through - through.mean(-1, keepdim=True) - normal * (through * normal).mean(-1, keepdim=True)
    dx = (rsigma[:, None] * parts).reshape(x.shape).to(x.dtype)
    return dx, (dy_rows * normal).sum(0).to(weight.dtype), dy_rows.sum(0).to(weight.dtype)


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    dy_rows, rows = (t.reshape(-1, t.shape[-1]).float() for t in (dy, x))
    normal = rows * rsigma[:, None]
    through = dy_rows * _gain(weight, centered)
    parts = through - normal * (through * normal).mean(-1, keepdim=True)
    dx = (rsigma[:, None] * parts).reshape(x.shape).to(x.dtype)
    return dx, (dy_rows * normal).sum(0).to(weight.dtype)


def _gain(weight: Tensor, centered: bool) -> Tensor:
    return weight.float() + 1 if centered else weight.float()


def _delivered(y: Tensor, out: Any, quantizer: Any, dtype: Any) -> Any:
    y = y.to(torch_dtype(dtype) if isinstance(dtype, int) else dtype)
    if quantizer is not None:
        return quantize(y, quantizer, out)
    return y if out is None else out.copy_(y)


def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``mask`` is true where a key is hidden; a row that sees nothing is zero."""
    hidden = mask.expand(x.shape)
    probabilities = torch.softmax((x.float() * scale).masked_fill(hidden, -10000.0), -1)
    return probabilities.masked_fill(hidden.all(-1, keepdim=True), 0.0).to(x.dtype)


def scaled_upper_triang_masked_softmax_forward(x: Tensor, scale: float) -> Tensor:
    return _causal(x, scale)


def scaled_aligned_causal_masked_softmax_forward(x: Tensor, scale: float) -> Tensor:
    return _causal(x, scale)


def _causal(x: Tensor, scale: float) -> Tensor:
    queries, keys = x.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return torch.softmax((x.float() * scale).masked_fill(hidden, float("-inf")), -1).to(x.dtype)


def softmax_backward(gradient: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """Of all of them: what is hidden has probability zero."""
    g, p = gradient.float(), probabilities.float()
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(gradient.dtype)


def convert_thd_to_bshd(packed: Tensor, boundaries: Tensor, batch: int, length: int) -> Tensor:
    """``[tokens, heads, size]`` of several sequences → ``[batch, length, heads, size]``, filled up with zeros."""
    padded = packed.new_zeros(batch, length, *packed.shape[1:])
    for row, (start, stop) in enumerate(itertools.pairwise(boundaries.tolist())):
        padded[row, : stop - start] = packed[start:stop]
    return padded


def convert_bshd_to_thd(padded: Tensor, boundaries: Tensor, tokens: int) -> Tensor:
    """The way back."""
    packed = padded.new_zeros(tokens, *padded.shape[2:])
    for row, (start, stop) in enumerate(itertools.pairwise(boundaries.tolist())):
        packed[start:stop] = padded[row, : stop - start]
    return packed


def fused_multi_row_padding(rows: Tensor, out: Tensor, lengths: list[int], padded_lengths: list[int]) -> None:
    """Each group of rows, followed by rows of zeros."""
    starts = zip(itertools.accumulate(lengths, initial=0), itertools.accumulate(padded_lengths, initial=0), strict=True)
    out.zero_()
    for (start, padded_start), length in zip(starts, lengths, strict=False):
        out[padded_start : padded_start + length] = rows[start : start + length]


def fused_multi_row_unpadding(padded: Tensor, out: Tensor, padded_lengths: list[int], lengths: list[int]) -> None:
    """Each group without the rows that were added."""
    groups = zip(padded.split(padded_lengths), lengths, strict=True)
    torch.cat([group[:length] for group, length in groups], out=out)
