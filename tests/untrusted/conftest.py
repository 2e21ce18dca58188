"""What reads each kind of file that a user can hand us, in this process; and what a refusal must look like."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.data import load_chat_tokenizer
from megatron_ogpsa.data.extras import extras_from_row
from megatron_ogpsa.data.messages import messages_from_row
from megatron_ogpsa.data.preferences import pair_from_row
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser
from tests.data.conftest import build_hugging_face_folder

MOST_CHARACTERS = 2100


def read_chats(path: Path) -> object:
    """As the training data of fine-tuning."""
    rows = open_source(str(path)).rows()
    return [(messages_from_row(row, where), extras_from_row(row, where)) for where, row in rows]


def read_pairs(path: Path) -> object:
    """As the training data of DPO."""
    return [pair_from_row(row, where) for where, row in open_source(str(path)).rows()]


_parser = build_parser()


def read_config(path: Path) -> object:
    """As the configuration of a run."""
    return ConfigFile.read(path).as_flags(_parser, [])


def read_pipeline(path: Path) -> object:
    """As the configuration of several stages."""
    config = ConfigFile.read(path)
    return [config.stage(name).as_flags(_parser, []) for name in config.stages]


def read_tokenizer(path: Path) -> object:
    """As ``--tokenizer-model`` of a Hugging Face folder; a conversation is encoded too."""
    return load_chat_tokenizer("HuggingFaceTokenizer", str(path)).encode_chat(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    )


def read_sentencepiece(path: Path) -> object:
    """As ``--tokenizer-model`` of a sentencepiece model."""
    template = path.parent / "template.jinja"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    return load_chat_tokenizer("SentencePieceTokenizer", str(path), str(template))


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """The message with which ``read`` refuses ``path``, which must be fit to be printed."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) <= MOST_CHARACTERS
    return message


TokenizerWith = Callable[[Mapping[str, Any]], Path]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good tokenizer, to be copied and spoilt."""
    return build_hugging_face_folder(tmp_path_factory.mktemp("untrusted") / "tokenizer")


def spoil(folder: Path, changes: Mapping[str, Any]) -> None:
    """Files of a folder replaced by text or bytes, removed (None), or JSON files with other values of some keys."""
    for name, change in changes.items():
        path = folder / name
        if change is None:
            path.unlink()
        elif isinstance(change, dict):
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            path.write_text(json.dumps(before | change), encoding="utf-8")
        else:
            path.write_bytes(change.encode() if isinstance(change, str) else change)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that hostile input would make; it must not be there when the test ends."""
    path = tmp_path / "executed"
    monkeypatch.setenv("MARKER", str(path))
    yield path
    assert not path.exists(), "code in a file was executed"
