"""What is said of losses that balance experts, which Megatron weighs by positions and divides by what is learnt."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch.utils.data import Dataset

from megatron_ogpsa.integration.inputs.datasets import balancing_told


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Ten rows of 100 positions, 15 of each learnt."""

    num_supervised_tokens = 150

    def __len__(self) -> int:
        return 10


def told(**flags: object) -> str:
    args = {"num_experts": 8, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None, "seq_length": 100}
    return balancing_told(Namespace(**args | {"ogpsa_packing": False} | flags), Rows())


@pytest.mark.parametrize("flags", [{"moe_aux_loss_coeff": 1e-3}, {"moe_aux_loss_coeff": [0.0, 1e-2]}])
def test_how_much_stronger_they_are_is_told(flags: dict[str, object]) -> None:
    assert told(**flags).startswith("--moe-aux-loss-coeff acts 6.7 times as strongly as it says")
    assert "--ogpsa-packing" in told(**flags)
    assert "--ogpsa-packing" not in told(**flags, ogpsa_packing=True)


@pytest.mark.parametrize(
    "flags", [{}, {"num_experts": None, "moe_aux_loss_coeff": 1e-3}, {"moe_aux_loss_coeff": 1e-3, "seq_length": 20}]
)
def test_nothing_is_told_where_there_is_nothing_to_tell(flags: dict[str, object]) -> None:
    assert told(**flags) == ""


def test_a_loss_of_logits_is_one_of_them() -> None:
    assert told(moe_z_loss_coeff=1e-3).startswith("--moe-z-loss-coeff acts 6.7 times")
