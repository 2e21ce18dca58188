"""Sources that work, and each kind of bad input with the words that name its place."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ogpsa.data import ChatTokenizer, build_chat_dataset
from megatron_ogpsa.data.messages import messages_from_row
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import TransientError, UserError
from tests.data.conftest import chat

WriteJsonl = Callable[..., str]
GOOD = chat("Hi", "Hello")
HI_HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def messages_of(source: str) -> list[tuple[str, object]]:
    return [(where.removeprefix(source), messages_from_row(row, where)) for where, row in open_source(source).rows()]


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        messages_of(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source)
    return message.removeprefix(source)


def test_json_lines_with_blank_lines_and_byte_order_mark(write_jsonl: WriteJsonl) -> None:
    source = write_jsonl(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"  ", GOOD)
    assert messages_of(source) == [(":1", HI_HELLO), (":3", HI_HELLO)]


def test_json_array_knows_the_line_of_each_element(write_jsonl: WriteJsonl) -> None:
    element = json.dumps(GOOD).encode()
    source = write_jsonl(b"", b" [", element + b",", b"", element, b"]", name="train.json")
    assert messages_of(source) == [(":3", HI_HELLO), (":5", HI_HELLO)]
    assert messages_of(write_jsonl(b"[]", name="none.json")) == []
    assert messages_of(write_jsonl(GOOD, name="lines.json")) == [(":1", HI_HELLO)]


def test_a_json_array_may_be_one_line_of_any_length(write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``json.dump`` writes it. It is held in memory as a whole, other lines one by one."""
    monkeypatch.setattr("megatron_ogpsa.data.sources._MOST_LINE_BYTES", 1 << 20)
    line = json.dumps([chat("Hi", "Hello" * 50_000)] * 5).encode()
    assert len(messages_of(write_jsonl(line, name="train.json"))) == 5
    assert refusal(write_jsonl(GOOD, line)).startswith(":2: a line of more than 1 MiB; remove the row")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"[", b'{"messages": [}', b"]"], ":2: not valid JSON"),
        ([b"[", b"{}", b"{}]"], ":3: not valid JSON (',' or ']' expected)"),
        ([b"[", b"{}"], ":3: not valid JSON (',' or ']' expected)"),
        ([b"[", b"9" * 5000, b"]"], ":2: JSON too deep or too long to read"),
        ([b"[{},", b"]"], ":2: not valid JSON"),
        ([b"[{}]", b"{}"], ":2: not valid JSON (text after the array)"),
        ([b"[", b'"\xff"', b"]"], ":2: not UTF-8 (byte 0xff at offset 3 of the file)"),
    ],
)
def test_broken_json_array(write_jsonl: WriteJsonl, lines: list[bytes], expected: str) -> None:
    source = write_jsonl(*lines, name="train.json")
    with pytest.raises(UserError) as caught:
        list(open_source(source).rows())
    assert str(caught.value).startswith(source + expected)


def test_prompt_and_response(write_jsonl: WriteJsonl) -> None:
    system = {"role": "system", "content": "Be good."}
    source = write_jsonl(
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": [system, HI_HELLO[0]], "response": "Hello"},
        {"messages": None, "prompt": "Hi", "response": "Hello", "id": 3},
    )
    assert messages_of(source) == [(":1", HI_HELLO), (":2", [system, *HI_HELLO]), (":3", HI_HELLO)]


def test_parquet_saved_folder_and_hub_set_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat("Hi", "Hello"), chat("Hi", "Hello", "Bye", "Bye")]
    dataset = datasets.Dataset.from_list(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = [(": row 1", rows[0]["messages"]), (": row 2", rows[1]["messages"])]
    for source in (str(tmp_path / "train.parquet"), str(tmp_path / "saved"), "org/chats", "org/chats:test[:10%]"):
        assert messages_of(source) == expected
        assert open_source(source).num_rows == 2
    assert set(asked) == {("org/chats", "train"), ("org/chats", "test[:10%]")}


def test_columnar_nulls_of_the_other_form_do_no_harm(tmp_path: Path) -> None:
    # A columnar file has every column in every row.
    rows = [{**GOOD, "prompt": None, "response": None}, {"messages": None, "prompt": "Hi", "response": "Hello"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    assert [messages for _, messages in messages_of(str(tmp_path / "mixed.parquet"))] == [HI_HELLO, HI_HELLO]


def test_columns_give_no_call_the_arguments_of_another(tmp_path: Path) -> None:
    """As nulls, which a template would write and a model learn."""

    def called(arguments: dict[str, object]) -> dict[str, object]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return {"messages": [HI_HELLO[0], {"role": "assistant", "content": "", "tool_calls": calls}]}

    rows = [called({"city": "Paris"}), called({"query": "x", "within": {"days": 3}}), called({"within": {"hours": 1}})]
    rows.append({"messages": HI_HELLO})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    datasets.Dataset(pa.Table.from_pylist(rows)).save_to_disk(tmp_path / "calls")
    for name in ("calls.parquet", "calls"):
        read = [messages for _, messages in messages_of(str(tmp_path / name))]
        assert read == [row["messages"] for row in rows]


def test_objects_of_unlike_kinds_in_parquet_are_json(tmp_path: Path) -> None:
    """As ``datasets`` 5 writes calls of which an argument is a number here and text there; nulls are as they were written."""
    calls = [{"name": "f", "arguments": {"at": at}} for at in (1, "noon", None)]
    messages = [HI_HELLO[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    column = pa.array([json.dumps(message) for message in messages], type=pa.json_())
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2]), column)})
    pq.write_table(table, tmp_path / "calls.parquet")
    assert [read for _, read in messages_of(str(tmp_path / "calls.parquet"))] == [messages]


def test_nulls_that_were_written_stay(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"city": "Paris", "at": None}}
    messages = [HI_HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    assert messages_of(str(tmp_path / "calls.jsonl")) == [(":1", messages)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b'{"messages": [', ":2: not valid JSON (Expecting value at column 15); write one JSON object per line"),
        (b"not json", ":2: not valid JSON (Expecting value at column 1)"),
        (b'"\xff"', ":2: not UTF-8 (byte 0xff at offset 94 of the file); save the file as UTF-8"),
        (b"[" * 200_000, ":2: JSON too deep or too long to read"),
        (b"9" * 5000, ":2: JSON too deep or too long to read"),
        (b"[1]", ":2: a row must be an object with 'messages' or 'prompt' and 'response', not a list"),
        ({}, ":2: no field 'messages', nor 'prompt' and 'response' (found nothing)"),
        ({"text": "x"}, ":2: no field 'messages', nor 'prompt' and 'response' (found 'text')"),
        ({"messages": None}, ":2: field 'messages' is null"),
        ({"messages": "Hi"}, ":2: 'messages' must be a list of messages, not text"),
        ({"messages": []}, ":2: 'messages' is an empty list"),
        ({"messages": ["Hi"]}, ":2: 'messages'[0] must be an object with 'role' and 'content', not text"),
        ({"messages": [{"content": "Hi"}]}, ":2: 'messages'[0]: field 'role' is missing"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, ":2: 'messages'[0]: unknown role 'human'; use one of"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, ":2: 'messages'[0]: unknown role ['user']"),
        ({"messages": [{"role": "user"}]}, ":2: 'messages'[0]: field 'content' is missing"),
        ({"messages": [{"role": "user", "content": None}]}, ":2: 'messages'[0]: field 'content' is null"),
        (
            {"messages": [*HI_HELLO, {"role": "user", "content": 5}]},
            ":2: 'messages'[2]: 'content' must be text, not a n",
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, ":2: no assistant turn, so nothing to learn"),
        ({"prompt": "Hi"}, ":2: field 'response' is missing"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, ":2: a preference pair, where conversations are wanted"),
        ({"response": "Hi"}, ":2: field 'prompt' is missing"),
        ({"prompt": "Hi", "response": None}, ":2: field 'response' is null"),
        ({"prompt": 3, "response": "Hi"}, ":2: 'prompt' must be text or a list of messages, not a number"),
        ({"prompt": "Hi", "response": {}}, ":2: 'response' must be text, not an object"),
        (b'{"prompt": "Hi \\ud83d", "response": "x"}', ":2: 'prompt' holds \\ud83d, half of a surrogate pair"),
    ],
)
def test_bad_row_is_named_by_its_line(write_jsonl: WriteJsonl, row: object, expected: str) -> None:
    assert refusal(write_jsonl(GOOD, row)).startswith(expected)


def test_bad_rows_of_other_sources_are_named_by_their_number(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", None], "response": ["b", "c"]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert refusal(str(tmp_path / "x.parquet")).startswith(": row 2: field 'prompt' is null")


def test_sources_that_are_not_there_or_no_source(tmp_path: Path) -> None:
    assert "no such file; check the path" in refusal(str(tmp_path / "none.jsonl"))
    assert "no such file" in refusal(str(tmp_path / "folder" / "none"))
    assert "no such file" in refusal("none.jsonl")
    assert "is a directory; give a file in it" in refusal(str(tmp_path))
    (tmp_path / "empty.jsonl").touch()
    assert "the file is empty" in refusal(str(tmp_path / "empty.jsonl"))
    (tmp_path / "x.csv").write_text("a,b")
    assert "unknown kind of file '.csv'" in refusal(str(tmp_path / "x.csv"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet at all, not even a little")
    assert "not a parquet file" in refusal(str(tmp_path / "x.parquet"))


def test_splits_and_broken_folders_are_explained(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    message = refusal(str(tmp_path / "splits"))
    assert "holds several splits (test, train); name one" in message
    assert messages_of(str(tmp_path / "splits" / "train")) == [(": row 1", HI_HELLO)]
    (tmp_path / "splits" / "train" / "state.json").write_text("{")
    assert "broken datasets folder" in refusal(str(tmp_path / "splits" / "train"))


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, TransientError), (errno.EACCES, UserError)])
def test_a_file_system_that_is_away_has_broken_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError]
) -> None:
    def load_from_disk(folder: str) -> datasets.Dataset:
        raise OSError(number, os.strerror(number), folder)

    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_from_disk", load_from_disk)
    with pytest.raises(UserError, match="file system$" if kind is TransientError else "save it again$") as caught:
        open_source(str(tmp_path / "saved"))
    assert type(caught.value) is kind


def test_hub_failure_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("org/chats:test")
    assert "no set 'org/chats' with split 'test' (ConnectionError: Couldn't reach the Hub)" in message


def test_content_decides_the_hash_and_the_path_does_not(write_jsonl: WriteJsonl) -> None:
    first = open_source(write_jsonl(GOOD, name="a.jsonl")).content_hash
    assert open_source(write_jsonl(GOOD, name="b.jsonl")).content_hash == first
    assert open_source(write_jsonl(GOOD, GOOD, name="b.jsonl")).content_hash != first


@pytest.mark.parametrize("bad", [b"", b"\n \n"])
def test_source_without_rows(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, bad: bytes) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl: holds no rows"):
        build_chat_dataset(write_jsonl(bad), tokenizer, seq_length=8, packing=False, cache_dir=None)
