"""Converted mixtures of experts on Transformer Engine's layers, which keep a norm under a key of its own, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.conversion.conftest import convert
from tests.conversion.models import CONFIGS, build, logits_of
from tests.conversion.test_families import TOLERANCE, weights
from tests.harness import WorkerGroup

MODELS = ("mixtral", "qwen3-moe")
OF_MEGATRON, OF_TRANSFORMER_ENGINE = (
    f"decoder.layers.{name}weight" for name in ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
)

Distributed = Callable[[int], WorkerGroup]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``NAME`` as transformers wrote it, and ``NAME-megatron``."""
    top = tmp_path_factory.mktemp("converted")
    for name in MODELS:
        build(top / name, CONFIGS[name]())
    for outcome in convert([(top / name, top / f"{name}-megatron") for name in MODELS]):
        assert outcome.exit_code == 0, outcome.errors
    return top


@pytest.mark.parametrize("grouped", [False, True])
def test_logits_are_those_of_transformers(distributed_te: Distributed, converted: Path, grouped: bool) -> None:
    """Every parameter is filled, or they were NaN; with experts one by one, and as one grouped product."""
    folders = {name: converted / f"{name}-megatron" for name in MODELS}
    (found,) = distributed_te(1).run("tests.conversion.cases:logits", folders=folders, grouped=grouped)
    for name in MODELS:
        expected, _ = logits_of(converted / name)
        assert (found[name]["logits"] - expected).abs().max() < TOLERANCE, name


def test_a_checkpoint_of_these_layers_is_exported(distributed_te: Distributed, converted: Path) -> None:
    folders = {name: converted / f"{name}-megatron" for name in MODELS}
    distributed_te(1).run("tests.conversion.cases:saved", folders=folders, target=converted / "saved")
    lines = [
        (converted / "saved" / name, converted / f"{name}-back", "--ckpt-step", "1", "--hf", converted / name)
        for name in MODELS
    ]
    for name, outcome in zip(MODELS, convert(lines), strict=True):
        keys = FileSystemReader(converted / "saved" / name / "iter_0000001").read_metadata().state_dict_metadata
        assert (OF_TRANSFORMER_ENGINE in keys, OF_MEGATRON in keys) == (True, False)
        assert outcome.exit_code == 0, outcome.errors
        before, after = weights(converted / name), weights(converted / f"{name}-back")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[tensor], after[tensor]) for tensor in before), name
