"""Converted models on Transformer Engine's layers, which all users with GPUs have, and back.

Mixtures of experts keep a norm under a key of its own there.
"""

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
DENSE = tuple(name for name in CONFIGS if not name.startswith(MODELS))
OF_MEGATRON, OF_TRANSFORMER_ENGINE = (
    f"decoder.layers.{name}weight" for name in ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
)

Distributed = Callable[[int], WorkerGroup]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``NAME`` as transformers wrote it, and ``NAME-megatron``."""
    top = tmp_path_factory.mktemp("converted")
    names = (*MODELS, *DENSE)
    for name in names:
        build(top / name, CONFIGS[name]())
    for outcome in convert([(top / name, top / f"{name}-megatron") for name in names]):
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


def test_logits_of_dense_models_are_those_of_transformers(distributed_te: Distributed, converted: Path) -> None:
    """All that families differ in: frequencies, biases, norms of queries and keys, a window shorter than the row, tied
    embeddings. In fp32, for which Transformer Engine takes its unfused attention.
    """
    folders = {name: converted / f"{name}-megatron" for name in DENSE}
    (found,) = distributed_te(1).run("tests.conversion.cases:logits", folders=folders)
    assert [*found] == [*DENSE]
    for name, of_megatron in found.items():
        expected, inv_freq = logits_of(converted / name)
        vocabulary = expected.shape[-1]
        assert not of_megatron["logits"][..., vocabulary:].any(), name  # rows that were added are zero
        assert (of_megatron["logits"][..., :vocabulary] - expected).abs().max() < TOLERANCE, name
        assert expected.abs().max() > 1, name
        assert torch.allclose(of_megatron["inv_freq"], inv_freq, rtol=1e-5, atol=0), name


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
