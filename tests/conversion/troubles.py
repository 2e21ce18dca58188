"""Hugging Face folders that are not converted, and what the user is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return damage


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def torn(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


Q = "model.layers.1.self_attn.q_proj.weight"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGER_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}

TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        r"not a Hugging Face folder \(config.json is missing",
    ),
    "no-json": (lambda folder: (folder / "config.json").write_text("{"), r"config.json cannot be read"),
    "no-name-of-an-architecture": (
        with_config(architectures=[{"a": 1}]),
        r"the architecture \{'a': 1\} is not supported: convert one of LlamaForCausalLM",
    ),
    "another-model-type": (
        with_config(architectures=["LlamaForCausalLM"], model_type="granite"),
        r"LlamaForCausalLM with model_type granite is not supported, since .*: convert a model of model_type llama$",
    ),
    "architecture": (
        with_config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        r"GPT2LMHeadModel is not supported: convert one of LlamaForCausalLM, .*MixtralForCausalLM",
    ),
    "own-code": (
        with_config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}),
        r"with model_type mine is not supported, since its layers may be others: convert a model of",
    ),
    "wrong-type": (with_config(hidden_size="wide"), r"not a configuration of llama .*hidden_size"),
    "quantised": (with_config(quantization_config={"quant_method": "awq"}), r"quantization_config"),
    "yarn": (
        with_config(rope_parameters=YARN),
        r"rope_type 'yarn': .* has default, linear and llama3: convert a model with one of these$",
    ),
    "linear-fraction": (
        with_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
        r"linear rope scaling with factor 2.5: Megatron's --rotary-seq-len-interpolation-factor is a whole number",
    ),
    "rope-by-layer": (
        with_config(rope_parameters={"full_attention": DEFAULT_ROPE, "sliding_attention": DEFAULT_ROPE}),
        r"rope_parameters of full_attention, sliding_attention: Megatron rotates alike in every layer",
    ),
    "llama3-constants": (
        with_config(rope_parameters=LONGER_LLAMA3),
        r"original_max_position_embeddings 4096: Megatron's is fixed at 8192",
    ),
    "rotary-base": (
        with_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4 + 0.5}),
        r"rope_theta 10000.5",
    ),
    "attention-bias": (with_config(attention_bias=True), r"attention_bias True"),
    "activation": (with_config(hidden_act="gelu"), r"hidden_act 'gelu'"),
    "missing-tensor": (with_tensors(lambda tensors: tensors.pop(Q)), rf"the tensor {Q} is missing"),
    "extra-tensor": (
        with_tensors(lambda tensors: tensors.update({"model.layers.2.norm.weight": torch.ones(2)})),
        r"the tensor model.layers.2.norm.weight is not part of the model",
    ),
    "misshaped": (
        with_tensors(lambda tensors: tensors.update({Q: torch.ones(3, 32)})),
        rf"{Q} is \[3, 32\], and config.json makes it \[32, 32\]",
    ),
    "mixed-dtypes": (
        with_tensors(lambda tensors: tensors.update({Q: tensors[Q].bfloat16()})),
        rf"{Q} is torch.bfloat16, .*--dtype fp32",
    ),
    "quantised-tensor": (
        with_tensors(lambda tensors: tensors.update({Q: torch.ones(32, 32, dtype=torch.int8)})),
        rf"{Q} is I8",
    ),
    "another-head": (
        with_config(tie_word_embeddings=True),
        r"lm_head.weight is not model.embed_tokens.weight, .*set tie_word_embeddings to false",
    ),
    "pickled": (only_pickled, r"pytorch_model.bin: pickled weights are not read.*save_pretrained"),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"holds an adapter \(adapter_config.json\), .*merge_and_unload\(\) and save_pretrained\(\)",
    ),
    "adapter-alone": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        r"holds an adapter \(adapter_config.json\)",
    ),
    "torn": (torn, r"model.safetensors: cannot be read"),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), r"has no weights"),
}
"""Name → what is done to a whole folder, and what the line says."""


def make(whole: Path, folder: Path) -> list[tuple[Path, Path]]:
    """A folder for each trouble, in the order of the table; source and target of each conversion."""
    lines = []
    for name, (damage, _) in TROUBLES.items():
        shutil.copytree(whole, folder / name)
        damage(folder / name)
        lines.append((folder / name, folder / f"{name}-megatron"))
    return lines
