"""Scores of Megatron checkpoints: ``python -m megatron_ogpsa.demo.evaluate CONFIG.yaml DATA OUT.json NAME=CHECKPOINT ...``.

A checkpoint is a folder, whose latest iteration is meant, or ``FOLDER@ITERATION``.

One job under torchrun scores all checkpoints one after the other, because starting processes costs more than scoring. Each
rank holds a whole model, whatever layout trained it (Megatron reshards when it loads), and answers its share of prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.demo.benchmark import Benchmark
from megatron_ogpsa.demo.scoring import score
from megatron_ogpsa.evaluation.request import Checkpoint
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

BATCH = 256
"""Prompts that go through a rank together."""


def evaluate(config: Path, data: Path, checkpoints: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores of each checkpoint, in the model that ``config`` describes. Every rank must call it."""
    from megatron_ogpsa.evaluation.generation import generate
    from megatron_ogpsa.evaluation.losses import measure
    from megatron_ogpsa.integration.arguments.parser import build_parser
    from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel
    from megatron_ogpsa.integration.inputs.datasets import chat_tokenizer, load_conversations

    model = LoadedModel.build(ConfigFile.read(config).as_flags(build_parser(), []))
    tokenizer = chat_tokenizer()

    def answers(prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        return generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            batch_size=BATCH,
        )

    def loss_on(conversations: Path) -> tuple[float, int]:
        found = measure(model, conversations.stem, load_conversations(str(conversations)))
        return found.loss, found.tokens

    for name, checkpoint in checkpoints.items():
        asked = Checkpoint.of(checkpoint)
        model.load(asked.folder, asked.iteration)
        yield name, score(Benchmark(data), tokenizer, answers, loss_on).as_json()


def main(argv: Sequence[str]) -> None:
    """Write the scores of all checkpoints to one JSON file, on rank 0."""
    install_if_no_gpu()
    import torch.distributed as dist

    config, data, out, *named = argv
    checkpoints = {name: path for name, _, path in (item.partition("=") for item in named)}
    scores = dict(evaluate(Path(config), Path(data), checkpoints))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
