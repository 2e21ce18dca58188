"""The oracle: one process, no sharding, fp64, on canonical (Hugging Face) tensors; short enough to check by eye.

Shape legend: B = rows, S = positions, D = hidden, H = heads, E = head size, V = vocabulary, X = experts,
K = experts of a token or references, N = elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

Tensors = dict[str, Tensor]
Remove = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama-like model: RMSNorm, rotary positions, grouped-query attention, SwiGLU; with experts like Qwen's.

    Attributes:
        vocabulary: rows of the embedding, of which the last ``padding`` belong to no token.
        linear_bias: every linear layer but the head has a bias, and so has the router.
        experts: routed experts of each layer from ``dense_layers`` on; each token goes to ``top_k`` of them.
        shared_ffn: width of the expert that every token goes to, weighted by a gate with ``shared_gate``.
        routing_bias: scores by sigmoid; a bias that is no parameter takes part in the choice of experts.
        sinks: each head's attention may also go to nothing, by a learnt score.
        latent: attention like DeepSeek's: queries, and keys with values, go through vectors of ``q_rank`` and ``kv_rank``
            numbers, and positions through ``rotary_size`` further ones of each head, whose keys all heads share.
    """

    num_layers: int = 4
    hidden: int = 32
    heads: int = 4
    query_groups: int = 2
    ffn: int = 48
    vocabulary: int = 64
    positions: int = 16
    tied: bool = False
    padding: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    linear_bias: bool = False
    experts: int = 0
    dense_layers: int = 0
    top_k: int = 2
    expert_ffn: int = 20
    shared_ffn: int = 0
    shared_gate: bool = False
    routing_bias: bool = False
    sinks: bool = False
    latent: bool = False
    q_rank: int = 12
    kv_rank: int = 10
    rotary_size: int = 4

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def shapes_of(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of every tensor."""
    kv = shape.query_groups * shape.head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        if shape.latent:
            shapes |= latent_shapes(shape, f"{prefix}.self_attn")
        else:
            bias = shape.qkv_bias or shape.linear_bias
            for name, rows in (("q", shape.hidden), ("k", kv), ("v", kv)):
                shapes |= linear(f"{prefix}.self_attn.{name}_proj", rows, shape.hidden, bias)
        if shape.qk_norm and not shape.latent:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (shape.head_size,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (shape.head_size,)
        if shape.sinks:
            shapes[f"{prefix}.self_attn.sinks"] = (shape.heads,)
        shapes |= linear(f"{prefix}.self_attn.o_proj", shape.hidden, shape.hidden, shape.linear_bias)
        widths = {"mlp": shape.ffn}
        if layer >= shape.dense_layers and shape.experts:
            shapes |= linear(f"{prefix}.mlp.gate", shape.experts, shape.hidden, shape.linear_bias)
            widths = {f"mlp.experts.{expert}": shape.expert_ffn for expert in range(shape.experts)}
            widths |= {"mlp.shared_expert": shape.shared_ffn} if shape.shared_ffn else {}
            if shape.shared_gate:
                shapes[f"{prefix}.mlp.shared_expert_gate.weight"] = (1, shape.hidden)
        for mlp, ffn in widths.items():
            shapes |= linear(f"{prefix}.{mlp}.gate_proj", ffn, shape.hidden, shape.linear_bias)
            shapes |= linear(f"{prefix}.{mlp}.up_proj", ffn, shape.hidden, shape.linear_bias)
            shapes |= linear(f"{prefix}.{mlp}.down_proj", shape.hidden, ffn, shape.linear_bias)
        shapes[f"{prefix}.input_layernorm.weight"] = (shape.hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (shape.hidden,)
    shapes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return shapes


def latent_shapes(shape: ModelShape, prefix: str) -> dict[str, tuple[int, ...]]:
    """Of the projections down to latent vectors, their norms, and the projections up to heads."""
    down, up = shape.q_rank, shape.heads * (shape.head_size + shape.rotary_size)
    return {
        f"{prefix}.q_a_proj.weight": (down, shape.hidden),
        f"{prefix}.q_a_layernorm.weight": (down,),
        f"{prefix}.q_b_proj.weight": (up, down),
        f"{prefix}.kv_a_proj_with_mqa.weight": (shape.kv_rank + shape.rotary_size, shape.hidden),
        f"{prefix}.kv_a_layernorm.weight": (shape.kv_rank,),
        f"{prefix}.kv_b_proj.weight": (shape.heads * 2 * shape.head_size, shape.kv_rank),
    }


def random_weights(shape: ModelShape, seed: int) -> Tensors:
    """Weights whose gradients are of one order of magnitude; representable in fp32, returned in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shapes_of(shape).items():
        scale = 0.3 if "norm" in name or name.endswith(("bias", "sinks")) else 0.5 * size[-1] ** -0.5
        scale *= 4.0 if name.endswith("mlp.gate.weight") else 1.0  # decisive routing
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


def apply_linear(weights: Tensors, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))


def attention(shape: ModelShape, weights: Tensors, prefix: str, x_BSD: Tensor) -> Tensor:
    q, k, v = (latent_heads if shape.latent else grouped_heads)(shape, weights, prefix, x_BSD)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    if shape.sinks:
        sink = weights[f"{prefix}.sinks"][:, None, None].expand(*scores.shape[:-1], 1)
        scores, v = torch.cat((scores, sink), dim=-1), torch.cat((v, torch.zeros_like(v[:, :, :1])), dim=2)
    context = scores.softmax(-1) @ v
    return apply_linear(weights, f"{prefix}.o_proj", context.transpose(1, 2).flatten(2))


def grouped_heads(shape: ModelShape, weights: Tensors, prefix: str, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, H, S, E] each."""

    def heads(name: str, num_heads: int) -> Tensor:
        flat = apply_linear(weights, f"{prefix}.{name}_proj", x_BSD)
        out = flat.unflatten(-1, (num_heads, shape.head_size)).transpose(1, 2)
        if shape.qk_norm and name in "qk":
            out = rms_norm(out, weights[f"{prefix}.{name}_norm.weight"])
        return out

    q = rotate(heads("q", shape.heads))
    k = rotate(heads("k", shape.query_groups))
    v = heads("v", shape.query_groups)
    k, v = (t.repeat_interleave(shape.heads // shape.query_groups, dim=1) for t in (k, v))
    return q, k, v


def latent_heads(shape: ModelShape, weights: Tensors, prefix: str, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of multi-head latent attention; queries and keys have their rotary part behind the other."""

    def up(latent: Tensor, name: str, *sizes: int) -> tuple[Tensor, ...]:
        normed = rms_norm(latent, weights[f"{prefix}.{name}_a_layernorm.weight"])
        flat = apply_linear(weights, f"{prefix}.{name}_b_proj", normed)
        return flat.unflatten(-1, (shape.heads, sum(sizes))).transpose(1, 2).split(sizes, dim=-1)

    def rotate_pairs(x_BHSE: Tensor) -> Tensor:
        return rotate(torch.cat((x_BHSE[..., ::2], x_BHSE[..., 1::2]), dim=-1))

    compressed = apply_linear(weights, f"{prefix}.kv_a_proj_with_mqa", x_BSD)
    latent_kv, shared_BSE = compressed.split((shape.kv_rank, shape.rotary_size), dim=-1)
    q, rotary_q = up(apply_linear(weights, f"{prefix}.q_a_proj", x_BSD), "q", shape.head_size, shape.rotary_size)
    k, v = up(latent_kv, "kv", shape.head_size, shape.head_size)
    rotary_k = rotate_pairs(shared_BSE[:, None]).expand_as(rotary_q)
    return torch.cat((q, rotate_pairs(rotary_q)), dim=-1), torch.cat((k, rotary_k), dim=-1), v


def gated_mlp(weights: Tensors, prefix: str, x: Tensor) -> Tensor:
    gate, up = (apply_linear(weights, f"{prefix}.{name}_proj", x) for name in ("gate", "up"))
    return apply_linear(weights, f"{prefix}.down_proj", silu(gate) * up)


def routing_bias(shape: ModelShape) -> Tensor:
    """What is added to the scores of the experts when some are chosen, and not when they are weighted."""
    return torch.linspace(0.2, -0.2, shape.experts)


def mixture_of_experts(shape: ModelShape, weights: Tensors, prefix: str, x_BSD: Tensor) -> Tensor:
    """Σ_e p_e·expert_e(x) over each token's top experts, p normalised over them, and the shared expert."""
    logits_BSX = apply_linear(weights, f"{prefix}.gate", x_BSD)
    choice_BSX = logits_BSX.sigmoid() + routing_bias(shape).double() if shape.routing_bias else logits_BSX
    ranked = choice_BSX.sort(dim=-1, descending=True)
    margin = (ranked.values[..., shape.top_k - 1] - ranked.values[..., shape.top_k]).min()
    assert margin > 1e-5, f"fp32 might choose other experts: the closest scores differ by {margin:.1e}"
    top_BSK = ranked.indices[..., : shape.top_k]
    if shape.routing_bias:
        scores_BSK = logits_BSX.sigmoid().gather(-1, top_BSK)
        weights_BSK = scores_BSK / scores_BSK.sum(-1, keepdim=True)
    else:
        weights_BSK = logits_BSX.gather(-1, top_BSK).softmax(-1)
    share_BSX = torch.zeros_like(logits_BSX).scatter(-1, top_BSK, weights_BSK)
    experts = [gated_mlp(weights, f"{prefix}.experts.{expert}", x_BSD) for expert in range(shape.experts)]
    result = sum(share_BSX[..., [expert]] * output for expert, output in enumerate(experts))
    assert isinstance(result, Tensor)
    if shape.shared_ffn:
        shared = gated_mlp(weights, f"{prefix}.shared_expert", x_BSD)
        if shape.shared_gate:
            shared = shared * apply_linear(weights, f"{prefix}.shared_expert_gate", x_BSD).sigmoid()
        result = result + shared
    return result


def mean_loss(shape: ModelShape, weights: Tensors, tokens_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Token-weighted mean of the next-token loss."""
    mask = mask_BS.double()
    return (token_losses(shape, weights, tokens_BS, labels_BS) * mask).sum() / mask.sum()


def token_losses(shape: ModelShape, weights: Tensors, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """−log p(label) at each position, [B, S]."""
    x = weights["model.embed_tokens.weight"][tokens_BS]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"])
        x = x + attention(shape, weights, f"{prefix}.self_attn", normed)
        h = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"])
        if layer >= shape.dense_layers and shape.experts:
            x = x + mixture_of_experts(shape, weights, f"{prefix}.mlp", h)
        else:
            x = x + gated_mlp(weights, f"{prefix}.mlp", h)
    x = rms_norm(x, weights["model.norm.weight"])
    head = weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    losses = cross_entropy((x @ head.T).flatten(0, 1), labels_BS.flatten(), reduction="none")
    return losses.view(labels_BS.shape)


def gradient(
    shape: ModelShape, weights: Tensors, batch: tuple[Tensor, Tensor, Tensor], trained: list[str] | None = None
) -> Tensors:
    """Of the mean loss, for the tensors named ``trained``, by default all."""
    return gradient_of(lambda weights: mean_loss(shape, weights, *batch), weights, trained)


def gradient_of(loss: Callable[[Tensors], Tensor], weights: Tensors, trained: list[str] | None = None) -> Tensors:
    """Of any loss of the weights."""
    leaves = {name: weights[name].clone().requires_grad_() for name in (weights if trained is None else trained)}
    grads = torch.autograd.grad(loss(weights | leaves), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def blocks(tensors: Tensors, granularity: str) -> Iterable[list[str]]:
    """Names that are projected together."""
    return [[name] for name in tensors] if granularity == "tensor" else [list(tensors)]


def project(grad: Tensors, references: list[Tensors], granularity: str, remove: Remove | None = None) -> Tensors:
    """g − A·A⁺·g in each block, by a singular value decomposition of the whole references.

    Args:
        remove: what is taken out of a block's gradient instead, such as :func:`conflict`.
    """
    result = {}
    for names in blocks(grad, granularity):
        vector_N = torch.cat([grad[name].flatten() for name in names])
        projected_N = vector_N - (remove or component)(unit_references(references, names), vector_N)
        sizes = [grad[name].numel() for name in names]
        for name, part in zip(names, projected_N.split(sizes), strict=True):
            result[name] = part.view_as(grad[name])
    return result


def unit_references(references: list[Tensors], names: list[str]) -> Tensor:
    """A block's references as columns of length one; without those that are zero, as for an expert without tokens."""
    matrix_NK = torch.stack([torch.cat([ref[name].flatten() for name in names]) for ref in references], dim=1)
    length_K = matrix_NK.norm(dim=0)
    return matrix_NK[:, length_K > 0] / length_K[length_K > 0]


def span(unit_NK: Tensor) -> Tensor:
    """An orthonormal basis; singular values below 1e-6 of the largest are dropped."""
    if not unit_NK.shape[1]:
        return unit_NK
    left_NK, singular_K, _ = torch.linalg.svd(unit_NK, full_matrices=False)
    return left_NK[:, singular_K > 1e-6 * singular_K[0]]


def leading(unit_NK: Tensor, energy: float) -> Tensor:
    """The first left singular vectors with which every unit reference keeps such a share of its square."""
    basis_NK = span(unit_NK)
    held_KJ = (basis_NK.T @ unit_NK).square().cumsum(dim=0)
    is_enough_K = (held_KJ >= energy).all(dim=1)
    return basis_NK[:, : int(is_enough_K.long().argmax()) + 1] if is_enough_K.any() else basis_NK


def component(unit_NK: Tensor, vector_N: Tensor) -> Tensor:
    """The part of a vector in the span of unit vectors."""
    basis_NK = span(unit_NK)
    return basis_NK @ (basis_NK.T @ vector_N)


def conflict(unit_NK: Tensor, vector_N: Tensor) -> Tensor:
    """g − g', g' the nearest vector to g with ⟨g', a⟩ ≥ 0 for every reference a.

    The solution is orthogonal to some of the references, and is g without its component in their span. So: try every
    subset, and of all results that are feasible take the nearest. (The product looks at multipliers instead.)
    """
    basis_NK = span(unit_NK)  # all of it happens in the span: work with few coordinates
    unit_KK, vector_K = basis_NK.T @ unit_NK, basis_NK.T @ vector_N
    best_K, best_distance = torch.zeros_like(vector_K), torch.inf
    for subset in range(2 ** unit_KK.shape[1]):
        removed_K = component(unit_KK[:, [bool(subset >> j & 1) for j in range(unit_KK.shape[1])]], vector_K)
        slack_K = unit_KK.T @ (vector_K - removed_K)
        if (slack_K >= -1e-10 * vector_N.norm()).all() and removed_K.norm() < best_distance:
            best_K, best_distance = removed_K, float(removed_K.norm())
    return basis_NK @ best_K


def leak(grad: Tensors, references: list[Tensors], granularity: str) -> float:
    """Largest |⟨g', u⟩|/‖g'‖ over the blocks' basis vectors u, g' being the whole gradient."""
    parts = [
        span(unit_references(references, names)).T @ torch.cat([grad[name].flatten() for name in names])
        for names in blocks(grad, granularity)
    ]
    return float(torch.cat(parts).abs().max()) / norm(grad)


def worst_slack(grad: Tensors, references: list[Tensors], granularity: str) -> float:
    """Smallest ⟨g', a⟩/(‖a‖·‖g'‖) over blocks and references a; below zero, a reference is hurt."""
    parts = [
        unit_references(references, names).T @ torch.cat([grad[name].flatten() for name in names])
        for names in blocks(grad, granularity)
    ]
    return float(torch.cat(parts).min()) / norm(grad)


def norm(tensors: Tensors) -> float:
    return float(torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt())


def relative_error(actual: Tensors, expected: Tensors) -> float:
    """‖actual − expected‖/‖expected‖ over the whole model."""
    return norm({name: actual[name].double() - expected[name] for name in expected}) / norm(expected)
