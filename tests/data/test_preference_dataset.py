"""Built preference pairs: rows that are refused, lengths, rows of several pairs, the cache, one real file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ogpsa.data import (
    ChatTokenizer,
    TokenizedPreferenceDataset,
    build_chat_dataset,
    build_preference_dataset,
    load_chat_tokenizer,
    source_kind,
)
from megatron_ogpsa.data.preferences import pair_from_row
from megatron_ogpsa.data.truncation import Cut, Document, truncate_pair
from megatron_ogpsa.errors import UserError
from tests.data.conftest import CHATML, INSTRUCT, chat

WriteJsonl = Callable[..., str]
REAL_PAIRS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "general_preference.jsonl"
ROWS = [
    {"prompt": "Hi " * (1 + i % 7), "chosen": "hello " * (1 + i % 5), "rejected": "good bye " * (1 + i % 3)}
    for i in range(20)
]


def build(source: str, by: ChatTokenizer, **changes: Any) -> TokenizedPreferenceDataset:
    return build_preference_dataset(source, by, **({"seq_length": 128, "packing": False, "cache_dir": None} | changes))


def turns(*contents: str) -> list[dict[str, str]]:
    return chat(*contents)["messages"]


# What is refused, and words of the message.
REFUSED = {
    "number as prompt": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be text or a list of messages"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing; add it"),
    "object as answer": ({"prompt": "a", "chosen": {"role": "assistant"}, "rejected": "b"}, "'chosen' must be a list"),
    "no messages": ({"prompt": "a", "chosen": [], "rejected": "b"}, "'chosen' is an empty list"),
    "empty prompt list": ({"prompt": [], "chosen": "a", "rejected": "b"}, "'prompt' is an empty list"),
    "null content": (
        {"prompt": "a", "chosen": [{"role": "assistant", "content": None}], "rejected": "b"},
        r"'chosen'\[0\]: field 'content' is null",
    ),
    "unknown role": (
        {"prompt": "a", "chosen": [{"role": "bot", "content": "b"}], "rejected": "c"},
        r"'chosen'\[0\]: unknown role 'bot'; use one of",
    ),
    "only the prompt": ({"prompt": "a", "chosen": turns("a"), "rejected": turns("a", "b")}, "'chosen' must go on with"),
    "another prompt": ({"prompt": "a", "chosen": turns("b", "c"), "rejected": "d"}, "'chosen' must go on with"),
    "questions differ": (
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "x", "d")},
        "'chosen' must go on with a turn of the assistant",
    ),
    "same conversations": ({"chosen": turns("a", "b"), "rejected": turns("a", "b")}, "are the same"),
    "same questions": ({"chosen": turns("a"), "rejected": turns("a")}, "are the same"),
    "text without prompt": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "need a field 'prompt'; add it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_rows_are_told_with_file_and_line(case: str, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    row, message = REFUSED[case]
    with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{message}") as caught:
        build(write_jsonl(ROWS[0], row), tokenizer)
    assert "\n" not in str(caught.value)


def test_one_conversation_may_go_on_where_the_other_ends() -> None:
    pair = pair_from_row({"chosen": turns("a", "b"), "rejected": turns("a", "b", "c", "d")}, "f:1")
    assert pair.prompt == turns("a")
    assert (len(pair.chosen), len(pair.rejected)) == (1, 3)


def test_rows_of_parquet_are_told_by_number(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    columns = {"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", None], "messages": [None, None]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=r"pairs\.parquet: row 2: field 'rejected' is null"):
        build(str(tmp_path / "pairs.parquet"), tokenizer)


def test_what_the_template_makes_of_a_row_is_told_with_its_line(
    write_jsonl: WriteJsonl, with_template: Callable[[str], ChatTokenizer]
) -> None:
    trimming = with_template(CHATML.replace("message.content", "message.content|trim"))
    same = {"prompt": "a", "chosen": "hello", "rejected": "hello "}
    with pytest.raises(UserError, match=r"train\.jsonl:2: .* the same once the chat template has written them"):
        build(write_jsonl(ROWS[0], same), trimming)
    silent = with_template("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}")
    with pytest.raises(UserError, match=r"train\.jsonl:1: 'chosen' has no token to learn"):
        build(write_jsonl(ROWS[0]), silent)
    strict = with_template("{{ raise_exception('no such role') }}")
    with pytest.raises(UserError, match=r"train\.jsonl:1: the chat template refuses .*no such role"):
        build(write_jsonl(ROWS[0]), strict)


def test_settings_that_make_no_set(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="--seq-length 7: preference pairs need at least 8"):
        build(write_jsonl(ROWS[0]), tokenizer, seq_length=7)
    with pytest.raises(UserError, match="0 samples asked for; take at least 1"):
        build(write_jsonl(ROWS[0]), tokenizer, max_samples=0)
    with pytest.raises(UserError, match="holds no rows"):
        build(write_jsonl(b"", b""), tokenizer)
    assert build(write_jsonl(*ROWS[:2], b"broken"), tokenizer, max_samples=2).num_pairs == 2


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (ROWS[0], "preference"),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c"), "messages": turns("a", "b")}, "preference"),
        ({"prompt": "a", "chosen": None, "rejected": None}, "preference"),  # whose reader says what is null
        (chat("a", "b"), "chat"),
        (chat("a", "b") | {"chosen": None, "rejected": None}, "chat"),
        ({"prompt": "a", "response": "b"}, "chat"),
        ({"messages": None}, "chat"),
    ],
)
def test_kind_of_a_source(row: dict[str, Any], kind: str, write_jsonl: WriteJsonl) -> None:
    assert source_kind(write_jsonl(row)) == kind


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r":1: neither a conversation .* nor a preference pair .*found 'text'\); rename the fields"),
        ({"prompt": "a"}, ":1: neither a conversation"),
        ({}, "found nothing"),
        ([1], ":1: a row must be an object with named fields, not a list"),
        (b"", ": holds no rows"),
    ],
)
def test_a_source_of_neither_kind_is_an_error(row: object, message: str, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match=rf"train\.jsonl{message}" if message[0] == ":" else message):
        source_kind(write_jsonl(row))


def answered(prompt: int, answer: int, mark: int) -> Document:
    """Prompt tokens 0, 1, ...; answer tokens from ``mark`` on."""
    return Document([*range(prompt), *range(mark, mark + answer)], [False] * prompt + [True] * answer)


@pytest.mark.parametrize(
    ("prompts", "answers", "limit", "kept", "cut"),
    [
        ((4, 4), (4, 2), 8, ((4, 4), (4, 2)), Cut.NOTHING),
        ((5, 5), (4, 2), 8, ((4, 4), (4, 2)), Cut.PROMPT),  # the shorter answer's prompt is cut alike
        ((9, 9), (6, 1), 8, ((2, 6), (2, 1)), Cut.PROMPT),  # a quarter of the limit: 2
        ((9, 9), (7, 7), 8, ((2, 6), (2, 6)), Cut.PROMPT),
        ((2, 2), (7, 3), 8, ((2, 6), (2, 3)), Cut.END),
        ((1, 1), (9, 9), 8, ((1, 7), (1, 7)), Cut.END),
        ((10, 11), (6, 6), 12, ((5, 6), (6, 6)), Cut.PROMPT),  # both lose 5: what begins alike goes on beginning alike
        ((2, 9), (6, 6), 4, ((1, 3), (3, 1)), Cut.PROMPT),  # too different to lose the same
    ],
)
def test_cuts_written_by_hand(
    prompts: tuple[int, int], answers: tuple[int, int], limit: int, kept: tuple[tuple[int, int], ...], cut: Cut
) -> None:
    pair = [answered(p, a, 1000) for p, a in zip(prompts, answers, strict=True)]
    *documents, what = truncate_pair(pair[0], pair[1], limit)
    assert tuple((d.is_supervised.count(False), d.is_supervised.count(True)) for d in documents) == kept
    assert what is cut


@given(
    st.tuples(st.integers(1, 60), st.integers(0, 3)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(5, 60),
)
def test_prompts_that_differ_at_the_border_begin_alike(
    prompts: tuple[int, int], answers: tuple[int, int], limit: int
) -> None:
    """Differing by up to 3 tokens, which leaves room for a prompt and an answer token in 5."""
    shorter, more = prompts
    pair = [answered(shorter, answers[0], 1000), answered(shorter + more, answers[1], 2000)]
    *cut, what = truncate_pair(pair[0], pair[1], limit)
    assert cut[0].token_ids[0] == cut[1].token_ids[0] < shorter
    for before, after in zip(pair, cut, strict=True):
        assert len(after.token_ids) <= limit
        assert after.num_supervised > 0
        assert not after.is_supervised[0]
        start = before.token_ids.index(after.token_ids[0])
        assert after.token_ids == before.token_ids[start : start + len(after.token_ids)]
    assert (what is Cut.NOTHING) == all(a == b for a, b in zip(pair, cut, strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_items(packing: bool, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    dataset = build(write_jsonl(*ROWS), tokenizer, packing=packing, seq_length=512)
    assert dataset.num_pairs == dataset.num_samples == len(ROWS)
    assert dataset.max_pairs_per_row > 1 if packing else dataset.max_pairs_per_row == 1
    assert len(dataset) < len(ROWS) if packing else len(dataset) == len(ROWS)
    seen, positions = [], 0
    for item in (dataset[index] for index in range(len(dataset))):
        assert {name: (t.dtype, tuple(t.shape)) for name, t in item.items()} == {
            "tokens": (torch.int64, (512,)),
            "labels": (torch.int64, (512,)),
            "loss_mask": (torch.float32, (512,)),
            "position_ids": (torch.int64, (512,)),
            "document_ids": (torch.int64, (512,)),
            "pair_ids": (torch.int64, (dataset.max_pairs_per_row,)),
        }
        pairs = [int(pair) for pair in item["pair_ids"] if pair >= 0]
        assert item["pair_ids"].tolist() == pairs + [-1] * (dataset.max_pairs_per_row - len(pairs))
        assert item["document_ids"].unique().tolist() == [
            *[-1] * bool((item["document_ids"] == -1).any()),
            *range(2 * len(pairs)),
        ]
        for number in range(2 * len(pairs)):
            here = item["document_ids"] == number
            answer = ROWS[pairs[number // 2]]["rejected" if number % 2 else "chosen"]
            learnt = tokenizer.decode(item["labels"][here & (item["loss_mask"] == 1)].tolist())
            assert learnt.split() == answer.split()
            assert item["position_ids"][here].tolist() == list(range(int(here.sum())))
            assert item["loss_mask"][here][-1] == 0  # its label is another document's
        assert item["loss_mask"][item["document_ids"] == -1].sum() == 0
        seen += pairs
        positions += int((item["document_ids"] >= 0).sum())
    assert sorted(seen) == list(range(len(ROWS)))
    assert dataset.row_of_pair.tolist() == [
        next(row for row in range(len(dataset)) if pair in dataset[row]["pair_ids"]) for pair in range(len(ROWS))
    ]
    assert dataset.useful_token_share == positions / (len(dataset) * 512)
    assert dataset.num_supervised_tokens == sum(int(dataset[i]["loss_mask"].sum()) for i in range(len(dataset)))


@pytest.mark.parametrize("packing", [False, True])
def test_long_pairs_fit_into_a_row(packing: bool, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    rows = [
        {"prompt": "Hi " * 299, "chosen": "hello " * 5, "rejected": "good bye " * 3},
        {"prompt": "Hi", "chosen": "hello " * 299, "rejected": "good bye"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    dataset = build(write_jsonl(*rows), tokenizer, seq_length=256, packing=packing)
    assert (dataset.summary.num_prompt_cut, dataset.summary.num_end_cut) == (1, 1)
    items = {int(pair): item for item in dataset for pair in item["pair_ids"] if pair >= 0}
    for pair, names in ((0, ("chosen", "rejected")), (1, ("rejected",))):  # of pair 1 the chosen answer is cut
        item = items[pair]
        first = 2 * item["pair_ids"].tolist().index(pair)
        for number, name in enumerate(("chosen", "rejected")):
            here = item["document_ids"] == first + number
            assert 0 < int(item["loss_mask"][here].sum()) < int(here.sum()) <= 128
            learnt = tokenizer.decode(item["labels"][here & (item["loss_mask"] == 1)].tolist())
            assert (learnt.split() == str(rows[pair][name]).split()) == (name in names)
        assert int((item["document_ids"] == first).sum()) == 128  # the longer answer uses all that there is


class TestCache:
    def test_second_build_reads_the_first_ones_files(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        first = build(write_jsonl(*ROWS), tokenizer, packing=True, cache_dir=cache)
        memory = build(write_jsonl(*ROWS), tokenizer, packing=True)
        monkeypatch.setattr(type(tokenizer), "encode_chat", lambda *_, **__: pytest.fail("tokenized again"))
        second = build(write_jsonl(*ROWS, name="copy.jsonl"), tokenizer, packing=True, cache_dir=cache)
        assert first.fingerprint == second.fingerprint == memory.fingerprint
        assert first.summary == second.summary == memory.summary
        assert len(first) == len(second) == len(memory)
        for index in range(len(first)):
            for name, tensor in first[index].items():
                assert torch.equal(tensor, second[index][name])
                assert torch.equal(tensor, memory[index][name])
        assert [path.name for path in cache.iterdir()] == [f"pairs-{first.fingerprint[:32]}"]

    def test_anything_that_matters_makes_another_set(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, sentencepiece_tokenizer: ChatTokenizer,
        with_template: Callable[[str], ChatTokenizer], tmp_path: Path,
    ) -> None:  # fmt: skip
        rows, more = write_jsonl(*ROWS), write_jsonl(*ROWS, ROWS[0], name="more.jsonl")
        cache = tmp_path / "cache"
        sets = [
            build(source, by, seq_length=length, packing=packing, max_samples=samples, cache_dir=cache)
            for source, by, length, packing, samples in [
                (rows, tokenizer, 128, True, None),
                (more, tokenizer, 128, True, None),
                (rows, sentencepiece_tokenizer, 128, True, None),
                (rows, with_template(INSTRUCT), 128, True, None),
                (rows, tokenizer, 130, True, None),
                (rows, tokenizer, 128, False, None),
                (rows, tokenizer, 128, True, 3),
            ]
        ]
        assert len({dataset.fingerprint for dataset in sets}) == len(sets) == len(list(cache.iterdir()))

    def test_conversations_and_pairs_of_one_file_are_two_sets(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("dataset", "preference_dataset"):  # not by their versions alone, which may meet
            monkeypatch.setattr(f"megatron_ogpsa.data.{module}._FORMAT_VERSION", 9)
        cache = tmp_path / "cache"
        source = write_jsonl(*[row | chat("Hi", "hello") for row in ROWS])
        pairs = build(source, tokenizer, cache_dir=cache)
        chats = build_chat_dataset(source, tokenizer, seq_length=128, packing=False, cache_dir=cache)
        assert pairs.fingerprint != chats.fingerprint
        assert len(list(cache.iterdir())) == 2

    def test_failed_build_leaves_nothing(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        with pytest.raises(UserError, match=r"train\.jsonl:2: not valid JSON"):
            build(write_jsonl(ROWS[0], b"{"), tokenizer, cache_dir=cache)
        assert list(cache.iterdir()) == []


@pytest.mark.skipif(not REAL_PAIRS.is_file(), reason=f"needs {REAL_PAIRS.name} next to the repository")
def test_real_pairs_fill_packed_rows(tmp_path: Path) -> None:
    """With a vocabulary of the data's own, so that pairs have the lengths that they have in practice."""
    with REAL_PAIRS.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    text = [m["content"] for row in rows for name in ("prompt", "chosen", "rejected") for m in row[name]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for content in text for line in content.splitlines() if line.strip()),
        model_prefix=str(tmp_path / "own"),
        model_type="bpe",
        vocab_size=4000,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "chat.jinja").write_text(INSTRUCT, encoding="utf-8")
    by = load_chat_tokenizer("SentencePieceTokenizer", str(tmp_path / "own.model"), str(tmp_path / "chat.jinja"))
    packed = build(str(REAL_PAIRS), by, seq_length=2048, packing=True)
    alone = build(str(REAL_PAIRS), by, seq_length=2048)
    assert packed.num_pairs == alone.num_pairs == len(rows)
    assert packed.num_supervised_tokens == alone.num_supervised_tokens
    assert packed.useful_token_share >= 0.9 > alone.useful_token_share
    item = packed[0]
    for number, name in enumerate(("chosen", "rejected")):
        here = (item["document_ids"] == number) & (item["loss_mask"] == 1)
        words = rows[int(item["pair_ids"][0])][name][0]["content"].split()
        assert by.decode(item["labels"][here].tolist()).split()[:50] == words[:50]
