"""What the ranks run to compare with the oracle; each function is a job of the harness and returns plain numbers."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.projection.segments import gram_and_dots
from tests.core import oracle
from tests.core.comparison import on_first_rank
from tests.core.gradients import kept, plant, projected_gradient, put_back, reduced_gradient
from tests.core.layouts import ALL_LAYOUTS, RANDOM, ROWS, Layout
from tests.core.megatron_model import Batch, Training, build

REFERENCES = ("math", "chat", "code")
SAFETY_SEED = 100


def batch_of(shape: oracle.ModelShape, seed: int) -> Batch:
    """Random rows, half of them common to all seeds so that gradients overlap and the projection removes much.

    Rows have random numbers of supervised tokens, so that micro-batches weigh differently.
    """

    def rows(row_seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(row_seed)
        tokens = torch.randint(
            0, shape.vocabulary - shape.padding, (ROWS // 2, shape.positions + 1), generator=generator
        )
        mask = (torch.rand(ROWS // 2, shape.positions, generator=generator) < 0.6).float()
        mask[:, 0] = 1.0
        return tokens, mask

    (common, common_mask), (own, own_mask) = rows(0), rows(seed + 1)
    tokens, mask = torch.cat((common, own)), torch.cat((common_mask, own_mask))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask


def refresh(training: Training, ogpsa: Any, batches: dict[str, Batch]) -> bool:
    ogpsa.begin_refresh()
    for name, batch in batches.items():
        training.gradient(batch)
        ogpsa.capture(name)
    return bool(ogpsa.finish_refresh())


def refresh_kept(training: Training, ogpsa: Any, passes: list[list[Tensor]]) -> None:
    """A refresh with the gradients of passes that have been made."""
    ogpsa.begin_refresh()
    for name, gradient in zip(REFERENCES, passes, strict=True):
        put_back(training, gradient)
        ogpsa.capture(name)
    ogpsa.finish_refresh()


def refresh_planted(training: Training, ogpsa: Any, references: list[oracle.Tensors], scale: float = 1.0) -> None:
    """A refresh whose gradients do not come from passes; ``scale``: the loss scale."""
    ogpsa.begin_refresh()
    for index, reference in enumerate(references):
        plant(training, reference, scale)
        ogpsa.capture(f"reference {index}")
    ogpsa.finish_refresh()


@functools.cache
def expectation(model: tuple[tuple[str, Any], ...], frozen: str | None) -> tuple[oracle.Tensors, list[oracle.Tensors]]:
    """The unsharded gradient of the safety batch and those of the references; many layouts have the same model."""
    shape = oracle.ModelShape(**dict(model))
    weights = oracle.random_weights(shape, seed=1)
    trained = [name for name in weights if not Layout(frozen=frozen).is_frozen(name)]
    safety, *references = (
        oracle.gradient(shape, weights, batch_of(shape, seed), trained)
        for seed in (SAFETY_SEED, *range(len(REFERENCES)))
    )
    return safety, references


def parity(layout: str) -> dict[str, dict[str, float]]:
    """The projected gradient of one step in ``layout`` against one unsharded fp64 process, in both granularities."""
    sharding = ALL_LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    training = build(sharding, oracle.random_weights(shape, seed=1), clip_grad=0.0)
    passes = []
    for seed in (*range(len(REFERENCES)), SAFETY_SEED):
        training.gradient(batch_of(shape, seed))
        passes.append(kept(training))
    results = {}
    for granularity in ("tensor", "model"):
        config = OGPSAConfig(space="gradient", mode="orthogonal", granularity=granularity, check_leak=True)  # type: ignore[arg-type]
        ogpsa = attach(training.optimizer, training.chunks, config)
        refresh_kept(training, ogpsa, passes[:-1])
        put_back(training, passes[-1])
        actual, (_, grad_norm, _) = projected_gradient(training)
        compared = functools.partial(_compared, layout, granularity, actual, float(grad_norm))
        results[granularity] = on_first_rank(compared) | {
            "removed": ogpsa.metrics["removed"],
            "rank": ogpsa.metrics["rank"],
            "leak": ogpsa.metrics["leak"],
            "num_blocks": len(ogpsa.block_names),
        }
        ogpsa.detach()
    return results


def _compared(layout: str, granularity: str, actual: oracle.Tensors, grad_norm: float) -> dict[str, float]:
    """A projected gradient against the oracle's."""
    plain, references = expectation(tuple(ALL_LAYOUTS[layout].model.items()), ALL_LAYOUTS[layout].frozen)
    expected = oracle.project(plain, references, granularity)
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(grad_norm / oracle.norm(expected) - 1),
        "expected_removed": 1 - (oracle.norm(expected) / oracle.norm(plain)) ** 2,
        "expected_num_blocks": len(plain) if granularity == "tensor" else 1,
    }


def random_parity(layout: str) -> dict[str, dict[str, float]]:
    """The projected gradient against the fp64 projection of the gradients that Megatron itself made, by random passes.

    Each pass is taken as it came, from Megatron's buffers, and put there again for each granularity.
    """
    sharding = RANDOM[layout]
    shape = oracle.ModelShape(**sharding.model)
    training = build(sharding, oracle.random_weights(shape, seed=1), clip_grad=0.0)
    passes, gradients = [], []
    for seed in (*range(len(REFERENCES)), SAFETY_SEED, SAFETY_SEED):
        training.gradient(batch_of(shape, seed))
        passes.append(kept(training))
        gradients.append(reduced_gradient(training))
    *references, first, second = gradients
    results = {}
    for granularity in ("tensor", "model"):
        ogpsa = attach(
            training.optimizer,
            training.chunks,
            OGPSAConfig(space="gradient", mode="orthogonal", granularity=granularity),
        )  # type: ignore[arg-type]
        refresh_kept(training, ogpsa, passes[: len(REFERENCES)])
        put_back(training, passes[-1])
        actual, (_, grad_norm, _) = projected_gradient(training)
        expected = oracle.project(second, references, granularity)
        results[granularity] = {
            "error": oracle.relative_error(actual, expected),
            "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
            "removed": ogpsa.metrics["removed"],
            "expected_removed": 1 - (oracle.norm(expected) / oracle.norm(second)) ** 2,
            "randomness": oracle.relative_error(first, second),
        }
        ogpsa.detach()
    return results


# --------------------------------------------------------------------------------------- planted gradients


def planted(shape: oracle.ModelShape, count: int, *, integers: bool) -> list[oracle.Tensors]:
    """Gradients that overlap, representable in bf16, so that no layout and no precision rounds them."""
    result = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        common = torch.Generator().manual_seed(1000)
        tensors = {}
        for name, size in oracle.shapes_of(shape).items():
            if integers:
                tensors[name] = torch.randint(-4, 5, size, generator=generator).double()
            else:
                own, shared = torch.randn(size, generator=generator), torch.randn(size, generator=common)
                tensors[name] = (own + shared).bfloat16().double()
        result.append(tensors)
    return result


def planted_parity(layout: str, granularity: str) -> dict[str, float]:
    """The projection alone, without the rounding of a forward and backward pass, in each precision."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.0)
    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(space="gradient", mode="orthogonal", granularity=granularity)
    )  # type: ignore[arg-type]
    *references, gradient = planted(shape, 4, integers=False)
    scale = training.optimizer.get_loss_scale().item()
    refresh_planted(training, ogpsa, references, scale)
    plant(training, gradient, scale)
    actual, (_, grad_norm, _) = projected_gradient(training)
    expected = oracle.project(gradient, references, granularity)
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "scale": scale,
    }


HF_PARTS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_qkv_down_proj.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.core_attention.softmax_offset": "self_attn.sinks",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
HF_MODULES = {
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.linear_qkv": "self_attn",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.linear_qkv_down_proj": "self_attn",
    "mlp.router": "mlp.gate",
    "mlp.shared_experts": "mlp.shared_expert",
    "mlp.experts.local_experts": "mlp.experts",
}
HF_PROJECTIONS = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "q_down": "q_a_proj",
    "kv_down": "kv_a_proj_with_mqa",
}


def hf_name(block: str, *, latent: bool = False) -> str:
    """From the name of a block of the plugin to the Hugging Face tensor that it is."""
    if latent:
        block = block.replace("q_layernorm.weight", "linear_q_up_proj.layer_norm_weight")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", block)
    if match is None:
        return HF_PARTS[block]
    return f"model.layers.{match[1]}.{HF_PARTS.get(match[2]) or _hf_linear(match[2])}"


def _hf_linear(leaf: str) -> str:
    leaf = re.sub(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)", r"experts.local_experts.\3.\1.\2", leaf)  # grouped
    match = re.fullmatch(r"(.*?)(\.linear_fc[12])?\.(weight|bias)(?:\[(\w+)\])?", leaf)
    assert match is not None
    module, fc, kind, part = match.groups()
    for megatron, hugging_face in HF_MODULES.items():
        module = re.sub(rf"^{re.escape(megatron)}(?=\.|$)", hugging_face, module)
    projection = "down_proj" if fc == ".linear_fc2" else HF_PROJECTIONS[part] if part else None
    return ".".join(name for name in (module, projection, kind) if name)


def integer_gram(layout: str) -> bool:
    """Whether every block's Gram matrix of integer-valued gradients has exactly the oracle's numbers."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(space="gradient", mode="orthogonal", granularity="tensor")
    )
    references = planted(shape, 3, integers=True)
    scale = training.optimizer.get_loss_scale().item()
    ogpsa.begin_refresh()
    for index, reference in enumerate(references):
        plant(training, reference, scale)
        ogpsa.capture(f"reference {index}")
    shard = ogpsa._shard
    gram = sum_over_ranks(gram_and_dots(shard.layout, ogpsa._captured_KN), shard.reduction.group)
    for block, actual in zip(ogpsa.block_names, gram, strict=True):
        rows = torch.stack([reference[hf_name(block, latent=shape.latent)].flatten() for reference in references])
        if not torch.equal(actual, rows @ rows.T):
            raise AssertionError(f"{block}: {actual.tolist()} is not {(rows @ rows.T).tolist()}")
    return True
