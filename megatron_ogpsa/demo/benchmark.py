"""The demo's data files: what the small model learns, is protected on, is made safe with, and is scored on.

Everything is drawn from explicit seeds, so that the same specification gives the same bytes. Evaluation sets are drawn
first and nothing that trains or protects the model may contain one of their requests (for language: of their sentences).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_ogpsa.demo.tasks import GENERAL_TASKS, Example, Task, safety
from megatron_ogpsa.demo.vocabulary import write_tokenizer

MAX_DRAWS_PER_EXAMPLE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSpec:
    """Sizes of the sets, in conversations."""

    seed: int = 1
    base_train: int = 24_000
    """Conversations the starting model learns from: all general tasks alike, and helpful answers to any request."""
    reference_per_task: int = 128
    safety_train: int = 3200
    """Conversations for SFT, and as many pairs for DPO."""
    safety_benign_share: float = 0.4
    """Share of harmless look-alikes, answered, in both; the rest are unsafe requests with refusals."""
    eval_per_task: int = 64
    eval_unsafe: int = 96
    eval_benign: int = 96
    advice_share: float = 0.2
    """Share of advice (unsafe and harmless alike) in the starting model's training set."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where the files of a benchmark lie."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def base_train(self) -> Path:
        return self.folder / "base_train.jsonl"

    @property
    def safety_train(self) -> Path:
        return self.folder / "safety_train.jsonl"

    @property
    def safety_pairs(self) -> Path:
        return self.folder / "safety_pairs.jsonl"

    @property
    def eval_unsafe(self) -> Path:
        return self.folder / "eval_unsafe.jsonl"

    @property
    def eval_benign(self) -> Path:
        return self.folder / "eval_benign.jsonl"

    def reference(self, task: str) -> Path:
        return self.folder / f"reference_{task}.jsonl"

    def eval_general(self, task: str) -> Path:
        return self.folder / f"eval_{task}.jsonl"


def draw_distinct(
    draw: Callable[[], Example], count: int, *, exclude: frozenset[Example] = frozenset()
) -> list[Example]:
    """``count`` different examples, none of them in ``exclude``.

    Raises:
        ValueError: the task has too few different examples left; names the count.
    """
    drawn: dict[Example, None] = {}
    for _ in range(count * MAX_DRAWS_PER_EXAMPLE):
        if len(drawn) == count:
            return list(drawn)
        example = draw()
        if example not in exclude:
            drawn[example] = None
    raise ValueError(f"only {len(drawn)} different examples could be drawn, {count} were asked for")


def write_benchmark(folder: Path, spec: BenchmarkSpec) -> Benchmark:
    """Write the tokenizer and all data sets under ``folder``; the same specification gives the same bytes."""
    benchmark = Benchmark(folder)
    write_tokenizer(benchmark.tokenizer)
    general = [_general_sets(task, spec) for task in GENERAL_TASKS]
    for task, (evaluation, reference, _) in zip(GENERAL_TASKS, general, strict=True):
        write_conversations(benchmark.eval_general(task.name), evaluation)
        write_conversations(benchmark.reference(task.name), reference)

    unsafe, held_out_unsafe = _requests(spec, unsafe=True, held_out=spec.eval_unsafe)
    benign, held_out_benign = _requests(spec, unsafe=False, held_out=spec.eval_benign)
    # The evaluation files keep the advice that the starting model gave: scoring tells a refusal from help by the answer.
    write_conversations(benchmark.eval_unsafe, map(safety.helpful, held_out_unsafe))
    write_conversations(benchmark.eval_benign, map(safety.helpful, held_out_benign))

    rng = Random(f"{spec.seed} order")
    advice = [
        safety.helpful(rng.choice(rng.choice((unsafe, benign))))
        for _ in range(int(spec.base_train * spec.advice_share))
    ]
    base = advice + [example for _, _, training in general for example in training]
    rng.shuffle(base)
    write_conversations(benchmark.base_train, base)

    num_benign = int(spec.safety_train * spec.safety_benign_share)
    lessons = [safety.helpful(rng.choice(benign)) for _ in range(num_benign)]
    lessons += [safety.refused(rng.choice(unsafe)) for _ in range(spec.safety_train - num_benign)]
    rng.shuffle(lessons)
    write_conversations(benchmark.safety_train, lessons)

    rng = Random(f"{spec.seed} pairs")
    asked = [rng.choice(benign) for _ in range(num_benign)]
    asked += [rng.choice(unsafe) for _ in range(spec.safety_train - num_benign)]
    rng.shuffle(asked)
    write_pairs(benchmark.safety_pairs, asked)
    return benchmark


def write_conversations(path: Path, examples: Iterable[Example]) -> None:
    """One JSON object a line: ``{"messages": [{"role": ..., "content": ...}, ...]}``."""
    lines = (json.dumps({"messages": example.messages()}) for example in examples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_pairs(path: Path, requests: Iterable[safety.Request]) -> None:
    """One JSON object a line: ``prompt`` and ``chosen`` and ``rejected`` answers, of which one refuses and one helps."""
    lines = []
    for request in requests:
        answers = safety.refused(request).answer, safety.helpful(request).answer
        chosen, rejected = answers if request.unsafe else reversed(answers)
        lines.append(json.dumps({"prompt": request.text, "chosen": chosen, "rejected": rejected}))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_conversations(path: Path) -> list[Example]:
    """The examples of a file that :func:`write_conversations` wrote."""
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(user["content"], assistant["content"]) for user, assistant in chats]


def _general_sets(task: Task, spec: BenchmarkSpec) -> tuple[list[Example], list[Example], list[Example]]:
    """Evaluation (distinct), reference (distinct) and training examples of a task; the first is disjoint from the others."""
    rng = Random(f"{spec.seed} {task.name}")
    evaluation = draw_distinct(lambda: task.draw(rng), spec.eval_per_task)
    held_out = frozenset(evaluation)
    reference = draw_distinct(lambda: task.draw(rng), spec.reference_per_task, exclude=held_out)
    count = int(spec.base_train * (1 - spec.advice_share)) // len(GENERAL_TASKS)
    training: list[Example] = []
    while len(training) < count:
        example = task.draw(rng)
        if example not in held_out:
            training.append(example)
    return evaluation, reference, training


def _requests(spec: BenchmarkSpec, *, unsafe: bool, held_out: int) -> tuple[list[safety.Request], list[safety.Request]]:
    """All requests of a kind, cut in two: those that may be trained on, and ``held_out`` ones that may not."""
    requests = safety.all_requests(unsafe=unsafe)
    Random(f"{spec.seed} {'unsafe' if unsafe else 'benign'}").shuffle(requests)
    return requests[held_out:], requests[:held_out]
