"""Megatron computes what transformers computes, and gives back what it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conversion.conftest import Conversions
from tests.conversion.models import CONFIGS, UNSAID, logits_of
from tests.harness import WorkerGroup

# Logits of some units, of fp32 sums of at most 48 terms in two layers: a wrong rotary frequency or norm is off by 0.01.
TOLERANCE = 1e-4

LAYOUTS = {"tp1": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    distributed: Callable[[int], WorkerGroup],
    conversions: Conversions,
    layout: str,
    record_property: Callable[[str, object], None],
) -> None:
    world_size, sizes = LAYOUTS[layout]
    folders = {name: conversions.megatron(name) for name in [*CONFIGS, "bf16-in-files"]}  # all into fp32 parameters
    *_, last = distributed(world_size).run("tests.conversion.cases:logits", folders=folders, **sizes)
    for name, found in last.items():
        expected, inv_freq = logits_of(conversions.original(name))
        vocabulary = expected.shape[-1]
        assert not found["logits"][..., vocabulary:].any(), name  # rows that were added are zero
        error = (found["logits"][..., :vocabulary] - expected).abs().max().item()
        record_property(f"largest difference of {name}", error)
        assert error < TOLERANCE, name
        assert expected.abs().max() > 1, name
        assert torch.allclose(found["inv_freq"], inv_freq, rtol=1e-5, atol=0), name


@pytest.mark.parametrize("name", [*CONFIGS, "bf16-in-files", UNSAID])
def test_there_and_back_is_bitwise(conversions: Conversions, name: str) -> None:
    original, back = conversions.original(name), conversions.back(name)
    before, after = weights(original), weights(back)
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype, tensor
        assert torch.equal(before[tensor], after[tensor]), tensor
    carried = [path for path in original.iterdir() if "safetensors" not in path.name]
    assert {path.name for path in carried} == {path.name for path in back.iterdir() if "safetensors" not in path.name}
    for path in carried:
        assert path.read_bytes() == (back / path.name).read_bytes(), path.name
    assert (back / "generation_config.json").exists()


def test_files_are_read_and_written_in_parts(conversions: Conversions) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (conversions.original("bf16-in-files"), conversions.back("bf16-in-files")):
        files = [*folder.glob("model-*.safetensors")]
        assert len(files) > 2
        assert sum(path.stat().st_size for path in files) > 8000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
