"""Defaults on a machine with a GPU: what a missing library would end is off, and what is there stays on."""

from __future__ import annotations

import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_ogpsa.integration.arguments.gpu import set_gpu_defaults

APEX = {"apex", "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda"}
CASES = {
    "NVIDIA's container": (APEX | {"transformer_engine"}, {}),
    "Transformer Engine from PyPI": (
        {"transformer_engine"},
        {"gradient_accumulation_fusion": False, "masked_softmax_fusion": False, "no_persist_layer_norm": True},
    ),
    "torch alone": (
        set(),
        {
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "no_persist_layer_norm": True,
            "transformer_impl": "local",
            "apply_rope_fusion": False,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_installed_is_left_out(case: str) -> None:
    installed, expected = CASES[case]
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    megatrons = vars(parser.parse_args([]))
    set_gpu_defaults(parser, installed.__contains__)
    found = vars(parser.parse_args([]))
    assert {name: value for name, value in found.items() if value != megatrons[name]} == expected


def test_flags_that_are_given_win() -> None:
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    set_gpu_defaults(parser, lambda _: False)
    assert parser.parse_args(["--transformer-impl", "transformer_engine"]).transformer_impl == "transformer_engine"
