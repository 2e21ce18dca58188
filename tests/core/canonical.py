"""Which slices of Hugging Face tensors each of a rank's Megatron parameters is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tests.core.oracle import ModelShape, Tensors

Part = tuple[str, slice, slice]
"""Hugging Face name, rows and columns of it; parts follow each other along dim 0 of the local parameter."""

Share = Callable[[int], slice]
"""From the size of a dim to this rank's share of it."""

ALL = slice(None)

WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    # Transformer Engine has a norm in the layer that follows it.
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.q_layernorm.weight of latents": "self_attn.q_a_layernorm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    # Transformer Engine has these in the projections that follow them.
    "self_attention.linear_qkv_down_proj.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
"""Parameters of a layer that each tensor-parallel rank holds in full."""


def canonical_parts(module: GPTModel, shape: ModelShape) -> Iterator[tuple[torch.nn.Parameter, list[Part]]]:
    """Each local parameter of a model chunk with the slices of Hugging Face tensors that it is made of."""
    dense = _share(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    )
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(module.decoder.layers)}
    for name, param in module.named_parameters():
        layer = next((number for prefix, number in numbers.items() if name.startswith(prefix)), None)
        if name == "embedding.word_embeddings.weight":
            yield param, [("model.embed_tokens.weight", dense(shape.vocabulary), ALL)]
        elif name == "output_layer.weight":
            head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
            yield param, [(head, dense(shape.vocabulary), ALL)]
        elif name == "decoder.final_layernorm.weight":
            yield param, [("model.norm.weight", ALL, ALL)]
        else:
            assert layer is not None, f"the test does not know {name}"
            is_copy = name.endswith("_down_proj.weight") and not param.tensor_model_parallel
            parts = _layer_parts(shape, name.split(".", 3)[3], _share(0, 1) if is_copy else dense)
            yield param, [(f"model.layers.{layer}.{part}", rows, columns) for part, rows, columns in parts]


def _share(rank: int, size: int) -> Share:
    return lambda length: slice(rank * length // size, (rank + 1) * length // size)


def _layer_parts(shape: ModelShape, leaf: str, dense: Share) -> list[Part]:
    """Parts of a parameter of a layer, both named without the layer."""
    kind = leaf.rsplit(".", 1)[1]
    if shape.latent and leaf == "self_attention.q_layernorm.weight":
        leaf += " of latents"
    if leaf in WHOLE:
        return [(WHOLE[leaf], ALL, ALL)]
    if leaf == "self_attention.core_attention.softmax_offset":
        return [("self_attn.sinks", dense(shape.heads), ALL)]
    if leaf == "self_attention.linear_proj.weight":
        return [("self_attn.o_proj.weight", ALL, dense(shape.hidden))]
    if match := re.fullmatch(r"self_attention\.linear_(q|kv|qkv)_(down|up)_proj\.weight", leaf):
        return _latent_parts(shape, match[1], match[2], dense)
    if leaf.startswith("self_attention.linear_qkv."):
        return _qkv_parts(shape, kind, dense)
    if match := re.fullmatch(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)", leaf):  # grouped
        return _layer_parts(shape, f"mlp.experts.local_experts.{match[3]}.{match[1]}.{match[2]}", dense)
    if match := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", leaf):
        expert_tp = _share(
            parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
        )
        num_local = shape.experts // parallel_state.get_expert_model_parallel_world_size()
        expert = parallel_state.get_expert_model_parallel_rank() * num_local + int(match[1])
        return _mlp_parts(f"mlp.experts.{expert}", match[2], shape.expert_ffn, expert_tp)
    if leaf.startswith("mlp.shared_experts."):
        return _mlp_parts("mlp.shared_expert", leaf.removeprefix("mlp.shared_experts."), shape.shared_ffn, dense)
    return _mlp_parts("mlp", leaf.removeprefix("mlp."), shape.ffn, dense)


def _mlp_parts(prefix: str, leaf: str, ffn: int, share: Share) -> list[Part]:
    """A gated MLP: gate and up are split by rows and follow each other, down is split by columns."""
    layer, kind = leaf.split(".")
    if layer == "linear_fc1":
        return [(f"{prefix}.{part}_proj.{kind}", share(ffn), ALL) for part in ("gate", "up")]
    assert layer == "linear_fc2", f"the test does not know {leaf}"
    return [(f"{prefix}.down_proj.{kind}", ALL, share(ffn) if kind == "weight" else ALL)]


def _latent_parts(shape: ModelShape, which: str, way: str, share: Share) -> list[Part]:
    """Projections to latent vectors and from them; Transformer Engine's to them are whole on each tensor-parallel rank."""
    tensors = {
        ("q", "down"): ("q_a_proj", shape.q_rank),
        ("q", "up"): ("q_b_proj", shape.heads * (shape.head_size + shape.rotary_size)),
        ("kv", "down"): ("kv_a_proj_with_mqa", shape.kv_rank + shape.rotary_size),
        ("kv", "up"): ("kv_b_proj", shape.heads * 2 * shape.head_size),
    }
    names = ["q", "kv"] if which == "qkv" else [which]
    return [(f"self_attn.{name}.weight", share(rows), ALL) for name, rows in (tensors[one, way] for one in names)]


def _qkv_parts(shape: ModelShape, kind: str, share: Share) -> list[Part]:
    """Fused rows: for each query group its query heads, its k, its v; tensor parallelism cuts that list evenly."""
    size, per_group = shape.head_size, shape.heads // shape.query_groups
    rows: list[tuple[str, int]] = []
    for group in range(shape.query_groups):
        rows += [("q", group * per_group * size + row) for row in range(per_group * size)]
        rows += [("k", group * size + row) for row in range(size)]
        rows += [("v", group * size + row) for row in range(size)]
    return [(f"self_attn.{name}_proj.{kind}", slice(row, row + 1), ALL) for name, row in rows[share(len(rows))]]


def gather_parts(parts: list[Part], tensors: Tensors) -> Tensor:
    """The local parameter that parts of full tensors make."""
    return torch.cat([tensors[name][part_index(tensors[name], rows, cols)] for name, rows, cols in parts])


def part_index(tensor: Tensor, rows: slice, columns: slice) -> tuple[slice, ...]:
    """Rows and columns of a matrix, or the rows of a vector."""
    return (rows, columns) if tensor.dim() == 2 else (rows,)
