"""Cutting and packing, as pure functions of lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ogpsa.data import attention_mask_from_documents
from megatron_ogpsa.data.packing import best_fit_decreasing
from megatron_ogpsa.data.truncation import Cut, Document, truncate, truncate_pair


def document(flags: str) -> Document:
    """One token per character, A for the assistant's; token i has the id i."""
    return Document(list(range(len(flags))), [flag == "A" for flag in flags])


@pytest.mark.parametrize(
    ("flags", "limit", "kept", "cut"),
    [
        ("ppAA", 4, [0, 1, 2, 3], Cut.NOTHING),
        ("ppAAA", 4, [0, 1, 2, 3], Cut.END),
        ("pppAA", 4, [0, 1, 2, 3], Cut.END),  # one answer token is left
        ("ppppAA", 4, [2, 3, 4, 5], Cut.PROMPT),  # half of the limit for the answer
        ("ppppppAAAA", 4, [4, 5, 6, 7], Cut.PROMPT),
        ("ppppppA", 4, [3, 4, 5, 6], Cut.PROMPT),  # a shorter answer leaves more for the prompt
        ("ppppppApppAA", 4, [3, 4, 5, 6], Cut.PROMPT),  # the first answer alone
        ("pppA", 2, [2, 3], Cut.PROMPT),
        ("pppAA", 3, [1, 2, 3], Cut.PROMPT),
        ("AppppAA", 3, [3, 4, 5], Cut.PROMPT),  # the first token is no label, so its flag counts for nothing
        ("pppppp", 4, [0, 1, 2, 3], Cut.END),
    ],
)
def test_windows_written_by_hand(flags: str, limit: int, kept: list[int], cut: Cut) -> None:
    result, what = truncate(document(flags), limit)
    assert result.token_ids == kept
    assert result.is_supervised == [flags[i] == "A" for i in kept]
    assert what is cut


@pytest.mark.parametrize(
    ("flags", "limit", "kept", "cut"),
    [
        ("ppAA", 4, [0, 1, 2, 3], Cut.NOTHING),
        ("pppAA", 4, [0, 1, 2, 3], Cut.END),
        ("ppppAA", 4, [0, 3, 4, 5], Cut.PROMPT),
        ("ppppppA", 4, [0, 4, 5, 6], Cut.PROMPT),
        ("pppA", 2, [0, 3], Cut.PROMPT),
    ],
)
def test_a_beginning_of_sequence_token_stays(flags: str, limit: int, kept: list[int], cut: Cut) -> None:
    result, what = truncate(document(flags), limit, bos_id=0)
    assert result.token_ids == kept
    assert result.is_supervised == [flags[i] == "A" for i in kept]
    assert what is cut
    assert truncate(document(flags), limit, bos_id=1) == truncate(document(flags), limit)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(2, 40))
def test_it_stays_in_pairs_too(prompt: int, chosen: int, rejected: int, limit: int) -> None:
    pair = [document("p" * prompt + "A" * answer) for answer in (chosen, rejected)]
    *cut, what = truncate_pair(pair[0], pair[1], limit, bos_id=0)
    for after, answer in zip(cut, (chosen, rejected), strict=True):
        assert len(after.token_ids) <= limit
        assert not after.is_supervised[0]
        assert after.num_supervised > 0
        if limit > 2:
            assert after.token_ids[0] == 0
        if prompt + max(chosen, rejected) <= limit:
            assert after.token_ids == [*range(prompt + answer)]
    assert cut[0].token_ids[: cut[0].is_supervised.index(True)] == cut[1].token_ids[: cut[1].is_supervised.index(True)]
    assert (what is Cut.NOTHING) == (prompt + max(chosen, rejected) <= limit)


def test_first_token_is_no_label() -> None:
    assert document("App").num_supervised == 0
    assert document("AAp").num_supervised == 1


@given(st.text("pA", min_size=1, max_size=40), st.integers(2, 20))
def test_cutting_never_loses_the_last_supervised_token(flags: str, limit: int) -> None:
    result, cut = truncate(document(flags), limit)
    assert len(result.token_ids) == min(len(flags), limit)
    assert result.token_ids == list(range(result.token_ids[0], result.token_ids[0] + len(result.token_ids)))
    assert (result.num_supervised > 0) == (document(flags).num_supervised > 0)
    assert (cut is Cut.NOTHING) == (len(flags) <= limit)


@settings(max_examples=200)
@given(st.integers(1, 50), st.data())
def test_packing_loses_nothing_and_overfills_nothing(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in used)
    # A second row at most half full would have fitted into the first.
    assert sum(2 * tokens <= capacity for tokens in used) <= 1
    assert all(row == sorted(row) for row in rows)
    assert rows == sorted(rows)
    assert rows == best_fit_decreasing(lengths, capacity)


def test_best_fit_takes_the_fullest_row() -> None:
    # 6 and 5 open rows with 4 and 5 free; 4 fits both and takes the tighter one.
    assert best_fit_decreasing([6, 5, 4], 10) == [[0, 2], [1]]
    assert best_fit_decreasing([5, 4, 6], 10) == [[0], [1, 2]]
    assert best_fit_decreasing([4, 4, 4], 10) == [[0, 1], [2]]
    assert best_fit_decreasing([], 10) == []


def test_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="document 1 has 11 tokens"):
        best_fit_decreasing([1, 11], 10)


def test_attention_mask_written_by_hand() -> None:
    mask = attention_mask_from_documents(torch.tensor([[0, 0, 1, -1, -1]]))
    visible = (~mask[0, 0]).int().tolist()
    assert mask.shape == (1, 1, 5, 5)
    assert mask.dtype == torch.bool
    assert visible == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_attention_mask_leaves_no_row_without_a_key() -> None:
    mask = attention_mask_from_documents(torch.randint(-1, 3, (4, 17)))
    assert not mask.all(dim=-1).any()
