"""Greedy answers from the cache of keys and values, in every layout, against one unsharded fp64 model without a cache."""

from __future__ import annotations

import pytest
import torch

from tests.core.layouts import LAYOUTS
from tests.core.oracle import ModelShape, random_weights, token_losses

PROMPTS = [[3, 9, 27], [5], [50, 1, 2, 3, 4, 7], [8, 8], [11, 30, 12, 40, 41]]
NEW_TOKENS = 6
VOCABULARY = 60
"""The tokenizer's; the model has 64 rows."""


def greedy(layout: str, end_id: int) -> list[list[int]]:
    """The whole sequence again for each token; of all labels the one with the least loss."""
    shape = ModelShape(**LAYOUTS[layout].model)
    weights = random_weights(shape, seed=1)
    answers = []
    for prompt in PROMPTS:
        sequence = list(prompt)
        while len(sequence) < len(prompt) + NEW_TOKENS:
            tokens = torch.tensor([sequence]).expand(VOCABULARY, -1)
            labels = torch.arange(VOCABULARY)[:, None].expand_as(tokens)
            token = int(token_losses(shape, weights, tokens, labels)[:, -1].argmin())
            if token == end_id:
                break
            sequence.append(token)
        answers.append(sequence[len(prompt) :])
    return answers


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "pp2-tied", "tp2-qkv-bias", "ep2", "dp2-etp2"])
def test_answers_are_the_oracles(distributed, layout: str) -> None:  # type: ignore[no-untyped-def]
    """Exactly: the two most probable tokens of random weights differ by more than fp32 rounds off."""
    free = greedy(layout, end_id=-1)
    end_id = free[0][2]  # a token that does come up ends some answers early
    expected = greedy(layout, end_id)
    assert min(map(len, expected)) < max(map(len, expected)) == NEW_TOKENS
    found = distributed(2).run(
        "tests.evaluation.generation_cases:answers",
        layout=layout,
        prompts=PROMPTS,
        end_id=end_id,
        max_new_tokens=NEW_TOKENS,
        vocab_size=VOCABULARY,
    )
    assert found == [expected, expected]
