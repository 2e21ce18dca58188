"""The logical tensors of fused parameters, where no layout of a Megatron model shows them."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

from megatron_ogpsa.sharding.logical import logical_runs
from megatron_ogpsa.sharding.names import named_parameters


def attention(query_groups: int, **others: object) -> SimpleNamespace:
    heads = {"num_attention_heads": 8, "num_query_groups": query_groups, "kv_channels": 2}
    return SimpleNamespace(**heads, gated_linear_unit=False, **others)


def runs_of_qkv(config: SimpleNamespace, rows: int) -> list[tuple[str, int]]:
    """Of a layer whose attention has ``config``, in a model of eight query groups."""
    model, layer = nn.Module(), nn.Module()
    model.config, model.ep_group, model.tp_group = attention(8), None, SimpleNamespace(rank=lambda: 0)  # type: ignore[assignment]
    layer.self_attention = nn.Module()
    layer.self_attention.config = config  # type: ignore[assignment]
    layer.self_attention.linear_qkv = nn.Linear(1, rows, bias=False)
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList([layer])
    (parameter,) = named_parameters([model])  # type: ignore[list-item]
    return [(name.rpartition("[")[2], number) for name, number in logical_runs(parameter, 0, parameter.param.numel())]


def test_layers_of_a_heterogeneous_model_have_query_groups_of_their_own() -> None:
    """``core/transformer/heterogeneous/heterogeneous_config.py`` gives each layer's attention a configuration."""
    assert runs_of_qkv(attention(2), 2 * (4 * 2 + 2 + 2)) == [("q]", 8), ("k]", 2), ("v]", 2)] * 2


def test_an_output_gate_is_one_tensor_with_the_queries() -> None:
    """As in Hugging Face's Qwen3-Next, whose ``q_proj`` makes both."""
    config = attention(2, attention_output_gate=True)
    assert runs_of_qkv(config, 2 * (2 * 4 * 2 + 2 + 2)) == [("q]", 16), ("k]", 2), ("v]", 2)] * 2
