"""Scores of one checkpoint after another, on all ranks."""

from __future__ import annotations

import argparse

import torch

from megatron_ogpsa.data import ChatTokenizer, source_kind
from megatron_ogpsa.data.prompts import Prompt, read_prompts
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.generation import generate
from megatron_ogpsa.evaluation.judging import judge_together
from megatron_ogpsa.evaluation.losses import Dataset, measure
from megatron_ogpsa.evaluation.request import Checkpoint, Request
from megatron_ogpsa.evaluation.results import Results
from megatron_ogpsa.evaluation.scores import Answered, Scores
from megatron_ogpsa.integration.arguments.packing import check_packing
from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel, require_checkpoint
from megatron_ogpsa.integration.inputs.datasets import chat_tokenizer, load_conversations, load_pairs
from megatron_ogpsa.integration.ranks.agreement import agreed, from_rank_0, of_this_rank


def check_flags(args: argparse.Namespace, request: Request) -> None:
    """Refuse Megatron's flags that the request cannot be met with.

    Raises:
        UserError: ``--load`` is missing, or rows of ``--data`` cannot be packed as the flags say.
    """
    if not args.load:
        raise UserError("--load is missing: name the folder of checkpoints to score")
    if request.data and args.ogpsa_packing:
        check_packing(args, "--ogpsa-packing", of_validation=False)


def score_checkpoints(model: LoadedModel, request: Request, results: Results) -> None:
    """Score each checkpoint into ``results``. Collective.

    All folders are looked at, and data and prompts read, before the first one is loaded.

    Raises:
        UserError: on all ranks alike: a checkpoint, a source, a prompt, the judge's verdict or a file of results is unfit.
    """
    last = Checkpoint(model.args.load, model.args.ckpt_step)
    wanted = [*(("--compare", checkpoint) for checkpoint in request.compare), ("--load", last)]
    titles = ["before", "after"] if len(wanted) == 2 else [str(checkpoint) for _, checkpoint in wanted]
    from_rank_0(lambda: _require_checkpoints(wanted))
    results.require_places()
    datasets = {name: _read_data(model, name, source) for name, source in request.data.items()}
    prompts = {name: _read_prompts(model, name, source, request) for name, source in request.prompts.items()}
    for title, (flag, checkpoint) in zip(titles, wanted, strict=True):
        loaded = model.load(checkpoint.folder, checkpoint.iteration, flag=flag)
        scores = Scores(title, checkpoint.folder, loaded.iteration, loaded.differences, losses={}, answers={})
        results.begin(scores)
        scores.losses.update({name: measure(model, name, dataset) for name, dataset in datasets.items()})
        _answer(model, scores, prompts, request, results)
        results.finish()


def _require_checkpoints(wanted: list[tuple[str, Checkpoint]]) -> None:
    for flag, checkpoint in wanted:
        require_checkpoint(flag, checkpoint.folder, checkpoint.iteration)


def _read_data(model: LoadedModel, name: str, source: str) -> Dataset:
    def kind_of_rows() -> str:
        if (kind := source_kind(source)) == "preference":
            check_packing(model.args, "rows of two answers", of_validation=False)
        return kind

    try:
        kind = agreed(kind_of_rows)
        dataset: Dataset = (load_conversations if kind == "chat" else load_pairs)(source)
    except UserError as error:
        raise UserError(f"--data {name}: {error}") from None
    return dataset


def _read_prompts(model: LoadedModel, name: str, source: str, request: Request) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their token ids."""
    tokenizer, most = chat_tokenizer(), model.args.max_position_embeddings

    def read() -> list[tuple[Prompt, list[int]]]:
        found = [(prompt, _encoded(tokenizer, prompt)) for prompt in read_prompts(source)]
        for prompt, token_ids in found:
            if len(token_ids) + request.max_new_tokens > most:
                raise UserError(
                    f"{prompt.where}: {len(token_ids)} tokens and --max-new-tokens {request.max_new_tokens} are more than "
                    f"--max-position-embeddings {most}: shorten the prompt or the answer"
                )
        return found

    try:
        return agreed(read)
    except UserError as error:
        raise UserError(f"--prompts {name}: {error}") from None


def _encoded(tokenizer: ChatTokenizer, prompt: Prompt) -> list[int]:
    try:
        return tokenizer.encode_prompt(prompt.messages, prompt.extras)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from None


def _answer(
    model: LoadedModel,
    scores: Scores,
    prompts: dict[str, list[tuple[Prompt, list[int]]]],
    request: Request,
    results: Results,
) -> None:
    """Answers to all sets, and only then verdicts on them: a judge may fail, and answers take the machine's time."""
    for name, asked in prompts.items():
        answers = _generated(model, name, asked, request)
        unknown: list[float | None] | None = [None] * len(answers) if request.judge_name else None
        by_patterns = request.patterns.verdicts(answers)
        scores.answers[name] = Answered([prompt for prompt, _ in asked], answers, by_patterns, unknown)
        results.keep_answers()
        results.tell_answers(scores, name)
    if request.judge_name:
        for answered in scores.answers.values():
            judge_together(request, answered, results.write_answers)
        results.keep_answers()


def _generated(model: LoadedModel, name: str, asked: list[tuple[Prompt, list[int]]], request: Request) -> list[str]:
    tokenizer = chat_tokenizer()
    try:
        found = generate(
            model,
            [token_ids for _, token_ids in asked],
            max_new_tokens=request.max_new_tokens,
            end_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            batch_size=request.generation_batch_size,
            title=f"answers to {name}",
        )
    except torch.OutOfMemoryError as error:
        size = request.generation_batch_size
        remedy = "use a smaller one" if size > 1 else "spread the model over more GPUs, or shorten prompts and answers"
        # The other ranks wait for this one's answers.
        raise of_this_rank(
            UserError(f"--prompts {name}: --generation-batch-size {size} wants more memory than the GPU has: {remedy}")
        ) from error
    return [tokenizer.decode(token_ids).strip() for token_ids in found]
