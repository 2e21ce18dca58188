"""Every configuration of a published model is accepted for its cluster, in bf16 and in FP8, with the paper's settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RANKS = {"qwen2.5-7b": 8, "llama3.1-8b": 8, "llama3.1-70b": 64, "llama3.1-405b": 1024}
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for model in RANKS
    for path in (ROOT / "configs" / model).glob("*.yaml")
    if path.stem != "base"
)
PRECISIONS: dict[str, list[str]] = {
    "bf16": [],
    "delayed": ["--fp8-format", "hybrid"],
    "tensorwise": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather"],
    "blockwise": ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
    "mxfp8": ["--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"],
    "bf16-ends": [
        *("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--first-last-layers-bf16"),
        *("--num-layers-at-start-in-bf16", "1", "--num-layers-at-end-in-bf16", "1"),
    ],
}

CASES = [(config, "bf16") for config in CONFIGS]
CASES += [(config, "tensorwise") for config in CONFIGS if config.endswith("sft-dpo.yaml")]
CASES += [
    ("configs/qwen2.5-7b/dpo.yaml", precision) for precision in PRECISIONS if precision not in ("bf16", "tensorwise")
]

PAGE = (ROOT / "docs/fp8.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^megatron-ogpsa (?:train|plan) (\S+)((?: --\S+| \S+)*)$", PAGE, re.MULTILINE)

# arXiv:2602.07892 and the authors' code: README, train/sft_pg, train/dpo_pg.
SHARED = {
    "lr": 1e-6,
    "lr_decay_style": "cosine",
    "weight_decay": 0.0,
    "clip_grad": 1.0,
    "seq_length": 2048,
    "ogpsa_reference_samples": 200,
    "ogpsa_reference_loss": [],  # nll of conversations
    "ogpsa_granularity": "tensor",
    "ogpsa_space": "gradient",
    "ogpsa_mode": "orthogonal",
    "ogpsa_early_refreshes": False,
}
PAPER: dict[str, dict[str, Any]] = {
    "sft": SHARED
    | {"ogpsa_refresh_interval": 30, "global_batch_size": 4 * 4 * 8, "train_iters": 3 * 10_000 // 128 + 1},
    "dpo": SHARED
    | {
        "ogpsa_refresh_interval": 5,
        "global_batch_size": 2 * 16 * 8,
        "train_iters": 10_000 // 256,
        "seq_length": 2 * 2048,  # a row holds both answers
        "ogpsa_reference_loss": [[None, "nll_chosen"]],  # the authors' code: nll_pair, rejected answers too
        "ogpsa_dpo_beta": 0.2,
        "ogpsa_dpo_loss": "sigmoid",
    },
}
DATA = {
    "sft": ("data/saferlhf_sft.jsonl", ["data/ultrafeedback_sft.jsonl", "data/halueval_sft.jsonl"]),
    "dpo": ("data/saferlhf_dpo.jsonl", ["data/ultrafeedback_dpo.jsonl"]),
}


@pytest.fixture(scope="module")
def validated() -> dict[tuple[str, str], dict[str, Any]]:
    """(configuration, precision) → stage → arguments."""
    given = [[config, RANKS[config.split("/")[1]], PRECISIONS[precision]] for config, precision in CASES]
    given += [[config, RANKS[config.split("/")[1]], _flags(words)] for config, words in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.configs.validating"],
        input=json.dumps(given),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip([*CASES, *COMMANDS], json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_the_runs_of_the_paper_are_there() -> None:
    for model in ("qwen2.5-7b", "llama3.1-8b", "llama3.1-70b"):
        assert {f"configs/{model}/{run}.yaml" for run in ("sft", "dpo", "sft-dpo")} <= {*CONFIGS}


@pytest.mark.parametrize(("config", "precision"), CASES)
def test_a_configuration_is_accepted(
    validated: dict[tuple[str, str], dict[str, Any]], config: str, precision: str
) -> None:
    stages = validated[config, precision]
    expected = ["sft", "dpo"] if "sft-dpo" in config else [""]
    assert [*stages] == expected
    for name, args in stages.items():
        assert isinstance(args, dict), args
        stage = name or Path(config).stem
        paper = PAPER[stage] if "405b" not in config else SHARED
        assert {key: args[key] for key in paper} == paper
        assert args["ogpsa_stage"] == stage
        assert (args["ogpsa_train_data"], [source for _, source in args["ogpsa_reference"]]) == DATA[stage]
        assert args["bf16"]
        assert bool(args["fp8"]) == (precision != "bf16")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_fp8_page_are_accepted(
    validated: dict[tuple[str, str], dict[str, Any]], command: tuple[str, str]
) -> None:
    for args in validated[command].values():
        assert isinstance(args, dict), args
        assert args["fp8_recipe"] in command[1]


def _flags(words: str) -> list[str]:
    """Of the run; the cluster is the configuration's."""
    return re.sub(r"--(nodes|gpus-per-node) \d+", "", words).split()


def test_the_data_that_they_name_are_recipes() -> None:
    from megatron_ogpsa.data.recipes import RECIPES

    named = {source for data, references in DATA.values() for source in (data, *references)}
    assert named == {f"data/{name}.jsonl" for name in RECIPES}
    assert RECIPES["saferlhf_sft"].num_rows == RECIPES["saferlhf_dpo"].num_rows == 10_000
    assert RECIPES["halueval_sft"].num_rows == SHARED["ogpsa_reference_samples"]
