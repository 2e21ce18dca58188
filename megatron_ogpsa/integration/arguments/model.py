"""Megatron's arguments that say what a model computes, not how it is trained or laid out over ranks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

MODEL_ARGUMENTS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels swiglu normalization "
    "layernorm_epsilon position_embedding_type rotary_base rotary_percent rotary_seq_len_interpolation_factor "
    "use_rope_scaling rope_scaling_factor window_size qk_layernorm num_experts moe_ffn_hidden_size moe_router_topk "
    "moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor moe_router_group_topk "
    "rotary_interleaved no_rope_freq window_attn_skip_freq softmax_type layernorm_zero_centered_gamma"
).split()
"""A checkpoint's tensors tell the rest, but for :data:`UNCONVERTED_ARGUMENTS`."""

UNCONVERTED_ARGUMENTS = (
    "use_mup qk_l2_norm glu_linear_offset activation_func_clamp_value moe_apply_probs_on_input"
).split()
"""What no converted model has and no tensor tells. Apart from the others, which are written down beside DPO's
log-probabilities, where a run that goes on must find all that it compares."""

PRECISION_ARGUMENTS = ("bf16", "fp16", "fp8", "fp8_recipe", "fp8_param_gather")


def described(args: Namespace, names: Sequence[str]) -> dict[str, str]:
    """Name → value, in words that can be written down and compared."""
    return {name: str(getattr(args, name)) for name in names}


def difference(known: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The first flag of ``wanted`` that is another in ``known``, ``--rotary-base 10000, not 500000``; empty if none is."""
    for name, value in wanted.items():
        if known.get(name) != value:
            return f"--{name.replace('_', '-')} {known.get(name, 'unknown')}, not {value}"
    return ""
