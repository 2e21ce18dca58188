"""What is known about architectures: ``config.json`` as Megatron's flags, and Hugging Face's names of its tensors.

A value that Megatron's GPT model cannot represent is refused by its name: a converted model computes what the original
computes, or is not converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ogpsa.errors import UnsupportedError, UserError

Flags = dict[str, bool | int | float | str]
"""Megatron's flags without the dashes, as a configuration has them."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of Llama 3's rope scaling that Megatron has no flags for
(``_apply_scaling`` in core/models/common/embeddings/rotary_pos_embedding.py)."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_ATTENTION = {
    "input_layernorm.weight": "input_layernorm.weight",
    **{
        f"self_attention.linear_qkv.{kind}[{part}]": f"self_attn.{part}_proj.{kind}"
        for kind in ("weight", "bias")
        for part in "qkv"
    },
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
_MLP = {
    "linear_fc1.weight[gate]": "gate_proj.weight",
    "linear_fc1.weight[up]": "up_proj.weight",
    "linear_fc2.weight": "down_proj.weight",
}
_DENSE = _ATTENTION | {f"mlp.{megatron}": f"mlp.{hugging_face}" for megatron, hugging_face in _MLP.items()}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that differ in numbers alone.

    Attributes:
        model_type: of ``config.json``.
        flags: from its transformers configuration to Megatron's flags.
        layer: names within a layer: Megatron's logical tensor (:mod:`megatron_ogpsa.sharding.logical`) → Hugging Face's.
        experts: the folder of the experts within a Hugging Face layer; None without experts.
        expert: names within an expert.
    """

    model_type: str
    flags: Callable[[Any], Flags]
    layer: Mapping[str, str]
    experts: str | None = None
    expert: Mapping[str, str] | None = None

    def hugging_face_name(self, logical: str) -> str:
        """The Hugging Face tensor that a logical tensor of Megatron's unsharded model is."""
        match = _LAYER.fullmatch(logical)
        if match is None:
            return _OUTSIDE_LAYERS[logical]
        layer, within = match.groups()
        if self.expert is not None and (expert := _EXPERT.fullmatch(within)):
            return f"model.layers.{layer}.{self.experts}.{expert[1]}.{self.expert[expert[2]]}"
        return f"model.layers.{layer}.{self.layer[within]}"


def family_of(place: str, config: Mapping[str, Any]) -> Family:
    """The family of a model.

    Args:
        place: of ``config``, for messages.
        config: what ``config.json`` says.

    Raises:
        UnsupportedError: an architecture that is not in the table, or quantised weights.
    """
    name, kind = next(iter(config.get("architectures") or ["none"])), config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedError(
            f"{place}: the architecture {name} is not supported: convert one of {', '.join(FAMILIES)}"
        )
    if FAMILIES[name].model_type != kind:
        raise UnsupportedError(
            f"{place}: {name} with model_type {kind} is not supported, since its layers may be others: convert a model of "
            f"model_type {FAMILIES[name].model_type}"
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{place}: quantization_config: quantised weights cannot be trained: take the original ones"
        )
    return FAMILIES[name]


def model_flags(place: str, config: Mapping[str, Any]) -> Flags:
    """Megatron's flags of the model that ``config.json`` describes; what it leaves out is transformers' default.

    Raises:
        UserError: values of wrong types.
        UnsupportedError: a value that Megatron's model cannot represent.
    """
    from transformers import CONFIG_MAPPING

    family = family_of(place, config)
    try:
        return family.flags(CONFIG_MAPPING[family.model_type].from_dict(dict(config)))
    except UnsupportedError as error:
        raise UnsupportedError(f"{place}: {error}") from None
    except Exception as error:  # whatever transformers' own checks of nobody's file raise
        raise UserError(f"{place}: not a configuration of {family.model_type} ({error}): restore the file") from error


def _common_flags(config: Any) -> Flags:
    _require(config, "hidden_act", "silu")
    _require(config, "attention_bias", False, "Megatron's flags have no bias of the attention's output alone")
    _require(config, "mlp_bias", False)
    _require(config, "use_sliding_window", False, "Megatron's window is the same in every layer")
    return {
        "num-layers": config.num_hidden_layers,
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.intermediate_size,
        "num-attention-heads": config.num_attention_heads,
        "kv-channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        **_query_groups(config),
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "disable-bias-linear": True,
        **({} if config.tie_word_embeddings else {"untie-embeddings-and-output-weights": True}),
        **_rope(config),
        **_window(config),
        "attention-dropout": float(getattr(config, "attention_dropout", 0.0)),
        "hidden-dropout": 0.0,
        "max-position-embeddings": config.max_position_embeddings,
        "vocab-size": config.vocab_size,
        # Megatron's own default adds rows up to a multiple of 128 x TP, whose logits would enter the loss.
        "padded-vocab-size": config.vocab_size,
    }


def _query_groups(config: Any) -> Flags:
    # Also where each head is a group of its own: Megatron fills the number in while it validates, and saves it.
    return {"group-query-attention": True, "num-query-groups": config.num_key_value_heads}


def _rope(config: Any) -> Flags:
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if by_layer := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise UnsupportedError(
            f"rope_parameters of {', '.join(by_layer)}: Megatron rotates alike in every layer: convert a model that does"
        )
    base = rope.get("rope_theta") or config.rope_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if base != int(base):
        raise UnsupportedError(f"rope_theta {base}: Megatron's --rotary-base is a whole number")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor {rope['partial_rotary_factor']}: convert a model that rotates all"
        )
    flags: Flags = {"position-embedding-type": "rope", "rotary-base": int(base)}
    if kind == "default":
        return flags
    if kind == "linear":
        return flags | _linear_scaling(float(rope["factor"]))
    if kind != "llama3":
        raise UnsupportedError(
            f"rope_type {kind!r}: Megatron's GPT model has default, linear and llama3: convert a model with one of these"
        )
    for name, constant in LLAMA3_ROPE.items():
        if rope.get(name) != constant:
            raise UnsupportedError(f"rope scaling with {name} {rope.get(name)}: Megatron's is fixed at {constant:g}")
    return flags | {"use-rope-scaling": True, "rope-scaling-factor": float(rope["factor"])}


def _linear_scaling(factor: float) -> Flags:
    """Megatron divides positions by it, transformers frequencies."""
    if factor < 1 or not factor.is_integer():
        raise UnsupportedError(
            f"linear rope scaling with factor {factor:g}: Megatron's --rotary-seq-len-interpolation-factor is a whole "
            "number: convert a model whose factor is one"
        )
    return {"rotary-seq-len-interpolation-factor": int(factor)}


def _window(config: Any) -> Flags:
    """Hugging Face counts the token itself, Megatron those before it; a window that nothing is longer than is none."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return {}
    return {"window-size": f"({window - 1},0)"}


def _require(config: Any, name: str, value: Any, reason: str = "") -> None:
    found = getattr(config, name, None)
    if (found or False) != value:
        raise UnsupportedError(f"{name} {found!r} is not supported, only {value!r}{f': {reason}' if reason else ''}")


def _qwen2_flags(config: Any) -> Flags:
    return _common_flags(config) | {"add-qkv-bias": True}


def _qwen3_flags(config: Any) -> Flags:
    return _common_flags(config) | {"qk-layernorm": True}


def _expert_flags(num_experts: int, width: int, config: Any) -> Flags:
    return {"num-experts": num_experts, "moe-ffn-hidden-size": width, "moe-router-topk": config.num_experts_per_tok}


def _mixtral_flags(config: Any) -> Flags:
    return _common_flags(config) | _expert_flags(config.num_local_experts, config.intermediate_size, config)


def _qwen3_moe_flags(config: Any) -> Flags:
    _require(config, "mlp_only_layers", False, "each layer must have experts")
    _require(config, "decoder_sparse_step", 1, "each layer must have experts")
    # Without normalisation the chosen experts keep their probabilities among all of them.
    pre_softmax: Flags = {} if config.norm_topk_prob else {"moe-router-pre-softmax": True}
    return _qwen3_flags(config) | _expert_flags(config.num_experts, config.moe_intermediate_size, config) | pre_softmax


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(model_type="llama", flags=_common_flags, layer=_DENSE),
    "MistralForCausalLM": Family(model_type="mistral", flags=_common_flags, layer=_DENSE),
    "Qwen2ForCausalLM": Family(model_type="qwen2", flags=_qwen2_flags, layer=_DENSE),
    "Qwen3ForCausalLM": Family(model_type="qwen3", flags=_qwen3_flags, layer=_DENSE),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        flags=_mixtral_flags,
        layer=_ATTENTION | {"mlp.router.weight": "block_sparse_moe.gate.weight"},
        experts="block_sparse_moe.experts",
        expert={
            "linear_fc1.weight[gate]": "w1.weight",
            "linear_fc1.weight[up]": "w3.weight",
            "linear_fc2.weight": "w2.weight",
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        flags=_qwen3_moe_flags,
        layer=_ATTENTION | {"mlp.router.weight": "mlp.gate.weight"},
        experts="mlp.experts",
        expert=_MLP,
    ),
}
"""By the first of ``architectures`` in ``config.json``."""
