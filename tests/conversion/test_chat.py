"""An exported model chats as it was trained: with that template, up to the token that ends its answers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megatron_ogpsa.conversion.chat import carry_chat
from megatron_ogpsa.data.template import read_template_file
from tests.data.conftest import CHATML, build_hugging_face_folder

END, IM_END = 1, 3  # of the tokenizer's special tokens
PLAIN = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def _folder(path: Path, template: str | None, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    build_hugging_face_folder(path, template)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return path


def _trained(template: str, end_id: int | None) -> Namespace:
    return Namespace(chat_template_text=template, chat_end_id=end_id)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_base_model_gains_what_it_was_trained_with(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base", None, {"eos_token_id": END, "bos_token_id": 0})
    notes = carry_chat(folder, _trained(CHATML, IM_END))
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.bos_token_id) == ([END, IM_END], 0)
    assert notes == [
        "chat_template.jinja: the chat template of the training",
        "generation_config.json: generation ends at <|im_end|> too, which ends answers in the training",
    ]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_another_template_takes_the_place_of_the_folders_own(tmp_path: Path, place: str) -> None:
    folder = _folder(tmp_path / "chat", CHATML, {}, {"temperature": 0.5, "eos_token_id": [END, IM_END]})
    (folder / "chat_template.jinja").unlink()
    path = folder / place
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    in_json = json.dumps({**known, "chat_template": CHATML})
    path.write_text(CHATML if place.endswith("jinja") else in_json, encoding="utf-8")
    before = (folder / "generation_config.json").read_bytes()
    assert len(carry_chat(folder, _trained(PLAIN, END))) == 1
    assert AutoTokenizer.from_pretrained(folder).chat_template == PLAIN
    assert not any(b"im_start" in content for name, content in _contents(folder).items() if "template" in name)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (folder / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("trained", [None, Namespace(), _trained(CHATML, IM_END), _trained("qwen3", IM_END)], ids=str)
def test_what_chats_already_stays_byte_for_byte(tmp_path: Path, trained: Namespace | None) -> None:
    """Also after training with a template of ours, which makes the same prompts."""
    if getattr(trained, "chat_template_text", "") == "qwen3":
        trained = _trained(read_template_file("qwen3"), IM_END)
    folder = _folder(tmp_path / "chat", CHATML, {"eos_token_id": END}, {"eos_token_id": IM_END})
    before = _contents(folder)
    assert carry_chat(folder, trained) == []
    assert _contents(folder) == before


def test_generation_settings_keep_what_they_say(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "chat", CHATML, {"eos_token_id": END}, {"temperature": 0.5})
    carry_chat(folder, _trained(CHATML, IM_END))
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert settings == {"temperature": 0.5, "eos_token_id": [END, IM_END]}


def test_a_folder_whose_tokenizer_cannot_be_loaded_is_left_and_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (note,) = carry_chat(tmp_path, _trained(CHATML, IM_END))
    assert note.startswith("chat template and stop tokens are as in the folder: its tokenizer cannot be loaded")
    assert "\n" not in note
