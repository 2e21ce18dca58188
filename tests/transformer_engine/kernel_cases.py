"""What a rank runs to compare the emulated kernels with PyTorch, and with what Transformer Engine's Python reads itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from tests.transformer_engine import attention, casting, layers, products
from tests.transformer_engine.enums import DType, NVTE_Mask_Type, NVTE_QKV_Layout


def quantizers() -> dict[str, Any]:
    """One of each format, for E4M3."""
    from transformer_engine.pytorch import (
        Float8BlockQuantizer,
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
        MXFP8Quantizer,
    )

    e4m3 = DType.kFloat8E4M3
    return {
        "delayed": Float8Quantizer(torch.ones(1), torch.zeros(1), e4m3),
        "current": Float8CurrentScalingQuantizer(e4m3, torch.device("cpu")),
        "blockwise 1 x 128": Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=1),
        "blockwise 128 x 128": Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=2),
        "mxfp8": MXFP8Quantizer(e4m3),
    }


def rounding() -> dict[str, dict[str, float]]:
    """Largest error of an element, of what FP8 allows; and between our reading and Transformer Engine's own."""
    torch.manual_seed(0)
    source = torch.randn(3, 64, 256) * torch.logspace(-2, 0, 256)  # columns of very different size
    found = {}
    for name, quantizer in quantizers().items():
        if name == "delayed":
            quantizer.scale.copy_(448 / source.abs().max())
        quantized = quantizer(source)
        rowwise, columnwise = (casting.values(quantized, columnwise=columnwise) for columnwise in (False, True))
        read = rowwise if name == "mxfp8" else quantized.dequantize()  # its reader is a kernel
        found[name] = {
            "rowwise": _error(rowwise, source),
            "columnwise": _error(columnwise, source),
            "read otherwise": float((read - rowwise).abs().max()),
        }
    return found


def _error(values: Tensor, source: Tensor) -> float:
    """E4M3 with a scale that fits is off by 2^-4 of an element, or by a step of the smallest numbers: 2^-9 of 1/448."""
    allowed = source.abs() * 2.0**-4 + source.abs().max() / 448 * 2.0**-9
    return float(((values - source).abs() / allowed).max())


def products_of_matrices() -> float:
    """The three products of a linear layer, of plain matrices: output, and gradients of input and weight."""
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(4, 6, 32), torch.randn(16, 32), torch.randn(4, 6, 16)
    rest = (None, None, None, None, 0, False, None, False, torch.empty(0), 0, False, False)
    worst = 0.0
    for arguments, expected in (
        ((weight, True, x, False), x @ weight.T),
        ((weight, False, gradient, False), gradient @ weight),
        ((x, False, gradient, True), gradient.flatten(0, 1).T @ x.flatten(0, 1)),
    ):
        out, *_ = products.generic_gemm(*arguments, *rest)
        assert out.shape == expected.shape
        worst = max(worst, float((out - expected).abs().max()))
    return worst


def norms() -> float:
    """Forwards and backwards, beside PyTorch's."""
    torch.manual_seed(0)
    x, dy = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
    weight, bias = torch.rand(32, requires_grad=True), torch.rand(32, requires_grad=True)
    worst = 0.0
    expected = rms_norm(x, (32,), weight, eps=1e-5)
    y, _, rsigma = layers.rmsnorm_fwd(x.detach(), weight.detach(), 1e-5, None, None, DType.kFloat32, 0, False)
    gradients = torch.autograd.grad(expected, (x, weight), dy)
    for ours, theirs in zip(
        (y, *layers.rmsnorm_bwd(dy, x.detach(), rsigma, weight.detach(), 0, False)), (expected, *gradients), strict=True
    ):
        worst = max(worst, float((ours - theirs).abs().max()))
    expected = layer_norm(x, (32,), weight, bias, eps=1e-5)
    y, mean, rsigma = layers.layernorm_fwd(
        x.detach(), weight.detach(), bias.detach(), 1e-5, None, None, DType.kFloat32, 0, False
    )
    gradients = torch.autograd.grad(expected, (x, weight, bias), dy)
    for ours, theirs in zip(
        (y, *layers.layernorm_bwd(dy, x.detach(), mean, rsigma, weight.detach(), 0, False)),
        (expected, *gradients),
        strict=True,
    ):
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst


def fused_attention() -> dict[str, float]:
    """Causal attention of two sequences, in each layout, beside PyTorch's of each sequence."""
    torch.manual_seed(0)
    length, heads, groups, size = 10, 4, 2, 8
    q, k, v, gradient = (torch.randn(2, length, h, size) for h in (heads, groups, groups, heads))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    by_head = [t.transpose(1, 2).repeat_interleave(heads // t.shape[2], dim=1) for t in leaves]
    expected = scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)
    of_expected = torch.autograd.grad(expected, leaves, gradient)
    boundaries = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    found = {}
    for form, layout in (
        ("bshd", NVTE_QKV_Layout["NVTE_BSHD_BSHD_BSHD"]),
        ("sbhd", NVTE_QKV_Layout["NVTE_SBHD_SBHD_SBHD"]),
        ("thd", NVTE_QKV_Layout["NVTE_THD_THD_THD"]),
    ):
        mask = NVTE_Mask_Type["NVTE_PADDING_CAUSAL_MASK" if form == "thd" else "NVTE_CAUSAL_MASK"]
        ours = [_laid_out(tensor, form) for tensor in (q, k, v, gradient)]
        before = (length, length)
        after = (boundaries, boundaries, *ours[:3], torch.float32, None, None)
        out, sums, _ = attention.fused_attn_fwd(
            *before, True, size**-0.5, 0.0, False, layout, 0, 0, 0, mask, 0, (-1, -1), False, *after
        )
        backward = attention.fused_attn_bwd(
            *before, size**-0.5, 0.0, False, layout, 0, 0, layout, 0, 0, 0, mask, 0, (-1, -1), False, True,
            *(boundaries, boundaries, *ours[:3], out, ours[3], torch.float32, [sums], None, None),
        )  # fmt: skip
        found[form] = max(
            float((one - _laid_out(other, form)).abs().max())
            for one, other in zip((out, *backward[:3]), (expected, *of_expected), strict=True)
            if one is not None
        )
    return found


def _laid_out(tensor_bshd: Tensor, form: str) -> Tensor:
    if form == "sbhd":
        return tensor_bshd.transpose(0, 1)
    return tensor_bshd.flatten(0, 1) if form == "thd" else tensor_bshd
