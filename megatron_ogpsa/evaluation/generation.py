"""Greedy answers to prompts in any layout, with Megatron's static inference context: its cache of keys and values.

Megatron's wrapper runs the forward pass through tensor- and pipeline-parallel ranks. A batch of prompts is taken as by its
static engine: as many tokens as the shortest prompt has go through at once, and from there on one position at a time, where
each longer prompt goes on with its own tokens until it ends. Prompts of like length share a batch, so that little is lost.
Data-parallel replicas answer a share of the batches each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from torch import Tensor
from tqdm import tqdm

from megatron_ogpsa.console.progress import progress_bar
from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel


def generate(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    vocab_size: int,
    batch_size: int,
    title: str = "answers",
) -> list[list[int]]:
    """The most probable next token, again and again. Collective over all ranks, which get the same.

    Args:
        prompts: token ids, at least one each; prompt and answer together within ``--max-position-embeddings``.
        end_ids: tokens that end an answer.
        vocab_size: tokens that the tokenizer has; the rows that pad the embedding are never chosen.
        batch_size: prompts that go through a replica together, whose keys and values are in memory at a time.
        title: what the progress line says.

    Returns:
        For each prompt the tokens after it, without the one that ended the answer.
    """
    replica, num_replicas = _replica(model)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    mine = batches[replica::num_replicas]
    decoder = _Decoder(model.module, max_new_tokens, frozenset(end_ids), pad_id, vocab_size)
    found: dict[int, list[int]] = {}
    is_first = dist.get_rank() == 0
    with progress_bar(title, len(mine) * max_new_tokens, " tokens/batch", is_shown=is_first) as bar:
        for batch in mine:
            before = bar.n
            answers = decoder.answer([prompts[index] for index in batch], bar)
            found |= dict(zip(batch, answers, strict=True))
            bar.update(before + max_new_tokens - bar.n)  # an answer may end early
    everyones: list[dict[int, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, found)
    for part in everyones:
        found |= part
    return [found[index] for index in range(len(prompts))]


def _replica(model: LoadedModel) -> tuple[int, int]:
    """This rank's replica and their number; one if experts are spread over the replicas, which then go in step."""
    args = model.args
    spans_replicas = args.num_experts and (args.expert_tensor_parallel_size or 1) > args.tensor_model_parallel_size
    if args.expert_model_parallel_size > 1 or spans_replicas:
        return 0, 1
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


class _Decoder:
    """One replica's loop; every rank of it makes each call."""

    def __init__(self, module: Any, max_new_tokens: int, end_ids: frozenset[int], pad_id: int, vocab_size: int) -> None:
        self._module = module
        self._max_new_tokens = max_new_tokens
        self._end_ids = end_ids
        self._pad_id = pad_id
        self._vocab_size = vocab_size
        self._device = next(module.parameters()).device
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._last = parallel_state.get_pipeline_model_parallel_last_rank()

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], bar: tqdm[Any]) -> list[list[int]]:
        """Answers to the prompts of one batch."""
        lengths = [len(prompt) for prompt in prompts]
        limits = [length + self._max_new_tokens for length in lengths]
        tokens_BS = torch.full((len(prompts), max(limits)), self._pad_id, dtype=torch.int64, device=self._device)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
        wrapper = GPTInferenceWrapper(self._module, StaticInferenceContext(len(prompts), max(limits)))
        wrapper.prep_model_for_inference()
        inputs = wrapper.prep_inference_input(tokens_BS)
        ends: list[int | None] = [None] * len(prompts)  # where each answer has ended
        done = 0
        for position in range(min(lengths), max(limits)):
            logits = wrapper.run_one_forward_step(wrapper.get_batch_for_context_window(inputs, done, position))
            done = position
            chosen = self._chosen(logits, len(prompts)).tolist()
            for row, token in enumerate(chosen):
                if ends[row] is not None or position < lengths[row]:
                    continue
                if token in self._end_ids or position >= limits[row]:
                    ends[row] = position
                else:
                    tokens_BS[row, position] = token
            bar.update(int(position >= max(lengths)))
            if all(end is not None for end in ends):
                break
        return [
            tokens_BS[row, length : min(limit, end if end is not None else limit)].tolist()
            for row, (length, limit, end) in enumerate(zip(lengths, limits, ends, strict=True))
        ]

    def _chosen(self, logits: Tensor | None, batch: int) -> Tensor:
        """The most probable tokens, int64 [batch], on every stage; only the last one has logits."""
        if logits is not None:
            chosen = logits[:, -1, : self._vocab_size].argmax(dim=-1)
        else:
            chosen = torch.empty(batch, dtype=torch.int64, device=self._device)
        if dist.get_world_size(self._group) > 1:
            dist.broadcast(chosen, src=self._last, group=self._group)
        return chosen
