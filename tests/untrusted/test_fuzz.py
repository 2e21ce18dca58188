"""Random input to the readers: a valid object or one line of refusal, nothing else; the same examples in every run."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ogpsa.errors import UserError
from tests.data.conftest import chat
from tests.untrusted.conftest import MOST_CHARACTERS, read_chats, read_config, read_pairs, read_pipeline

bounded = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(
    ["messages", "role", "content", "user", "assistant", "system", "prompt", "response", "chosen", "rejected", ""]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=8)})
messages = st.lists(turns, max_size=4) | st.lists(turns | values, max_size=3)
extras = st.dictionaries(st.sampled_from(["tools", "chat_template_kwargs"]), values | st.text(max_size=8), max_size=2)
rows = (
    st.builds(dict.__or__, st.fixed_dictionaries({"messages": messages}), extras)
    | st.dictionaries(words, messages | values)
    | values
)
lines = rows.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=40)
keys = st.sampled_from(
    ["lr", "bf16", "launch", "stages", "save", "seq-length", "ogpsa-reference", "betas", "help", "<<", "nproc-per-node"]
)
yaml_values = st.recursive(
    keys
    | st.integers().map(str)
    | st.sampled_from(
        ["~", "true", "1e-6", "&a x", "*a", "!!python/name:os.system x", "!x y", "2024-01-01", "0o7", "|"]
    )
    | st.text(string.printable, max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(inner, inner, max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs.items()) + "}"
        )
    ),
    max_leaves=8,
)
configs = st.lists(st.tuples(keys | yaml_values, yaml_values), max_size=4).map(
    lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs).encode()
) | st.binary(max_size=60)


def is_read_or_refused(read: Callable[[Path], object], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        message = str(error)
    else:
        return
    assert message.isprintable()
    assert str(path) in message
    assert len(message) <= MOST_CHARACTERS


@bounded
@given(content=st.lists(lines, max_size=4).map(b"\n".join), suffix=st.sampled_from([".jsonl", ".json"]))
@pytest.mark.parametrize("read", [read_chats, read_pairs])
def test_json_lines(tmp_path: Path, read: Callable[[Path], object], content: bytes, suffix: str) -> None:
    is_read_or_refused(read, tmp_path / f"rows{suffix}", content)


@bounded
@given(
    elements=st.lists(lines, max_size=4),
    begin=st.sampled_from([b"[", b" [\n", b"[["]),
    end=st.sampled_from([b"]", b""]),
)
def test_json_arrays(tmp_path: Path, elements: list[bytes], begin: bytes, end: bytes) -> None:
    is_read_or_refused(read_chats, tmp_path / "rows.json", begin + b",\n".join(elements) + end)


@bounded
@given(change=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=3))
@pytest.mark.parametrize("read", [read_chats, read_pairs])
def test_parquet_with_other_bytes(
    tmp_path: Path, read: Callable[[Path], object], change: list[tuple[float, bytes]]
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([chat("Hi", "Hello")] * 20), path)
    content = bytearray(path.read_bytes())
    for place, written in change:
        position = int(place * len(content))
        content[position : position + len(written)] = written
    is_read_or_refused(read, path, bytes(content))


@bounded
@given(content=configs)
@pytest.mark.parametrize("read", [read_config, read_pipeline])
def test_configurations(tmp_path: Path, read: Callable[[Path], object], content: bytes) -> None:
    is_read_or_refused(read, tmp_path / "run.yaml", content)


def test_valid_input_is_among_the_examples(tmp_path: Path) -> None:
    """Otherwise only refusals would be tested."""
    found: dict[str, int] = {"chats": 0, "configurations": 0}

    @bounded
    @given(row=rows, config=configs)
    def count(row: Any, config: bytes) -> None:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        (tmp_path / "run.yaml").write_bytes(config)
        for name, read, path in (("chats", read_chats, "rows.jsonl"), ("configurations", read_config, "run.yaml")):
            try:
                read(tmp_path / path)
                found[name] += 1
            except UserError:
                pass

    count()
    assert min(found.values()) > 0, found
