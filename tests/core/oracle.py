"""The oracle: one process, no sharding, fp64, on canonical (Hugging Face) tensors; short enough to check by eye.

Shape legend: B = rows, S = positions, D = hidden, H = heads, E = head size, V = vocabulary, N = elements of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama-like model: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    num_layers: int = 4
    hidden: int = 32
    heads: int = 4
    query_groups: int = 2
    ffn: int = 48
    vocabulary: int = 64
    positions: int = 16
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def shapes_of(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of every tensor."""
    kv = shape.query_groups * shape.head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", shape.hidden), ("k", kv), ("v", kv)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, shape.hidden)
            if shape.qkv_bias:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        if shape.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (shape.head_size,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (shape.head_size,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (shape.hidden, shape.hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (shape.ffn, shape.hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (shape.ffn, shape.hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (shape.hidden, shape.ffn)
        shapes[f"{prefix}.input_layernorm.weight"] = (shape.hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (shape.hidden,)
    shapes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return shapes


def random_weights(shape: ModelShape, seed: int) -> Tensors:
    """Weights whose gradients are of one order of magnitude; representable in fp32, returned in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shapes_of(shape).items():
        scale = 0.3 if "norm" in name or name.endswith("bias") else 0.5 * size[-1] ** -0.5
        offset = 1.0 if "norm" in name else 0.0
        weights[name] = (offset + scale * torch.randn(size, generator=generator)).double()
    return weights


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotate(x_BHSE: Tensor) -> Tensor:
    """Rotary positions with base 10000, the halves of the head rotated against each other."""
    half = x_BHSE.shape[-1] // 2
    frequency = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x_BHSE.shape[-2], dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x_BHSE * cos + torch.cat((-x_BHSE[..., half:], x_BHSE[..., :half]), dim=-1) * sin


def attention(shape: ModelShape, weights: Tensors, prefix: str, x_BSD: Tensor) -> Tensor:
    def heads(name: str, num_heads: int) -> Tensor:
        bias = weights.get(f"{prefix}.{name}_proj.bias", torch.zeros((), dtype=x_BSD.dtype))
        flat = x_BSD @ weights[f"{prefix}.{name}_proj.weight"].T + bias
        out = flat.unflatten(-1, (num_heads, shape.head_size)).transpose(1, 2)
        if shape.qk_norm and name in "qk":
            out = rms_norm(out, weights[f"{prefix}.{name}_norm.weight"])
        return out

    q = rotate(heads("q", shape.heads))
    k = rotate(heads("k", shape.query_groups))
    v = heads("v", shape.query_groups)
    k, v = (t.repeat_interleave(shape.heads // shape.query_groups, dim=1) for t in (k, v))
    scores = q @ k.mT / shape.head_size**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    context = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return context.transpose(1, 2).flatten(2) @ weights[f"{prefix}.o_proj.weight"].T


def mean_loss(shape: ModelShape, weights: Tensors, tokens_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Token-weighted mean of the next-token loss."""
    x = weights["model.embed_tokens.weight"][tokens_BS]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"])
        x = x + attention(shape, weights, f"{prefix}.self_attn", normed)
        h = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"])
        gate, up = (h @ weights[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (silu(gate) * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"])
    head = weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    losses = cross_entropy((x @ head.T).flatten(0, 1), labels_BS.flatten(), reduction="none")
    mask = mask_BS.flatten().double()
    return (losses * mask).sum() / mask.sum()


def gradient(shape: ModelShape, weights: Tensors, batch: tuple[Tensor, Tensor, Tensor]) -> Tensors:
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    grads = torch.autograd.grad(mean_loss(shape, leaves, *batch), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def blocks(tensors: Tensors, granularity: str) -> Iterable[list[str]]:
    """Names that are projected together."""
    return [[name] for name in tensors] if granularity == "tensor" else [list(tensors)]


def project(grad: Tensors, references: list[Tensors], granularity: str) -> Tensors:
    """g − A·A⁺·g in each block, by a singular value decomposition of the whole references."""
    result = {}
    for names in blocks(grad, granularity):
        vector_N = torch.cat([grad[name].flatten() for name in names])
        matrix_NK = torch.stack([torch.cat([ref[name].flatten() for name in names]) for ref in references], dim=1)
        left_NK, singular_K, _ = torch.linalg.svd(matrix_NK / matrix_NK.norm(dim=0), full_matrices=False)
        basis_NK = left_NK[:, singular_K > 1e-6 * singular_K[0]]
        projected_N = vector_N - basis_NK @ (basis_NK.T @ vector_N)
        sizes = [grad[name].numel() for name in names]
        for name, part in zip(names, projected_N.split(sizes), strict=True):
            result[name] = part.view_as(grad[name])
    return result


def norm(tensors: Tensors) -> float:
    return float(torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt())


def relative_error(actual: Tensors, expected: Tensors) -> float:
    """‖actual − expected‖/‖expected‖ over the whole model."""
    return norm({name: actual[name].double() - expected[name] for name in expected}) / norm(expected)
