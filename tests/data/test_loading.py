"""Tokenizers that cannot be loaded say which flag to mend."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_ogpsa.data import ChatTokenizer, load_chat_tokenizer
from megatron_ogpsa.errors import TransientError, UserError
from tests.data.conftest import CHATML, build_hugging_face_folder


def refusal(*args: str | None) -> str:
    with pytest.raises(UserError) as caught:
        load_chat_tokenizer(*args)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_type() -> None:
    assert "--tokenizer-type NullTokenizer: not supported" in refusal("NullTokenizer", "x", None)


def test_hugging_face_folder_is_missing_or_holds_nothing(tmp_path: Path) -> None:
    assert "/nowhere/at/all: not a folder" in refusal("HuggingFaceTokenizer", "/nowhere/at/all", None)
    message = refusal("HuggingFaceTokenizer", str(tmp_path), None)
    assert f"--tokenizer-model {tmp_path}: no tokenizer could be loaded" in message


def test_a_folder_that_is_away_may_be_back(hugging_face_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(folder: str, **_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), folder)

    monkeypatch.setattr("megatron_ogpsa.data.huggingface.AutoTokenizer.from_pretrained", from_pretrained)
    with pytest.raises(TransientError, match="no tokenizer could be loaded"):
        load_chat_tokenizer("HuggingFaceTokenizer", str(hugging_face_folder))


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path) -> None:
    hidden = tmp_path / ("x" * 300) / "tokenizer"  # longer than a name may be, since root may look anywhere
    message = refusal("HuggingFaceTokenizer", str(hidden), None)
    assert message == f"--tokenizer-model {hidden}: cannot be read (File name too long); check the folder"


def test_hugging_face_without_template_or_padding(tmp_path: Path) -> None:
    folder = build_hugging_face_folder(tmp_path / "bare", template=None, pad=False)
    assert "has no (default) chat template; give one with --chat-template" in refusal(
        "HuggingFaceTokenizer", str(folder), None
    )
    (tmp_path / "chat.jinja").write_text(CHATML)
    loaded = load_chat_tokenizer("HuggingFaceTokenizer", str(folder), str(tmp_path / "chat.jinja"))
    assert loaded.pad_id == 1  # no padding token: the end of sequence


def test_template_file_errors_name_file_and_line(hugging_face_folder: Path, tmp_path: Path) -> None:
    def message(content: bytes) -> str:
        (tmp_path / "chat.jinja").write_bytes(content)
        return refusal("HuggingFaceTokenizer", str(hugging_face_folder), str(tmp_path / "chat.jinja"))

    assert "chat.jinja: the file is empty" in message(b" \n")
    assert "chat.jinja: not UTF-8 (byte offset 3)" in message(b"abc\xff")
    assert "chat.jinja:2: " in message(b"fine\n{% for m in %}")
    missing = refusal("HuggingFaceTokenizer", str(hugging_face_folder), str(tmp_path / "none.jinja"))
    assert "--chat-template" in missing
    assert "No such file" in missing
    assert "Is a directory" in refusal("HuggingFaceTokenizer", str(hugging_face_folder), str(tmp_path))


def test_sentencepiece_errors(sentencepiece_files: tuple[str, str], tmp_path: Path) -> None:
    model, template = sentencepiece_files
    assert "give one with --chat-template FILE.jinja" in refusal("SentencePieceTokenizer", model, None)
    assert "No such file" in refusal("SentencePieceTokenizer", str(tmp_path / "none.model"), template)
    assert "Is a directory" in refusal("SentencePieceTokenizer", str(tmp_path), template)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    assert "not a sentencepiece model" in refusal("SentencePieceTokenizer", str(tmp_path / "broken.model"), template)
    (tmp_path / "empty.model").write_bytes(b"")
    assert "not a sentencepiece model" in refusal("SentencePieceTokenizer", str(tmp_path / "empty.model"), template)


def test_fingerprint_knows_tokenizer_and_template(
    tokenizer: ChatTokenizer, hugging_face_folder: Path, sentencepiece_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    again = load_chat_tokenizer("HuggingFaceTokenizer", str(hugging_face_folder))
    assert again.fingerprint == tokenizer.fingerprint
    (tmp_path / "chat.jinja").write_text(CHATML + " ")
    other = load_chat_tokenizer("HuggingFaceTokenizer", str(hugging_face_folder), str(tmp_path / "chat.jinja"))
    assert len({tokenizer.fingerprint, other.fingerprint, sentencepiece_tokenizer.fingerprint}) == 3


def test_round_trip_and_vocabulary(tokenizer: ChatTokenizer) -> None:
    token_ids, _ = tokenizer.encode("hello 日本語 😀\n")
    assert tokenizer.decode(token_ids) == "hello 日本語 😀\n"
    assert tokenizer.decode([0, *token_ids, 3, 1]) == "hello 日本語 😀\n"  # special tokens are no text
    assert max(token_ids) < tokenizer.vocab_size
    assert tokenizer.pad_id == 4
