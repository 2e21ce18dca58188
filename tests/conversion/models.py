"""A tiny random model of each family, written by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.data.conftest import build_hugging_face_folder

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
TRAINED_SHAPE = {"vocab_size": 400, "max_position_embeddings": 128}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "llama2-linear": lambda: LlamaConfig(**SHAPE, rope_parameters=LINEAR_ROPE),
    "llama3.2": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "qwen2.5": lambda: Qwen2Config(**SHAPE | {"vocab_size": 101}),  # rows that TP2 cannot share out
    "qwen2.5-tied": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, norm_topk_prob=True),
    "qwen3-moe-unnormalised": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, norm_topk_prob=False),
}

TRAINED = "trained"
"""One that learns from text."""


def trained_config() -> PreTrainedConfig:
    """Untied, with Llama 3's rope scaling."""
    return LlamaConfig(**SHAPE | TRAINED_SHAPE, rope_parameters=LLAMA3_ROPE)


UNSAID = "unsaid"
"""One whose configuration leaves out what is transformers' default."""


def build_unsaid(folder: Path) -> None:
    """Write it: a model of as many tokens as a Llama has by default."""
    build(folder, LlamaConfig(**SHAPE | {"vocab_size": LlamaConfig().vocab_size}))
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    default = LlamaConfig().to_dict()
    kept = {name: value for name, value in said.items() if value != default.get(name) or name == "model_type"}
    path.write_text(json.dumps(kept), encoding="utf-8")


SEQUENCE_LENGTH = 24


def build(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Write a model whose every tensor is random: as initialised, biases are zero and norms one."""
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            param.copy_(torch.empty_like(param).normal_(mean, 0.3, generator=generator))
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True)
    model.to(dtype).save_pretrained(folder, **saving)
    return folder


def build_chat_model(folder: Path) -> Path:
    """A small random Llama with a tokenizer and its chat template."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    build(folder, LlamaConfig(**shape, vocab_size=400, max_position_embeddings=512, tie_word_embeddings=True))
    return build_hugging_face_folder(folder)


def tokens(vocabulary: int = 96) -> Tensor:
    """[2 rows, positions], int64."""
    return torch.randint(vocabulary, (2, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(2))


def logits_of(folder: Path) -> tuple[Tensor, Tensor]:
    """What transformers makes of :func:`tokens`: logits [rows, positions, vocabulary], rotary frequencies; fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens()).logits, model.model.rotary_emb.inv_freq
