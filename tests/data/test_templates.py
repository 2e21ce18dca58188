"""Templates that come with this project: their text is that of the model's own, and they say what the assistant writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.data import ChatTokenizer, load_chat_tokenizer
from megatron_ogpsa.data.template import ChatTemplate, read_template_file
from megatron_ogpsa.errors import UserError
from tests.data.conftest import chat

CALL = {"type": "function", "function": {"name": "capital", "arguments": {"of": "Francé", "if": None}}}
CALL_IN_TEXT = {"name": "capital", "arguments": '{"of": "Peru"}'}
SYSTEM = {"role": "system", "content": "Be brief."}
RESPONSE = "<tool_response>\nParis\n</tool_response>"

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": chat("a", "b")["messages"],
    "system": [SYSTEM, *chat("a", "b")["messages"]],
    "system later": [*chat("a", "b")["messages"], SYSTEM, *chat("c", "d")["messages"]],
    "turns": chat("a", "b", "a", "\n\nd\n", "e", " f")["messages"],
    "empty answer": chat("a", "", "b", "")["messages"],
    "two answers": [*chat("a", "b")["messages"], {"role": "assistant", "content": "c"}],
    "question last": chat("a", "b", "c")["messages"],
    "no question": [SYSTEM, {"role": "assistant", "content": "b"}],
    "tools called": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL_IN_TEXT]},
        {"role": "tool", "content": "Paris"},
        {"role": "tool", "content": "Lima"},
        {"role": "assistant", "content": "Both.", "tool_calls": [CALL]},
        {"role": "tool", "content": "Paris"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ],
    "tool's answer as the user's": chat("a", "b", RESPONSE, "c")["messages"],
    "thoughts": chat("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")["messages"],
    "thoughts of their own": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "\nx\n", "tool_calls": [CALL]},
        {"role": "tool", "content": "Paris"},
        {"role": "assistant", "content": "\nc", "reasoning_content": "y"},
    ],
}


@pytest.fixture(scope="module")
def qwen3() -> ChatTemplate:
    return ChatTemplate(read_template_file("qwen3"), {}, "qwen3")


@pytest.fixture(scope="module")
def model_own() -> ChatTemplate:
    """The model's own, as TRL keeps it to recognise the model."""
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja"
    if not path.is_file():
        pytest.skip("this version of TRL keeps no template of Qwen3")
    return ChatTemplate(path.read_text(encoding="utf-8"), {}, "the model's own")


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_qwen3_writes_what_the_models_own_template_writes(
    qwen3: ChatTemplate, model_own: ChatTemplate, case: str
) -> None:
    messages = CONVERSATIONS[case]
    assert qwen3.render(messages) == model_own.render(messages)
    for extras in ({}, {"enable_thinking": True}):
        prompts = [t.render(messages, add_generation_prompt=True, extras=extras) for t in (qwen3, model_own)]
        assert prompts[0] == prompts[1]


def test_qwen3_learns_each_answer_with_its_end(
    qwen3: ChatTemplate, with_template: Callable[[str], ChatTokenizer]
) -> None:
    """Of several turns, which the model's own template does not let be told apart; and of a pair, the answer alone."""
    text, spans = qwen3.render_with_spans(CONVERSATIONS["turns"])
    no_thoughts = "<think>\n\n</think>\n\n"
    learnt = [text[begin:end] for begin, end in spans]
    assert learnt == ["b<|im_end|>", "\n\nd\n<|im_end|>", f"{no_thoughts} f<|im_end|>"]
    text, spans = qwen3.render_with_spans(CONVERSATIONS["tools called"], answer_from=8)
    assert [text[begin:end] for begin, end in spans] == [f"{no_thoughts}Bye<|im_end|>"]
    assert with_template(qwen3.source).turn_end_id is not None


def test_the_models_own_template_is_refused_with_the_remedy(model_own: ChatTemplate, qwen3: ChatTemplate) -> None:
    with pytest.raises(UserError, match=r"writes message 2 differently .*say --chat-template qwen3$"):
        model_own.render_with_spans(CONVERSATIONS["turns"])
    text, spans = model_own.render_with_spans(CONVERSATIONS["one turn"])
    ours, own = qwen3.render_with_spans(CONVERSATIONS["one turn"])
    assert [ours[begin:end] + "\n" for begin, end in own] == [text[begin:end] for begin, end in spans]


def test_a_template_is_found_by_its_name_unless_a_file_has_it(
    hugging_face_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_chat_tokenizer("HuggingFaceTokenizer", str(hugging_face_folder), "qwen3").template
    assert "<think>" in shipped.source
    (tmp_path / "qwen3").write_text("{{ messages }}", encoding="utf-8")
    assert read_template_file("qwen3") == "{{ messages }}"
    (tmp_path / "qwen3").unlink()
    (tmp_path / "qwen3").mkdir()  # a model's, say
    assert read_template_file("qwen3") == shipped.source
    for name in ("qwen4", "../templates/qwen3", "templates/qwen3"):
        with pytest.raises(UserError, match="No such file or directory; give the path of a Jinja file, or qwen3"):
            read_template_file(name)


def test_tools_are_refused_by_qwen3(qwen3: ChatTemplate) -> None:
    with pytest.raises(UserError, match="the template qwen3 announces no tools"):
        qwen3.render(CONVERSATIONS["one turn"], extras={"tools": [CALL]})
