"""Items of the built set, its cache, and one real file."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ogpsa.data import ChatTokenizer, TokenizedChatDataset, build_chat_dataset, dataset, load_chat_tokenizer
from megatron_ogpsa.errors import UserError
from tests.data.conftest import chat

WriteJsonl = Callable[..., str]
REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "general_sft.jsonl"
# Of different lengths, with answers that are words of the tokenizer's training text.
ROWS = [chat("Hi " * n, "hello " * (1 + n % 3), "Bye", "good bye") for n in (1, 9, 2, 4, 14, 1, 3)]


def equal(first: TokenizedChatDataset, second: TokenizedChatDataset) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key])
        for a, b in ((first[i], second[i]) for i in range(len(first)))
        for key in a.keys() | b.keys()
    )


def test_one_document_in_a_row(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    token_ids, flags = tokenizer.encode_chat(chat("Hi", "hello")["messages"])
    n, seq_length = len(token_ids), len(token_ids) + 3
    dataset = build_chat_dataset(
        write_jsonl(chat("Hi", "hello")), tokenizer, seq_length=seq_length, packing=False, cache_dir=None
    )
    item = dataset[0]
    pad = tokenizer.pad_id
    assert item["tokens"].tolist() == [*token_ids, pad, pad, pad]
    assert item["labels"].tolist() == [*token_ids[1:], pad, pad, pad, pad]
    assert item["loss_mask"].tolist() == [*map(float, flags[1:]), 0, 0, 0, 0]
    assert item["position_ids"].tolist() == [*range(n), 0, 0, 0]
    assert item["document_ids"].tolist() == [0] * n + [-1] * 3
    assert {name: t.dtype for name, t in item.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "document_ids": torch.int64,
    }
    assert dataset.num_supervised_tokens == sum(flags)
    assert dataset.useful_token_share == n / seq_length


def test_packed_rows_hold_the_documents_one_after_another(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    source = write_jsonl(*ROWS)
    chats = [tokenizer.encode_chat(row["messages"]) for row in ROWS]
    seq_length = 2 * max(len(token_ids) for token_ids, _ in chats)
    dataset = build_chat_dataset(source, tokenizer, seq_length=seq_length, packing=True, cache_dir=None)
    assert len(dataset) < len(ROWS)
    found = []
    for item in dataset:
        for number in range(int(item["document_ids"].max()) + 1):
            here = item["document_ids"] == number
            assert item["position_ids"][here].tolist() == list(range(int(here.sum())))
            assert item["loss_mask"][here][-1] == 0  # its label is another document's
            found.append(item["tokens"][here].tolist())
            flags = next(flags for token_ids, flags in chats if token_ids == found[-1])
            assert item["loss_mask"][here].tolist() == [*map(float, flags[1:]), 0]
        padding = item["document_ids"] == -1
        assert (item["tokens"][padding] == tokenizer.pad_id).all()
        assert item["loss_mask"][padding].sum() == 0
        assert torch.equal(item["labels"][:-1], item["tokens"][1:])
    assert sorted(found) == sorted(token_ids for token_ids, _ in chats)
    assert dataset.num_supervised_tokens == sum(int(item["loss_mask"].sum()) for item in dataset)
    assert dataset.useful_token_share == sum(len(f) for f in found) / (len(dataset) * seq_length)


@pytest.mark.parametrize("packing", [False, True])
def test_cut_documents_keep_a_label_at_the_last_position(
    write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, packing: bool
) -> None:
    # Row 1 loses its end, row 2 the start of its prompt, row 3 nothing.
    source = write_jsonl(chat("Hi", "hello " * 60), chat("Hi " * 60, "hello " * 60), chat("a", "b"))
    dataset = build_chat_dataset(source, tokenizer, seq_length=40, packing=packing, cache_dir=None)
    assert dataset.summary.num_end_cut == 1
    assert dataset.summary.num_prompt_cut == 1
    assert dataset.summary.num_documents == 3
    for item in (dataset[0], dataset[1]):
        assert item["document_ids"].tolist() == [0] * 40
        assert item["loss_mask"][-1] == 1
        assert tokenizer.decode([int(item["labels"][-1])]).strip() in "hello"
    prompt = tokenizer.encode_prompt(chat("Hi " * 60)["messages"])
    unlearnt = dataset[1]["tokens"][: int((dataset[1]["loss_mask"] == 0).sum()) + 1]
    assert unlearnt[0] == tokenizer.bos_id == prompt[0]  # the prompt's start is cut after it
    assert prompt[1 - len(unlearnt) :] == unlearnt[1:].tolist()
    assert dataset.num_supervised_tokens == sum(int(item["loss_mask"].sum()) for item in dataset)


def test_max_samples_reads_no_further(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    source = write_jsonl(*ROWS[:2], b"broken")
    dataset = build_chat_dataset(source, tokenizer, seq_length=64, packing=False, cache_dir=None, max_samples=2)
    assert len(dataset) == 2
    with pytest.raises(UserError, match="at least 1"):
        build_chat_dataset(source, tokenizer, seq_length=64, packing=False, cache_dir=None, max_samples=0)
    with pytest.raises(UserError, match="--seq-length 1"):
        build_chat_dataset(source, tokenizer, seq_length=1, packing=False, cache_dir=None)


def test_nothing_to_learn_is_an_error(write_jsonl: WriteJsonl, with_template: Callable[[str], ChatTokenizer]) -> None:
    bare = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")  # an empty answer leaves no trace
    source = write_jsonl(chat("Hi", ""), chat("You", ""))
    with pytest.raises(UserError, match=r"train\.jsonl: none of the 2 samples holds a supervised token"):
        build_chat_dataset(source, bare, seq_length=8, packing=True, cache_dir=None)
    mixed = write_jsonl(chat("Hi", ""), chat("You", "hello"))
    dataset = build_chat_dataset(mixed, bare, seq_length=16, packing=False, cache_dir=None)
    assert (len(dataset), dataset.summary.num_unsupervised) == (1, 1)


def test_template_refusal_names_the_line(
    write_jsonl: WriteJsonl, with_template: Callable[[str], ChatTokenizer]
) -> None:
    strict = with_template("{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}")
    with pytest.raises(UserError, match=r"train\.jsonl:2: the chat template refuses .*one question only"):
        build_chat_dataset(
            write_jsonl(chat("a", "b"), chat("a", "b", "c", "d")), strict, seq_length=8, packing=False, cache_dir=None
        )


class TestCache:
    def test_second_build_reads_the_first_ones_files(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        settings = {"seq_length": 64, "packing": True, "cache_dir": cache}
        first = build_chat_dataset(write_jsonl(*ROWS), tokenizer, **settings)
        memory = build_chat_dataset(write_jsonl(*ROWS), tokenizer, seq_length=64, packing=True, cache_dir=None)
        monkeypatch.setattr(type(tokenizer), "encode_chat", lambda *_, **__: pytest.fail("tokenized again"))
        second = build_chat_dataset(write_jsonl(*ROWS, name="copy.jsonl"), tokenizer, **settings)
        assert equal(first, second)
        assert equal(first, memory)
        assert first.fingerprint == second.fingerprint == memory.fingerprint
        assert first.summary == second.summary == memory.summary
        assert [path.name for path in cache.iterdir()] == [f"chat-{first.fingerprint[:32]}"]

    def test_anything_that_matters_makes_another_set(
        self,
        write_jsonl: WriteJsonl,
        tokenizer: ChatTokenizer,
        sentencepiece_tokenizer: ChatTokenizer,
        tmp_path: Path,
    ) -> None:
        rows, more = write_jsonl(*ROWS), write_jsonl(*ROWS, ROWS[0], name="more.jsonl")
        sets = [
            build_chat_dataset(source, by, seq_length=s, packing=p, cache_dir=tmp_path / "cache", max_samples=m)
            for source, by, s, p, m in [
                (rows, tokenizer, 64, True, None),
                (more, tokenizer, 64, True, None),
                (rows, sentencepiece_tokenizer, 64, True, None),
                (rows, tokenizer, 65, True, None),
                (rows, tokenizer, 64, False, None),
                (rows, tokenizer, 64, True, 3),
            ]
        ]
        assert len({dataset.fingerprint for dataset in sets}) == len(sets)

    def test_failed_build_leaves_nothing(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        with pytest.raises(UserError, match=r"train\.jsonl:2: not valid JSON"):
            build_chat_dataset(write_jsonl(ROWS[0], b"{"), tokenizer, seq_length=64, packing=True, cache_dir=cache)
        assert list(cache.iterdir()) == []

    def test_a_cache_that_was_cut_off_between_two_batches(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        """Arrow takes it for whole, with fewer rows."""
        source, cache = write_jsonl(*ROWS), tmp_path / "cache"
        built = build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=cache)
        rows = cache / f"chat-{built.fingerprint[:32]}" / "rows.arrow"
        rows.write_bytes(rows.read_bytes()[:-8])  # the mark of the stream's end
        with pytest.raises(UserError, match=r"broken cache \(rows\.arrow is cut off\); delete this folder$"):
            build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=cache)

    def test_broken_and_unwritable_cache(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        source, cache = write_jsonl(*ROWS), tmp_path / "cache"
        built = build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=cache)
        (cache / f"chat-{built.fingerprint[:32]}" / "rows.arrow").write_bytes(b"")
        with pytest.raises(UserError, match=r"broken cache .*delete this folder"):
            build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=cache)
        with pytest.raises(UserError, match=r"train\.jsonl: tokenized data cannot be written \(.*--data-cache-path"):
            build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=Path(source))

    def test_a_cache_that_may_not_be_looked_into(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        hidden = tmp_path / ("x" * 300)  # longer than a name may be, since root may look anywhere
        with pytest.raises(UserError, match=r"written \(File name too long\); .* --data-cache-path$"):
            build_chat_dataset(write_jsonl(*ROWS), tokenizer, seq_length=64, packing=False, cache_dir=hidden)

    def test_what_a_killed_process_has_left_is_removed_in_time(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        """By who builds the same set; not what another process may still be building."""
        source, cache = write_jsonl(*ROWS), tmp_path / "cache"
        settings: dict[str, Any] = {"seq_length": 64, "packing": True, "cache_dir": cache}
        folder = build_chat_dataset(source, tokenizer, **settings).folder(
            cache, build_chat_dataset(source, tokenizer, **settings).fingerprint
        )
        shutil.rmtree(folder)
        old, written, new = (cache / f".{folder.name}.{name}" for name in ("old", "written", "new"))
        for left in (old, written, new):
            left.mkdir()
            (left / "documents.arrow").write_bytes(b"half")
        two_days_ago = time.time() - 2 * 24 * 3600
        for path in (old / "documents.arrow", old, written):
            os.utime(path, (two_days_ago, two_days_ago))
        build_chat_dataset(source, tokenizer, **settings)
        assert sorted(cache.iterdir()) == sorted([folder, written, new])

    def test_a_full_disk_is_told(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(dataset, "write_summary", full)
        for cache in (tmp_path / "cache", None):
            with pytest.raises(UserError, match=r"tokenized data cannot be written \(No space left on device\); free"):
                build_chat_dataset(write_jsonl(*ROWS), tokenizer, seq_length=64, packing=True, cache_dir=cache)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_processes_that_build_at_once_agree(
        self, write_jsonl: WriteJsonl, hugging_face_folder: Path, tokenizer: ChatTokenizer, tmp_path: Path
    ) -> None:
        source, cache = write_jsonl(*ROWS), tmp_path / "cache"
        context = multiprocessing.get_context("spawn")
        start = context.Barrier(2)
        builders = [
            context.Process(target=build_when_all_are_ready, args=(start, source, str(hugging_face_folder), str(cache)))
            for _ in range(2)
        ]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join(timeout=400)
        assert [builder.exitcode for builder in builders] == [0, 0]
        assert len(list(cache.iterdir())) == 1
        assert not any(path.name.startswith(".") for path in cache.iterdir())

    def test_loser_of_the_race_takes_the_winners_folder(
        self, write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, cache = write_jsonl(*ROWS), tmp_path / "cache"
        encode = type(tokenizer).encode_chat
        winners: list[TokenizedChatDataset] = []

        def overtaken(self: ChatTokenizer, messages: list[dict[str, str]], **more: Any) -> tuple[list[int], list[bool]]:
            if not winners:  # another process builds the whole set while this one is at its first row
                monkeypatch.setattr(type(tokenizer), "encode_chat", encode)
                winners.append(build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=cache))
            return encode(self, messages, **more)

        monkeypatch.setattr(type(tokenizer), "encode_chat", overtaken)
        loser = build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=cache)
        assert equal(loser, winners[0])
        assert len(list(cache.iterdir())) == 1


def build_when_all_are_ready(start: object, source: str, folder: str, cache: str) -> None:
    tokenizer = load_chat_tokenizer("HuggingFaceTokenizer", folder)
    start.wait(60)  # type: ignore[attr-defined]
    dataset = build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=Path(cache))
    assert dataset.num_supervised_tokens == sum(int(item["loss_mask"].sum()) for item in dataset)


def test_workers_of_a_data_loader_read_the_same(
    write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    dataset = build_chat_dataset(
        write_jsonl(*ROWS), tokenizer, seq_length=64, packing=False, cache_dir=tmp_path / "cache"
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=len(ROWS), num_workers=1, multiprocessing_context="spawn")
    batch = next(iter(loader))
    assert torch.equal(batch["tokens"], torch.stack([item["tokens"] for item in dataset]))


def test_progress_is_silent_unless_asked_for(
    write_jsonl: WriteJsonl,
    tokenizer: ChatTokenizer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_ogpsa.console.progress.DELAY_SECONDS", 0)
    source = write_jsonl(*ROWS)
    build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=None)
    assert "tokenizing" not in capfd.readouterr().err
    build_chat_dataset(source, tokenizer, seq_length=64, packing=True, cache_dir=None, show_progress=True)
    assert f"tokenizing {source}: 100%" in capfd.readouterr().err


@pytest.mark.skipif(not REAL_DATA.is_file(), reason=f"needs {REAL_DATA.name} next to the repository")
@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece_tokenizer"])
def test_real_conversations(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    by: ChatTokenizer = request.getfixturevalue(kind)
    dataset = build_chat_dataset(str(REAL_DATA), by, seq_length=1024, packing=True, cache_dir=tmp_path / "cache")
    with REAL_DATA.open(encoding="utf-8") as file:
        answers = [m["content"] for m in json.loads(file.readline())["messages"] if m["role"] == "assistant"]
    assert dataset.summary.num_documents == 999
    assert dataset.useful_token_share > 0.97
    assert dataset.num_supervised_tokens == sum(int(item["loss_mask"].sum()) for item in dataset)
    learnt = by.decode(
        dataset[0]["labels"][(dataset[0]["loss_mask"] * (dataset[0]["document_ids"] == 0)).bool()].tolist()
    )
    assert learnt.split()[:50] == answers[0].split()[:50]
