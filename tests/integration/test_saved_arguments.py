"""A model that is loaded with other flags than it was saved with: told for each of them, and loaded all the same."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_ogpsa.integration.arguments.model import MODEL_ARGUMENTS
from megatron_ogpsa.integration.arguments.parser import build_parser
from megatron_ogpsa.integration.checkpoints.saved_arguments import Difference, SavedArguments
from tests.integration.conftest import Train

DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --train-iters 2".split()
OTHER = "--rotary-base 500000 --norm-epsilon 1e-6".split()
AS_FIRST = [
    "--norm-epsilon 1e-05 and is loaded with --norm-epsilon 1e-06: give --norm-epsilon 1e-05, unless another value",
    "--rotary-base 10000 and is loaded with --rotary-base 500000: give --rotary-base 10000, unless another value",
]


def told(output: str, place: str) -> list[str]:
    """What was said of the checkpoint at ``place``, by any rank."""
    start = f"WARNING: {place} was saved with "
    return [line.removeprefix(start) for line in output.splitlines() if line.startswith(start)]


def test_training_says_what_differs_wherever_it_loads(train: Train) -> None:
    """Of given weights, and of a run that goes on; once, by rank 0, and nothing where nothing differs."""
    outcome = train(*DP2, "--save", "first")
    assert outcome.exit_code == 0, outcome.output[-3000:]

    begun = (*DP2, *"--pretrained-checkpoint first --load second --save second".split())
    outcome = train(*begun, *OTHER)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    found = told(outcome.output, "first/iter_0000002")
    assert [line[: len(start)] for line, start in zip(found, AS_FIRST, strict=True)] == AS_FIRST

    outcome = train(*begun, *OTHER)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "nothing was left to train" in outcome.output
    assert " was saved with " not in outcome.output

    outcome = train(*begun)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert [line.partition(" and ")[0] for line in told(outcome.output, "second/iter_0000002")] == [
        "--norm-epsilon 1e-06",
        "--rotary-base 500000",
    ]


def model_arguments(**changed: Any) -> Namespace:
    known = vars(build_parser().parse_args([]))
    return Namespace(**{name: known[name] for name in MODEL_ARGUMENTS} | changed)


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        ({"window_size": (128, 0)}, {}, "--window-size 128,0 / no --window-size: give --window-size 128,0"),
        ({}, {"use_rope_scaling": True}, "no --use-rope-scaling / --use-rope-scaling: leave --use-rope-scaling out"),
        ({"swiglu": True}, {}, "--swiglu / no --swiglu: give --swiglu"),
        (
            {"no_rope_freq": [0, 1]},
            {"no_rope_freq": 4},
            "--no-rope-freq '[0, 1]' / --no-rope-freq 4: give --no-rope-freq '[0, 1]'",
        ),
        (
            {"layernorm_zero_centered_gamma": True},
            {},
            "--apply-layernorm-1p / no --apply-layernorm-1p: give --apply-layernorm-1p",
        ),
    ],
)
def test_the_remedy_can_be_typed(saved: dict[str, Any], given: dict[str, Any], expected: str) -> None:
    (difference,) = SavedArguments("run", model_arguments(**saved)).differences(model_arguments(**given))
    start, end = (
        "WARNING: run was saved with ",
        ", unless another value than the checkpoint's is meant, as for longer contexts",
    )
    assert difference.told("run") == start + expected.replace(" / ", " and is loaded with ") + end


def test_of_what_a_checkpoint_does_not_say_nothing_is_said() -> None:
    here = model_arguments(rotary_base=500000)
    assert SavedArguments().differences(here) == ()
    assert SavedArguments("run", Namespace(num_layers=here.num_layers)).differences(here) == ()
    assert SavedArguments("run", {"rotary_base": 1}).differences(here) == ()


def test_megatrons_own_number_of_groups_is_no_difference() -> None:
    """Without --group-query-attention it is 1, and after a step the number of heads."""
    saved = model_arguments(num_attention_heads=4, num_query_groups=4)
    assert SavedArguments("run", saved).differences(model_arguments(num_attention_heads=4)) == ()


def test_a_checkpoint_may_hold_anything() -> None:
    """What nobody has checked can be compared, shown in one line and written as JSON."""
    values = model_arguments(rotary_base=torch.ones(2), normalization="RMSNorm\n\x1b[2J" + "x" * 9999)
    differences = SavedArguments("run", values).differences(model_arguments())
    assert [difference.flag for difference in differences] == ["--normalization", "--rotary-base"]
    assert all(
        difference.told("run").isprintable() and len(difference.told("run")) < 2100 for difference in differences
    )
    assert json.loads(json.dumps([difference.as_json() for difference in differences]))[1]["given"] == 10000
    assert Difference(flag="--x", given=(1, 0), saved=None).as_json() == {
        "flag": "--x",
        "given": [1, 0],
        "checkpoint": None,
    }
