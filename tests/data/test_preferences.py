"""Preference pairs: every form of row, what is wrong with a row, what is cut, and what is packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ogpsa.data import ChatTokenizer, build_chat_dataset, build_preference_dataset, source_kind
from megatron_ogpsa.data.micro_batches import deal_out, micro_batches_at_once
from megatron_ogpsa.data.preferences import pair_from_row
from megatron_ogpsa.data.truncation import Cut, Document, truncate_pair
from megatron_ogpsa.errors import UserError

PAIRS = Path(__file__).parents[2].parent / "shared/data/general_preference.jsonl"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


Q, YES, NO = user("Is it?"), assistant("Yes."), assistant("No.")
EARLIER = [user("Hello"), assistant("Hi")]

FORMS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
    "messages": {"prompt": [Q], "chosen": [YES], "rejected": [NO]},
    "mixed": {"prompt": [Q], "chosen": "Yes.", "rejected": [NO]},
    "whole conversations": {"chosen": [Q, YES], "rejected": [Q, NO]},
    "null prompt": {"prompt": None, "chosen": [Q, YES], "rejected": [Q, NO]},
    "prompt and whole conversations": {"prompt": "Is it?", "chosen": [Q, YES], "rejected": [Q, NO], "score": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str) -> None:
    pair = pair_from_row(FORMS[form], "f:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([Q], [YES], [NO])


def test_the_prompt_is_the_longest_common_beginning() -> None:
    pair = pair_from_row({"chosen": [*EARLIER, Q, YES], "rejected": [*EARLIER, Q, NO]}, "f:1")
    assert (pair.prompt, pair.chosen) == ([*EARLIER, Q], [YES])


WRONG = {
    "not an object": ([1], "a row must be an object"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "field 'chosen' is missing"),
    "null rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected' is null"),
    "number": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' must be a list of messages, not a number"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": "  "}, "'rejected' is an empty answer"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "need a field 'prompt'"),
    "nothing common": ({"chosen": [YES, Q, NO], "rejected": [Q, NO]}, "there is no prompt"),
    "user answers": ({"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "'chosen' must go on with a turn of"),
    "half a surrogate": ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "surrogate"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_place(case: str) -> None:
    row, message = WRONG[case]
    with pytest.raises(UserError, match=rf"^f\.jsonl:7: .*{message}"):
        pair_from_row(row, "f.jsonl:7")


def test_kinds_of_sources(write_jsonl: Callable[..., str]) -> None:
    assert source_kind(write_jsonl(FORMS["messages"], name="a.jsonl")) == "preference"
    assert source_kind(write_jsonl({"messages": [Q, YES]}, name="b.jsonl")) == "chat"


def pairs_of(source: str, tokenizer: ChatTokenizer, **changes: Any) -> Any:
    return build_preference_dataset(
        source, tokenizer, **({"seq_length": 96, "packing": False, "cache_dir": None} | changes)
    )


def test_a_document_is_what_fine_tuning_on_it_would_see(
    write_jsonl: Callable[..., str], tokenizer: ChatTokenizer
) -> None:
    """But for the earlier turn of the assistant, which is part of the prompt here."""
    row = {"prompt": [*EARLIER, Q], "chosen": [YES], "rejected": [assistant("No, it never is.")]}
    item = pairs_of(write_jsonl(row), tokenizer, seq_length=192)[0]
    assert item["pair_ids"].tolist() == [0]
    for number, answer in enumerate(("Yes.", "No, it never is.")):
        chat = {"messages": [*EARLIER, Q, assistant(answer)]}
        alone = build_chat_dataset(
            write_jsonl(chat, name="chat.jsonl"), tokenizer, seq_length=96, packing=False, cache_dir=None
        )[0]
        mine, its = item["document_ids"] == number, alone["document_ids"] == 0
        assert item["tokens"][mine].tolist() == alone["tokens"][its].tolist()
        assert item["position_ids"][mine].tolist() == alone["position_ids"][its].tolist()
        supervised = item["labels"][mine & (item["loss_mask"] == 1)].tolist()
        assert tokenizer.decode(supervised).strip() == answer
        assert item["loss_mask"][mine].sum() < alone["loss_mask"].sum()
        assert item["loss_mask"][mine][-1] == 0  # the last position's label belongs to the next document


@settings(deadline=None)
@given(prompt=st.integers(1, 40), chosen=st.integers(1, 40), rejected=st.integers(1, 40), limit=st.integers(2, 50))
def test_truncation_keeps_both_answers(prompt: int, chosen: int, rejected: int, limit: int) -> None:
    def document(answer: int, mark: int) -> Document:
        return Document([*range(prompt), *range(mark, mark + answer)], [False] * prompt + [True] * answer)

    first, second, cut = truncate_pair(document(chosen, 100), document(rejected, 200), limit)
    kept = []
    for cut_document, answer, mark in ((first, chosen, 100), (second, rejected, 200)):
        assert len(cut_document.token_ids) <= limit
        assert not cut_document.is_supervised[0]
        tokens = [token for token in cut_document.token_ids if token >= mark]
        assert tokens == [*range(mark, mark + len(tokens))]
        assert 1 <= len(tokens) <= answer
        if answer <= limit - min(prompt, max(limit // 4, 1)):
            assert len(tokens) == answer
        kept.append([token for token in cut_document.token_ids if token < mark])
    assert kept[0] == kept[1] == [*range(prompt)][prompt - len(kept[0]) :]
    whole = prompt + max(chosen, rejected) <= limit
    assert (cut is Cut.NOTHING) == whole


def test_packing_keeps_pairs_whole(write_jsonl: Callable[..., str], tokenizer: ChatTokenizer) -> None:
    rows = [{"prompt": "Is it?", "chosen": "Yes. " * (1 + i % 5), "rejected": "No."} for i in range(30)]
    dataset = pairs_of(write_jsonl(*rows), tokenizer, packing=True, seq_length=256)
    assert dataset.num_pairs == dataset.num_samples == 30
    assert len(dataset) < 30
    seen = []
    for row in (dataset[index] for index in range(len(dataset))):
        pairs = row["pair_ids"][row["pair_ids"] >= 0].tolist()
        assert row["document_ids"].max() == 2 * len(pairs) - 1
        for number, pair in enumerate(pairs):
            text = tokenizer.decode(
                row["labels"][(row["document_ids"] == 2 * number) & (row["loss_mask"] == 1)].tolist()
            )
            assert text.split() == ["Yes."] * (1 + pair % 5)
        seen += pairs
    assert sorted(seen) == [*range(30)]
    total = sum(float(dataset[index]["loss_mask"].sum()) for index in range(len(dataset)))
    assert total == dataset.num_supervised_tokens


@pytest.mark.skipif(not PAIRS.exists(), reason=f"{PAIRS} is not there")
def test_real_pairs_pack_well(tokenizer: ChatTokenizer) -> None:
    """One pair a row wastes most of it; a byte-like tokenizer makes long rows, so 4096 positions stand for 2048."""
    alone = pairs_of(str(PAIRS), tokenizer, seq_length=4096)
    packed = pairs_of(str(PAIRS), tokenizer, seq_length=4096, packing=True)
    assert packed.num_pairs == alone.num_pairs == 300
    assert packed.useful_token_share >= 0.9 > alone.useful_token_share


def test_the_cache_is_used_and_knows_pairs_from_chats(
    write_jsonl: Callable[..., str], tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    source = write_jsonl(FORMS["text"])
    first = pairs_of(source, tokenizer, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    before = folder.stat().st_mtime_ns
    again = pairs_of(source, tokenizer, cache_dir=tmp_path / "cache")
    assert folder.stat().st_mtime_ns == before
    assert again.fingerprint == first.fingerprint
    assert all(torch.equal(again[0][name], first[0][name]) for name in first[0])
    assert pairs_of(source, tokenizer, packing=True).fingerprint != first.fingerprint


@pytest.mark.parametrize("multiple", [1, 3])
def test_rows_are_dealt_out_evenly_and_fillers_add_nothing(
    write_jsonl: Callable[..., str], tokenizer: ChatTokenizer, multiple: int
) -> None:
    dataset = pairs_of(write_jsonl(*[FORMS["text"]] * 5), tokenizer)
    rows = [dataset[index] for index in range(5)]
    ranks = [deal_out(rows, micro_batch_size=2, rank=r, size=2, multiple=multiple) for r in range(2)]
    assert {len(batches) % multiple for batches in ranks} == {0}
    assert len({len(batches) for batches in ranks}) == 1
    ids = torch.cat([batch["pair_ids"].flatten() for batches in ranks for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == [0, 1, 2, 3, 4]
    supervised = sum(float(batch["loss_mask"].sum()) for batches in ranks for batch in batches)
    assert supervised == dataset.num_supervised_tokens


@pytest.mark.parametrize(("stages", "group", "expected"), [(None, None, 1), (2, None, 2), (2, 6, 6), (None, 6, 1)])
def test_interleaved_schedules_take_micro_batches_in_groups(
    stages: int | None, group: int | None, expected: int
) -> None:
    """``get_schedule_table`` and its checks in megatron/core/pipeline_parallel/schedules.py."""
    settings = SimpleNamespace(
        virtual_pipeline_model_parallel_size=stages and 2,
        pipeline_model_parallel_size=stages or 1,
        microbatch_group_size_per_vp_stage=group,
    )
    assert micro_batches_at_once(settings) == expected


def test_of_rows_dealt_out_a_rank_reads_its_own(write_jsonl: Callable[..., str], tokenizer: ChatTokenizer) -> None:
    """And the first one, where rows fill up: the same micro-batches as of rows that lie in a list."""

    class Recorded:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            read.append(index)
            return rows[index]

    dataset = pairs_of(write_jsonl(*[FORMS["text"]] * 6), tokenizer)
    rows, read = [dataset[index] for index in range(6)], list[int]()
    for rank, own in ((0, [0, 3]), (1, [1, 4]), (2, [2, 5])):
        read.clear()
        (batch,) = deal_out(Recorded(), micro_batch_size=2, rank=rank, size=3)
        assert read == own
        assert batch["pair_ids"].flatten().tolist() == own
    read.clear()
    deal_out(Recorded(), micro_batch_size=2, rank=3, size=4)
    assert read == [0, 3]
