"""The safety set: nothing held out is trained on, neither verb nor phrasing tells unsafe from harmless, the seed decides."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from megatron_ogpsa.evaluation.refusals import RefusalPatterns
from megatron_ogpsa.laptop.safety_data import (
    COMPLIANCE,
    HELD_OUT_PHRASINGS,
    PHRASINGS,
    REFUSALS,
    Example,
    goals,
    held_out_prompts,
    training_examples,
)

SMALL_WORDS = frozenset("a an the my of to in into at on from with for and that is his her".split())
TRAINED_ON, HELD_OUT = "look_alikes.jsonl", "held_out.jsonl"


def content(goal: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", goal.lower())) - SMALL_WORDS


def test_held_out_goals_are_others_than_those_trained_on() -> None:
    """Not only in wording: two goals that share half of their words would be much the same request."""
    trained_on = [content(goal) for kind in ("unsafe", "benign") for goal in goals(TRAINED_ON, kind)]
    for kind in ("unsafe", "benign"):
        held_out = goals(HELD_OUT, kind)
        assert len(set(held_out)) == len(held_out) >= 60
        for words in map(content, held_out):
            assert max(len(words & other) / len(words | other) for other in trained_on) < 0.5, words
    assert not set(PHRASINGS) & set(HELD_OUT_PHRASINGS)


def test_both_kinds_are_asked_alike() -> None:
    """A model that looks at the phrasing, or only counts, cannot tell them apart."""
    unsafe, benign = held_out_prompts()
    for one, other in zip(unsafe, benign, strict=True):
        assert any(has_form(phrasing, one) and has_form(phrasing, other) for phrasing in HELD_OUT_PHRASINGS)
    examples = training_examples(1)
    ordinary = [
        example for example in examples if not any(has_form(phrasing, example.prompt) for phrasing in PHRASINGS)
    ]
    assert not any(example.is_unsafe for example in ordinary)
    asked = [example for example in examples if example not in ordinary]
    forms = {
        is_unsafe: Counter(form_of(example) for example in asked if example.is_unsafe == is_unsafe)
        for is_unsafe in (True, False)
    }
    assert sum(forms[True].values()) >= 150
    assert (forms[True] - forms[False]).total() <= 2  # an ordinary question may have a phrasing's form
    verbs = [{goal.split()[0] for goal in goals(TRAINED_ON, kind)} for kind in ("unsafe", "benign")]
    assert len(verbs[0] & verbs[1]) >= 20


def has_form(phrasing: str, prompt: str) -> bool:
    before, _, after = phrasing.partition("$goal")
    return prompt.startswith(before) and prompt.endswith(after)


def form_of(example: Example) -> str:
    return next(phrasing for phrasing in PHRASINGS if has_form(phrasing, example.prompt))


@pytest.mark.parametrize("is_unsafe", [True, False])
def test_refusals_are_told_from_answers_by_the_patterns_that_score(is_unsafe: bool) -> None:
    patterns = RefusalPatterns.default()
    for example in training_examples(1):
        if example.is_unsafe == is_unsafe:
            assert patterns.matches(example.chosen) == is_unsafe, example
            assert patterns.matches(example.rejected) != is_unsafe, example
    assert set(REFUSALS).isdisjoint(COMPLIANCE)


def test_the_seed_alone_decides() -> None:
    first = training_examples(1)
    assert training_examples(1) == first
    other = training_examples(2)
    assert other != first
    assert {example.chosen for example in other if not example.is_unsafe} == {
        example.chosen for example in first if not example.is_unsafe
    }
    assert held_out_prompts() == held_out_prompts()
