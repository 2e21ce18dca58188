"""The demo's data: reproducible, disjoint where it must be, and right."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from megatron_ogpsa.data import load_chat_tokenizer
from megatron_ogpsa.demo.benchmark import Benchmark, BenchmarkSpec, draw_distinct, read_conversations, write_benchmark
from megatron_ogpsa.demo.tasks import GENERAL_TASKS, Example
from megatron_ogpsa.demo.tasks.safety import ADVICE, HARMLESS, UNSAFE, is_refusal

SMALL = BenchmarkSpec(base_train=700, reference_per_task=16, safety_train=200, eval_per_task=16)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return write_benchmark(tmp_path_factory.mktemp("benchmark"), SMALL)


def test_the_same_specification_gives_the_same_bytes(benchmark: Benchmark, tmp_path: Path) -> None:
    again = write_benchmark(tmp_path, SMALL)
    files = sorted(path.relative_to(benchmark.folder) for path in benchmark.folder.rglob("*.json*"))
    assert len(files) > 15
    for file in files:
        assert (benchmark.folder / file).read_bytes() == (again.folder / file).read_bytes(), file
    other = write_benchmark(tmp_path / "other", BenchmarkSpec(**{**vars_of(SMALL), "seed": 2}))
    assert other.safety_train.read_bytes() != benchmark.safety_train.read_bytes()


def vars_of(spec: BenchmarkSpec) -> dict[str, int]:
    return {name: getattr(spec, name) for name in spec.__slots__}


def test_what_is_scored_was_never_trained_on(benchmark: Benchmark) -> None:
    trained = {e.request for e in read_conversations(benchmark.base_train) + read_conversations(benchmark.safety_train)}
    for path in (benchmark.eval_unsafe, benchmark.eval_benign):
        assert not trained & {example.request for example in read_conversations(path)}
    for task in GENERAL_TASKS:
        scored = set(read_conversations(benchmark.eval_general(task.name)))
        assert not scored & set(read_conversations(benchmark.base_train))
        assert not scored & set(read_conversations(benchmark.reference(task.name)))


def test_answers_are_right() -> None:
    draws = {task.name: task.draw(Random(3)) for task in GENERAL_TASKS}
    a, b = draws["addition"].request.removeprefix("add ").split(" and ")
    sums = [sum(int(word) for word in part.split(" plus ")) for part in (a, b)]
    assert draws["addition"].answer == f"{sums[0]} {sums[1]}"
    assert draws["maximum"].answer == max(draws["maximum"].request.removeprefix("largest of ").split())
    letters = draws["reverse"].answer.split()
    assert draws["reverse"].request.split()[-len(letters) :] == letters[::-1]
    ordered = draws["sort"].answer.split()
    assert ordered == sorted(draws["sort"].request.split()[-len(ordered) :])


def test_safety_lessons_refuse_what_is_unsafe_and_help_with_the_rest(benchmark: Benchmark) -> None:
    for lesson in read_conversations(benchmark.safety_train):
        words = lesson.request.split()
        verb = next(word for word in words if word in UNSAFE)
        unsafe = any(thing in words for thing in UNSAFE[verb])
        assert is_refusal(lesson.answer) == unsafe
        if not unsafe:
            thing = next(thing for thing in HARMLESS[verb] if thing in words)
            assert lesson.answer == ADVICE[verb, thing]


def test_pairs_choose_refusals_for_what_is_unsafe_and_help_for_the_rest(benchmark: Benchmark) -> None:
    pairs = [json.loads(line) for line in benchmark.safety_pairs.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == SMALL.safety_train
    held_out = {
        example.request
        for path in (benchmark.eval_unsafe, benchmark.eval_benign)
        for example in read_conversations(path)
    }
    for pair in pairs:
        words = pair["prompt"].split()
        verb = next(word for word in words if word in UNSAFE)
        unsafe = any(thing in words for thing in UNSAFE[verb])
        assert is_refusal(pair["chosen"]) == unsafe
        assert is_refusal(pair["rejected"]) != unsafe
        assert pair["prompt"] not in held_out
    assert sum(is_refusal(pair["rejected"]) for pair in pairs) == 80


def test_every_word_is_in_the_tokenizer(benchmark: Benchmark) -> None:
    tokenizer = load_chat_tokenizer("HuggingFaceTokenizer", str(benchmark.tokenizer), None)
    for example in read_conversations(benchmark.base_train) + read_conversations(benchmark.safety_train):
        ids, supervised = tokenizer.encode_chat(example.messages())
        assert tokenizer.decode([i for i, s in zip(ids, supervised, strict=True) if s]).strip() == example.answer
        assert len(ids) <= 33  # the model's 32 positions and the shift


def test_too_few_examples_are_an_error() -> None:
    with pytest.raises(ValueError, match="only 1 different examples"):
        draw_distinct(lambda: Example("always", "the same"), 2)
