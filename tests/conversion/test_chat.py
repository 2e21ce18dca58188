"""An exported model chats as it was trained: with that template, up to the token that ends its answers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megatron_ogpsa.conversion.chat import carry_chat
from megatron_ogpsa.conversion.huggingface import carry_files
from megatron_ogpsa.data.template import read_template_file
from megatron_ogpsa.errors import UserError
from tests.data.conftest import CHATML, INSTRUCT, build_hugging_face_folder

END, IM_END = 1, 3  # of the tokenizer's special tokens
TOOL_USE = "{{ tools }}" + CHATML
PLAIN = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def _folder(path: Path, template: str | None, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    build_hugging_face_folder(path, template)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return path


def _trained(template: str, end_id: int | None) -> Namespace:
    return Namespace(chat_template_text=template, chat_end_id=end_id)


def _carry(folder: Path, trained: Namespace | None) -> list[str]:
    return carry_chat(folder, folder, trained)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_base_model_gains_what_it_was_trained_with(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base", None, {"eos_token_id": END, "bos_token_id": 0})
    notes = _carry(folder, _trained(CHATML, IM_END))
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
    assert len(_carry(folder, _trained(PLAIN, END))) == 1
    assert AutoTokenizer.from_pretrained(folder).chat_template == PLAIN
    assert not any(b"im_start" in content for name, content in _contents(folder).items() if "template" in name)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (folder / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("trained", [None, Namespace(), _trained(CHATML, IM_END), _trained("qwen3", IM_END)], ids=str)
def test_what_chats_already_stays_byte_for_byte(tmp_path: Path, trained: Namespace | None) -> None:
    """Also after training with a template of ours, which makes the same prompts."""
    own = CHATML
    if getattr(trained, "chat_template_text", "") == "qwen3":
        trained = _trained(read_template_file("qwen3"), IM_END)
        own = CHATML.removeprefix("{{ bos_token }}")
    folder = _folder(tmp_path / "chat", own, {"eos_token_id": END}, {"eos_token_id": IM_END})
    before = _contents(folder)
    assert _carry(folder, trained) == []
    assert _contents(folder) == before


def test_generation_settings_keep_what_they_say(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "chat", CHATML, {"eos_token_id": END}, {"temperature": 0.5})
    _carry(folder, _trained(CHATML, IM_END))
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert settings == {"temperature": 0.5, "eos_token_id": [END, IM_END]}


def test_a_folder_whose_tokenizer_cannot_be_loaded_is_left_and_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (note,) = _carry(tmp_path, _trained(CHATML, IM_END))
    assert note.startswith("chat template and stop tokens are as in the folder: its tokenizer cannot be loaded")
    assert "\n" not in note


@pytest.mark.parametrize("own", [CHATML, INSTRUCT, "{{ raise_exception('ask somebody else') }}"])
def test_a_template_of_ours_takes_the_place_of_one_with_other_prompts(tmp_path: Path, own: str) -> None:
    """A beginning-of-sequence token more, another format, and none at all."""
    folder = _folder(tmp_path / "chat", own, {"eos_token_id": IM_END})
    text = read_template_file("qwen3")
    assert _carry(folder, _trained(text, IM_END)) == ["chat_template.jinja: the chat template of the training"]
    assert AutoTokenizer.from_pretrained(folder).chat_template == text


def test_an_end_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "other", None, {"eos_token_id": END})
    before = _contents(folder)
    with pytest.raises(UserError, match=rf"{folder}: its tokenizer has no token 4000, .* name with --hf"):
        _carry(folder, _trained(CHATML, 4000))
    assert _contents(folder) == before


@pytest.fixture(params=["files", "tokenizer_config.json"])
def with_named(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with two templates, as transformers 5 and 4 save them."""
    folder = _folder(tmp_path / "named", None, {"eos_token_id": IM_END})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_USE}
    tokenizer.save_pretrained(folder, save_jinja_files=request.param == "files")
    return folder


def test_an_adapter_is_never_carried(tmp_path: Path) -> None:
    """transformers would load its weights into those that it is merged with, or miss them."""
    folder = _folder(tmp_path / "adapted", None, {})
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    carry_files(folder, tmp_path / "carried")
    assert {path.name for path in folder.iterdir()} - {path.name for path in (tmp_path / "carried").iterdir()} == {
        "adapter_config.json"
    }


def test_named_templates_are_carried(with_named: Path, tmp_path: Path) -> None:
    carry_files(with_named, tmp_path / "carried")
    assert carry_chat(with_named, tmp_path / "carried", _trained(CHATML, IM_END)) == []
    assert AutoTokenizer.from_pretrained(tmp_path / "carried").chat_template == {
        "default": CHATML,
        "tool_use": TOOL_USE,
    }


def test_named_templates_stay_beside_that_of_the_training(with_named: Path, tmp_path: Path) -> None:
    carry_files(with_named, tmp_path / "carried")
    notes = carry_chat(with_named, tmp_path / "carried", _trained(PLAIN, IM_END))
    assert notes == ["chat_template.jinja: the chat template of the training; tool_use as in the folder"]
    assert AutoTokenizer.from_pretrained(tmp_path / "carried").chat_template == {"default": PLAIN, "tool_use": TOOL_USE}


def test_a_template_is_not_written_anywhere_else(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "named", None, {"eos_token_id": IM_END})
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["chat_template"] = [{"name": "../../far", "template": TOOL_USE}]
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"the chat template '../../far' cannot be a file's name: rename it"):
        _carry(folder, _trained(PLAIN, IM_END))
    assert not (tmp_path.parent / "far.jinja").exists()
