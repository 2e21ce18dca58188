"""The norm before experts, which Megatron's own layers and Transformer Engine's keep under two keys."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_ogpsa.conversion import convert
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser
from tests.checkpoints.damage import DAMAGES
from tests.conversion.conftest import Conversions
from tests.conversion.key_cases import ALONE, FUSED, LAYERS, WIDTH, norms, values, write
from tests.conversion.models import CONFIGS
from tests.harness import WorkerGroup

STATES = {
    f"{key.rpartition('.')[0]}._extra_state/shard_{layer}_{LAYERS}" for key in (FUSED, ALONE) for layer in range(LAYERS)
}


@pytest.mark.parametrize("keys", [(FUSED,), (ALONE,), (FUSED, ALONE)], ids=["megatron", "transformer-engine", "both"])
def test_a_norm_is_read_under_either_key(
    distributed: Callable[[int], WorkerGroup], tmp_path: Path, keys: tuple[str, ...]
) -> None:
    write(tmp_path, *keys)
    (found,) = distributed(1).run("tests.conversion.key_cases:read", folder=tmp_path)
    for norm, value in zip(norms(), found, strict=True):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, values(norm))


def test_the_other_key_is_no_part_of_a_model_without_experts(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, FUSED, ALONE)
    with pytest.raises(UserError, match=f"the tensor {ALONE} is not part of the model"):
        checkpoint.require_model([replace(norm, other_key=None) for norm in norms()])


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("__0_0_0.distcp", "deleted", r"not a torch_dist checkpoint \(.*No such file or directory"),
        (".metadata", "deleted", r"not a torch_dist checkpoint \(.*No such file or directory"),
        (".metadata", "zeroed", r"not a torch_dist checkpoint"),
        ("__0_2_0.distcp", "deleted", rf"{FUSED} cannot be read \(.*No such file or directory.*__0_2_0.distcp"),
        ("__0_2_0.distcp", "truncated", rf"{FUSED} cannot be read \(.*: restore it"),
        ("__0_2_0.distcp", "zeroed", rf"{FUSED} cannot be read \(.*: restore it"),
    ],
)
def test_a_torn_checkpoint_without_a_manifest_is_told_in_a_line(
    distributed: Callable[[int], WorkerGroup], tmp_path: Path, file: str, damage: str, told: str
) -> None:
    """As Megatron saves one, of which a copy was cut short: torch's exception is no Exception."""
    write(tmp_path, FUSED)
    (tmp_path / "release/integrity.json").unlink()
    DAMAGES[damage](tmp_path / "release" / file)
    (error,) = distributed(1).run("tests.conversion.key_cases:error", folder=tmp_path)
    assert re.search(rf"{tmp_path}/release: {told}", error)
    assert "\n" not in error


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_a_model_with_experts_is_written_under_both_keys(conversions: Conversions, name: str) -> None:
    stored = FileSystemReader(conversions.megatron(name) / "release").read_metadata().state_dict_metadata
    assert stored.keys() >= {FUSED, ALONE} | STATES


def test_a_model_without_experts_is_written_under_one(conversions: Conversions) -> None:
    stored = FileSystemReader(conversions.megatron("llama2") / "release").read_metadata().state_dict_metadata
    assert FUSED in stored
    assert not any("pre_mlp_layernorm" in key for key in stored)


@pytest.mark.parametrize(
    ("name", "value", "means"),
    [
        ("use_mup", True, False),
        ("qk_l2_norm", True, False),
        ("glu_linear_offset", 1.0, 0.0),
        ("activation_func_clamp_value", 7.0, None),
        ("moe_apply_probs_on_input", True, False),
        ("rotary_base", 500000, 10000),
    ],
)
def test_a_model_whose_tensors_alone_are_those_of_the_configuration_is_refused(
    tmp_path: Path, name: str, value: object, means: object
) -> None:
    """Megatron computes something else with them than transformers would."""
    checkpoint = write(tmp_path, FUSED)
    expected = build_parser().parse_args([])
    checkpoint.arguments = Namespace(**vars(expected))
    checkpoint.require_arguments(expected)
    setattr(checkpoint.arguments, name, value)
    with pytest.raises(UserError, match=f"trained with --{name.replace('_', '-')} {value}, config.json means {means}"):
        checkpoint.require_arguments(expected)


def test_what_is_told_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes under both keys, as the bar counts them; tensors of the Hugging Face folder."""
    config = CONFIGS["mixtral"]()
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path / "source")
    save_file({norm.names[0]: values(norm) for norm in norms()}, tmp_path / "source/model.safetensors")
    advanced: list[int] = []
    monkeypatch.setattr(convert, "arguments_of", lambda flags: Namespace())
    monkeypatch.setattr(convert, "saved_arguments", lambda args: args)
    monkeypatch.setattr(convert, "unsharded", lambda *_: nullcontext(norms()))
    monkeypatch.setattr(convert, "_progress", lambda num_bytes, what: nullcontext(advanced.append))
    converted = convert.to_megatron(tmp_path / "source", tmp_path / "target")
    assert sum(advanced) == converted.num_bytes == 2 * LAYERS * WIDTH * 2
    assert converted.num_tensors == LAYERS
