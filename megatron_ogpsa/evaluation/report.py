"""Scores as a table for people, as JSON for machines, and answers as JSON Lines."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ogpsa.console.tables import aligned_table
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.losses import Loss
from megatron_ogpsa.evaluation.rates import Rate
from megatron_ogpsa.evaluation.scores import Answered, Scores
from megatron_ogpsa.system.files import write_atomically, write_json


def terminal_table(found: Sequence[Scores]) -> str:
    """One column for each checkpoint, one row for each measure; intervals are 95 %."""
    rows = [["", *(scores.title for scores in found)]]

    def add(title: str, cell: Callable[[Scores], str]) -> None:
        rows.append([title, *map(cell, found)])

    for name, loss in found[0].losses.items():
        kind = "samples" if loss.margin is None else "pairs"
        what = f"{name}: {loss.samples} {kind}, {loss.tokens} tokens"
        add(f"{what}{f', {loss.cut} cut' if loss.cut else ''}", lambda scores: "")
        of = _of_loss(name)
        add("  loss" if loss.margin is None else "  loss of chosen", of(lambda loss: f"{loss.loss:.4f}"))
        add("  perplexity", of(lambda loss: f"{loss.perplexity:.2f}"))
        if loss.margin is not None:
            add("  log p: chosen", of(lambda loss: f"{loss.chosen:.2f}"))
            add("  log p: rejected", of(lambda loss: f"{loss.rejected:.2f}"))
            add("  chosen more probable", of(lambda loss: f"{100 * (loss.preferred or 0.0):.1f} %"))
    for name, answered in found[0].answers.items():
        add(f"{name}: {len(answered.prompts)} prompts", lambda scores: "")
        add("  refused, by patterns", lambda scores, name=name: interval(scores.answers[name].refused))  # type: ignore[misc]
        if answered.judged is not None:
            add("  refused, by the judge", lambda scores, name=name: interval(scores.answers[name].judged))  # type: ignore[misc]
    return aligned_table(rows)


def _of_loss(name: str) -> Callable[[Callable[[Loss], str]], Callable[[Scores], str]]:
    return lambda read: lambda scores: read(scores.losses[name])


def interval(rate: Rate | None) -> str:
    """``75.0 % [61.2, 85.1]``."""
    return "" if rate is None else f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def write_scores(path: Path, found: Sequence[Scores]) -> None:
    """Write the scores as JSON; losses in nats, rates from 0 to 1.

    Raises:
        UserError: the file cannot be written.
    """
    _written("--json", path, lambda: write_json(path, {"checkpoints": [as_json(scores) for scores in found]}))


def as_json(scores: Scores) -> dict[str, Any]:
    """Of one checkpoint."""
    return {
        "title": scores.title,
        "load": scores.folder,
        "iteration": scores.iteration,
        "differing_flags": [difference.as_json() for difference in scores.differences],
        "data": {
            name: asdict(loss) | {"perplexity": loss.perplexity, "margin": loss.margin}
            for name, loss in scores.losses.items()
        },
        "prompts": {
            name: {"refused": asdict(answered.refused)}
            | ({"judged": asdict(answered.judged)} if answered.judged is not None else {})
            for name, answered in scores.answers.items()
        },
    }


def write_answers(path: Path, found: Sequence[Scores]) -> None:
    """Write a line for each answer: checkpoint, set, prompt (messages), answer, and whether it is a refusal.

    What a judge has not judged yet has null for its verdict.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [
        json.dumps({"checkpoint": scores.title, "prompts": name} | row, ensure_ascii=False) + "\n"
        for scores in found
        for name, answered in scores.answers.items()
        for row in _rows(answered)
    ]
    _written("--answers", path, lambda: write_atomically(path, "".join(lines).encode()))


def _rows(answered: Answered) -> list[dict[str, Any]]:
    rows = []
    for index, (prompt, answer) in enumerate(zip(answered.prompts, answered.answers, strict=True)):
        row: dict[str, Any] = {
            "prompt": prompt.messages,
            "answer": answer,
            "refused": bool(answered.by_patterns[index]),
        }
        if answered.by_judge is not None:
            row["judged"] = answered.by_judge[index]
        rows.append(row)
    return rows


def require_place(flag: str, path: Path) -> None:
    """Look whether the file can be written, and leave it as it is.

    Raises:
        UserError: it cannot.
    """

    def write_beside() -> None:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # root would put a file in the place of /dev/null
            raise OSError(errno.EINVAL, "not a regular file")
        beside = path.with_name(f"{path.name}.tmp")
        write_atomically(beside, b"")
        beside.unlink()

    _written(flag, path, write_beside)


def _written(flag: str, path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror}): name another file") from None
