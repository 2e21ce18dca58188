"""Bad input of every kind: refused in one line, which names the place and the remedy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.data import template
from tests.untrusted import fixtures
from tests.untrusted.conftest import (
    read_chats,
    read_config,
    read_pairs,
    read_sentencepiece,
    read_tokenizer,
    refusal,
    spoil,
)

FILES: dict[str, tuple[Callable[[Path], object], Any, str]] = {
    name: (read, content, error)
    for read, cases in (
        (read_chats, fixtures.CHATS),
        (read_pairs, fixtures.PAIRS),
        (read_config, fixtures.CONFIGS),
        (read_sentencepiece, fixtures.SENTENCEPIECES),
    )
    for name, (content, error) in cases.items()
}


def check(message: str, path: Path, error: str) -> None:
    expected = ".+".join(re.escape(part) for part in error.replace("{path}", str(path)).split("..."))
    assert re.fullmatch(expected, message), message


@pytest.mark.parametrize("name", FILES)
def test_bad_files(tmp_path: Path, marker: Path, name: str) -> None:
    read, content, error = FILES[name]
    path = tmp_path / name.replace(" ", "_")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check(refusal(read, path), path, error)


@pytest.mark.parametrize("name", fixtures.TOKENIZERS)
def test_bad_tokenizers(
    tokenizer_folder: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(template, "_SECONDS", 0.2)
    changes, error = fixtures.TOKENIZERS[name]
    path = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, path)
    spoil(path, changes)
    check(refusal(read_tokenizer, path), path, error)
