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

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ogpsa.cli.config_file import ConfigFile
from megatron_ogpsa.demo.benchmark import Benchmark
from megatron_ogpsa.demo.scoring import score
from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

BATCH = 256
"""Sequences in one forward pass."""


class Model:
    """Greedy answers and losses of one Megatron model; the prompts are dealt out to the data-parallel ranks."""

    def __init__(self, module: torch.nn.Module, *, end_ids: Sequence[int], pad_id: int) -> None:
        self._module = module.eval()
        self._end_ids = set(end_ids)
        self._pad_id = pad_id

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The most likely next token, again and again; see :class:`megatron_ogpsa.demo.scoring.Generate`."""
        return _on_all_ranks(prompts, lambda batch: self._answer(batch, max_new_tokens))

    @torch.no_grad()
    def summed_loss(self, token_ids: Sequence[list[int]], supervised: Sequence[list[bool]]) -> list[float]:
        """See :class:`megatron_ogpsa.demo.scoring.SummedLoss`."""
        return _on_all_ranks(list(zip(token_ids, supervised, strict=True)), self._losses)

    def _answer(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        sequences = [list(prompt) for prompt in prompts]
        open_ = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            # Padding on the right is behind every real token, where causal attention does not see it.
            logits_BSV = self._module(*_inputs(_padded([sequences[i] for i in open_], self._pad_id)))
            last = torch.tensor([len(sequences[i]) - 1 for i in open_])
            chosen = logits_BSV[torch.arange(len(open_)), last].argmax(dim=-1).tolist()
            for index, token in zip(open_, chosen, strict=True):
                sequences[index].append(token)
            open_ = [i for i, token in zip(open_, chosen, strict=True) if token not in self._end_ids]
            if not open_:
                break
        answers = [sequence[len(prompt) :] for prompt, sequence in zip(prompts, sequences, strict=True)]
        return [answer[:-1] if answer[-1] in self._end_ids else answer for answer in answers]

    def _losses(self, samples: list[tuple[list[int], list[bool]]]) -> list[float]:
        tokens_BS = _padded([tokens for tokens, _ in samples], self._pad_id)
        mask_BS = _padded([[int(flag) for flag in flags] for _, flags in samples], 0)[:, 1:]
        losses_BS = self._module(*_inputs(tokens_BS[:, :-1]), labels=tokens_BS[:, 1:].contiguous())
        return [float(loss) for loss in (losses_BS.double() * mask_BS).sum(dim=1)]


def _inputs(tokens_BS: Tensor) -> tuple[Tensor, Tensor, None]:
    """Tokens, positions and no mask: the model builds its causal one."""
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return tokens_BS.contiguous(), positions, None


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _on_all_ranks(items: Sequence[Any], action: Any) -> list[Any]:
    """Deal ``items`` out to ranks and batches, and put the results back in order on every rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = list(items[rank::size])
    results = [result for start in range(0, len(mine), BATCH) for result in action(mine[start : start + BATCH])]
    gathered: list[list[Any]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, results)
    ordered: list[Any] = [None] * len(items)
    for index, part in enumerate(gathered):
        ordered[index::size] = part
    return ordered


def evaluate(config: Path, data: Path, checkpoints: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores of each checkpoint, in the model that ``config`` describes. Every rank must call it."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.checkpointing import load_checkpoint

    from megatron_ogpsa.data import load_chat_tokenizer
    from megatron_ogpsa.integration.arguments import build_parser
    from megatron_ogpsa.integration.program import validated_arguments
    from megatron_ogpsa.integration.training import prepare_megatron

    prepare_megatron()
    # From where the training loop has it: there the CPU runtime has told it that no GPU is needed.
    from megatron.training.training import initialize_megatron

    args = validated_arguments(ConfigFile.read(config).as_flags(build_parser(), []))
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    initialize_megatron()
    builder = container.model.get_builder_cls()(container.model)
    modules = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), ddp_config=container.ddp, wrap_with_ddp=False
    )
    args.finetune = args.no_load_optim = args.no_load_rng = True
    tokenizer = load_chat_tokenizer(args.tokenizer_type, args.tokenizer_model, args.chat_template)
    for name, checkpoint in checkpoints.items():
        folder, _, iteration = checkpoint.partition("@")
        args.load, args.ckpt_step = folder, int(iteration) if iteration else None
        load_checkpoint(modules, None, None)
        model = Model(modules[0], end_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
        yield name, score(Benchmark(data), tokenizer, model.generate, model.summed_loss).as_json()


def main(argv: Sequence[str]) -> None:
    """Write the scores of all checkpoints to one JSON file, on rank 0."""
    install_if_no_gpu()
    config, data, out, *named = argv
    checkpoints = {name: path for name, _, path in (item.partition("=") for item in named)}
    scores = dict(evaluate(Path(config), Path(data), checkpoints))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
