"""Models that are refused: Megatron lets copies of their weights drift apart, or would take them for others."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ogpsa.errors import UnsupportedError, UserError


@pytest.mark.parametrize("is_alone", [True, False])
def test_copies_that_megatron_lets_drift_apart_are_refused(is_alone: bool) -> None:
    from megatron_ogpsa.plugin.limits import DRIFTING_KEYS
    from megatron_ogpsa.refusal import refuse

    latent = {"multi_latent_attention": True, "sequence_parallel": False}
    config = SimpleNamespace(**latent, tensor_model_parallel_size=1 if is_alone else 2)
    refused = pytest.raises(UnsupportedError, match=r"^--multi-latent-attention: .+; add --sequence-parallel$")
    with nullcontext() if is_alone else refused:
        refuse((DRIFTING_KEYS,), config, scope="")
    config.sequence_parallel = True
    refuse((DRIFTING_KEYS,), config, scope="")


def test_copies_of_a_gated_delta_nets_norm_are_refused_likewise() -> None:
    from megatron_ogpsa.plugin.support import _check_norms

    name = "decoder.layers.0.self_attention.out_norm.weight"
    chunk = SimpleNamespace(named_parameters=lambda: [(name, SimpleNamespace())])
    _check_norms(chunk, is_split=False)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"gated_delta_net .+\.layers\.0\..+; add --sequence-parallel$"):
        _check_norms(chunk, is_split=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hybrid_layer_pattern": "M-M*"}, r"--hybrid-layer-pattern M-M\*: this command builds GPT models"),
        ({"spec": ["no.such.layers", "spec"]}, r"--spec no\.such\.layers spec: No module named 'no'.*: name a module"),
        ({"spec": ["json", "spec"]}, "--spec json spec: no such layers: give a module and a name in it"),
        ({"spec": ["local"]}, "--spec local: no such layers"),
    ],
)
def test_models_that_would_be_taken_for_others_are_refused(change: dict[str, Any], words: str) -> None:
    """Megatron would build full attention in each layer, or its own layers."""
    from megatron_ogpsa.integration.arguments.loop import check_model

    plain = {"hybrid_layer_pattern": None, "spec": None}
    check_model(argparse.Namespace(**plain))
    check_model(argparse.Namespace(**plain | {"spec": ["json", "loads"]}))
    with pytest.raises(UserError, match=f"^{words}"):
        check_model(argparse.Namespace(**plain | change))
