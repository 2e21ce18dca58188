"""What is to be scored, from the flags of ``megatron-ogpsa evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.judges import Judge, check_judge, load_judge
from megatron_ogpsa.evaluation.refusals import RefusalPatterns

DEFAULT_NEW_TOKENS = 64

DEFAULT_BATCH = 32
"""Prompts that go through a replica together."""


def add_request_arguments(parser: argparse._ActionsContainer) -> None:
    """Data, prompts, how refusals are told, and where results are written."""
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=SOURCE",
        help="conversations or preference pairs to take the loss on; repeat",
    )
    parser.add_argument(
        "--prompts", action="append", metavar="NAME=SOURCE", help="prompts to answer, and tell refusals of; repeat"
    )
    parser.add_argument(
        "--judge",
        metavar="FILE.py:FUNCTION",
        help="your judge(prompt, answer) or judge(prompt, answer, messages) of refusals, beside the patterns",
    )
    parser.add_argument(
        "--refusal-patterns", metavar="FILE", help="regular expressions, one a line, for the built-in ones"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", help=f"of an answer, which is chosen greedily ({DEFAULT_NEW_TOKENS})"
    )
    parser.add_argument(
        "--generation-batch-size",
        metavar="N",
        help=f"prompts that are answered together; fewer take less memory ({DEFAULT_BATCH})",
    )
    parser.add_argument("--answers", metavar="FILE", help="write prompts, answers and verdicts as JSON Lines")
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    parser.add_argument(
        "--compare",
        action="append",
        metavar="FOLDER[@ITERATION]",
        help="score this checkpoint first, beside that of --load; repeat",
    )


@dataclass(frozen=True)
class Checkpoint:
    """A folder of checkpoints, and which of them; None is the newest."""

    folder: str
    iteration: int | None

    @classmethod
    def of(cls, text: str) -> Checkpoint:
        """``FOLDER`` or ``FOLDER@ITERATION``."""
        folder, _, iteration = text.rpartition("@")
        return cls(folder, int(iteration)) if folder and iteration.isdecimal() else cls(text, None)

    def __str__(self) -> str:
        return self.folder if self.iteration is None else f"{self.folder}@{self.iteration}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be scored.

    Attributes:
        data, prompts: name → source.
        judge: imported where it judges, and None elsewhere.
        judge_name: as it was given; empty without a judge.
        compare: checkpoints that are scored before the one of ``--load``, in this order.
    """

    data: dict[str, str]
    prompts: dict[str, str]
    patterns: RefusalPatterns
    judge: Judge | None
    judge_name: str
    max_new_tokens: int
    generation_batch_size: int
    answers: Path | None
    json: Path | None
    compare: tuple[Checkpoint, ...]

    @classmethod
    def of(cls, given: argparse.Namespace, *, judges_here: bool = True) -> Request:
        """Check the flags.

        Args:
            judges_here: import the judge, which may load a model; otherwise look whether its file is there.

        Raises:
            UserError: nothing is to be scored, or a flag's value cannot be taken.
        """
        data, prompts = _named("--data", given.data or ()), _named("--prompts", given.prompts or ())
        if not data and not prompts:
            raise UserError("nothing to score: give --data NAME=SOURCE or --prompts NAME=SOURCE")
        for flag, value in (("--judge", given.judge), ("--answers", given.answers)):
            if value and not prompts:
                raise UserError(f"{flag} {value}: there are no answers: give --prompts NAME=SOURCE too")
        if given.answers and given.json and Path(given.answers).resolve() == Path(given.json).resolve():
            raise UserError(f"--json {given.json}: is the file of --answers, which it would replace: name another one")
        if given.judge and not judges_here:
            check_judge(given.judge)
        return cls(
            data=data,
            prompts=prompts,
            patterns=RefusalPatterns.read(Path(given.refusal_patterns))
            if given.refusal_patterns
            else RefusalPatterns.default(),
            judge=load_judge(given.judge) if given.judge and judges_here else None,
            judge_name=given.judge or "",
            max_new_tokens=_whole("--max-new-tokens", given.max_new_tokens, DEFAULT_NEW_TOKENS),
            generation_batch_size=_whole("--generation-batch-size", given.generation_batch_size, DEFAULT_BATCH),
            answers=Path(given.answers) if given.answers else None,
            json=Path(given.json) if given.json else None,
            compare=tuple(map(Checkpoint.of, given.compare or ())),
        )


def _whole(flag: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{flag} {text}: use a whole number of at least 1")
    return int(text)


def _named(flag: str, items: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for item in items:
        name, equals, source = item.partition("=")
        if not (name and equals and source):
            raise UserError(f"{flag} {item}: write NAME=SOURCE, such as general=data/general.jsonl")
        if name in sources:
            raise UserError(f"{flag} {item}: there is a {name} already: give each source a name of its own")
        sources[name] = source
    return sources
