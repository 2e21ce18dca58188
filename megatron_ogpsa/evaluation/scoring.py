"""Scores of one checkpoint after another, on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ogpsa.data import ChatTokenizer, source_kind
from megatron_ogpsa.data.prompts import Prompt, read_prompts
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.generation import generate
from megatron_ogpsa.evaluation.judges import verdicts_of
from megatron_ogpsa.evaluation.losses import Dataset, Loss, measure
from megatron_ogpsa.evaluation.rates import Rate, rate_of
from megatron_ogpsa.evaluation.request import Checkpoint, Request
from megatron_ogpsa.integration.arguments.packing import check_packing
from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel
from megatron_ogpsa.integration.inputs.datasets import chat_tokenizer, load_conversations, load_pairs
from megatron_ogpsa.integration.ranks.agreement import agreed, from_rank_0


@dataclass(frozen=True)
class Answered:
    """Answers to one set of prompts, and the verdicts on them.

    Attributes:
        by_patterns, by_judge: 1 where an answer refuses, 0 where it does not; a judge may say anything in between.
    """

    prompts: list[Prompt]
    answers: list[str]
    by_patterns: list[float]
    by_judge: list[float] | None

    @property
    def refused(self) -> Rate:
        """Share of answers that refuse by patterns."""
        return rate_of(self.by_patterns)

    @property
    def judged(self) -> Rate | None:
        """Mean of the judge's verdicts."""
        return None if self.by_judge is None else rate_of(self.by_judge)


@dataclass(frozen=True)
class Scores:
    """Of one checkpoint.

    Attributes:
        title: ``before`` and ``after`` of two, or what the checkpoint was called.
        losses, answers: by the names that the user has given.
    """

    title: str
    folder: str
    iteration: int
    losses: dict[str, Loss]
    answers: dict[str, Answered]


def score_checkpoints(model: LoadedModel, request: Request) -> Iterator[Scores]:
    """Scores of each checkpoint; data and prompts are read before the first one is loaded. Collective.

    Raises:
        UserError: on all ranks alike: no ``--load``, a checkpoint, a source, a prompt or the judge's verdict is unfit.
    """
    load, iteration = model.args.load, model.args.ckpt_step
    if not load:
        raise UserError("--load is missing: name the folder of checkpoints to score")
    if request.data:
        agreed(lambda: _check_rows(model))
    datasets = {name: _read_data(model, name, source) for name, source in request.data.items()}
    prompts = {name: _read_prompts(model, name, source, request) for name, source in request.prompts.items()}
    wanted = [*(("--compare", checkpoint) for checkpoint in request.compare), ("--load", Checkpoint(load, iteration))]
    titles = ["before", "after"] if len(wanted) == 2 else [str(checkpoint) for _, checkpoint in wanted]
    for title, (flag, checkpoint) in zip(titles, wanted, strict=True):
        found = model.load(checkpoint.folder, checkpoint.iteration, flag=flag)
        losses = {name: measure(model, name, dataset) for name, dataset in datasets.items()}
        answers = {name: _answer(model, name, asked, request) for name, asked in prompts.items()}
        yield Scores(title, checkpoint.folder, found, losses, answers)


def _check_rows(model: LoadedModel) -> None:
    if model.args.ogpsa_packing:
        check_packing(model.args, "--ogpsa-packing", of_validation=False)


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


def _answer(model: LoadedModel, name: str, asked: list[tuple[Prompt, list[int]]], request: Request) -> Answered:
    tokenizer = chat_tokenizer()
    found = generate(
        model,
        [token_ids for _, token_ids in asked],
        max_new_tokens=request.max_new_tokens,
        end_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        title=f"answers to {name}",
    )
    prompts = [prompt for prompt, _ in asked]
    answers = [tokenizer.decode(token_ids).strip() for token_ids in found]
    return Answered(prompts, answers, request.patterns.verdicts(answers), _judged(request, prompts, answers))


def _judged(request: Request, prompts: list[Prompt], answers: list[str]) -> list[float] | None:
    """The judge's verdicts: on rank 0, because a judge may cost money; the same on all ranks."""
    if not request.judge_name:
        return None
    texts, judge = [prompt.text for prompt in prompts], request.judge
    return from_rank_0(lambda: None if judge is None else verdicts_of(judge, request.judge_name, texts, answers))
