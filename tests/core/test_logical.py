"""The logical tensors of fused parameters, where no layout of a Megatron model shows them."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

from megatron_ogpsa.sharding.logical import logical_runs
from megatron_ogpsa.sharding.names import named_parameters


def attention(query_groups: int) -> SimpleNamespace:
    return SimpleNamespace(num_attention_heads=8, num_query_groups=query_groups, kv_channels=2, gated_linear_unit=False)


def test_layers_of_a_heterogeneous_model_have_query_groups_of_their_own() -> None:
    """``core/transformer/heterogeneous/heterogeneous_config.py`` gives each layer's attention a configuration."""
    model, layer = nn.Module(), nn.Module()
    model.config, model.ep_group, model.tp_group = attention(8), None, SimpleNamespace(rank=lambda: 0)  # type: ignore[assignment]
    layer.self_attention = nn.Module()
    layer.self_attention.config = attention(2)  # type: ignore[assignment]
    layer.self_attention.linear_qkv = nn.Linear(1, 2 * (4 * 2 + 2 + 2), bias=False)
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList([layer])
    (parameter,) = named_parameters([model])  # type: ignore[list-item]
    runs = [(name.rpartition("[")[2], number) for name, number in logical_runs(parameter, 0, parameter.param.numel())]
    assert runs == [("q]", 8), ("k]", 2), ("v]", 2)] * 2
