"""Tools and variables that rows give their chat template, and turns of the assistant that only call tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.data import ChatTokenizer, build_chat_dataset, build_preference_dataset
from megatron_ogpsa.data.extras import extras_from_row
from megatron_ogpsa.data.prompts import read_prompts
from megatron_ogpsa.errors import UserError
from tests.data.conftest import chat

WriteJsonl = Callable[..., str]

WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }};{% endfor %}{% endif %}{% if brief %}[brief]{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}({{ call.function.name }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "capital", "arguments": {}}}
ASKED = {"role": "user", "content": "What is it?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
GIVEN = {"role": "tool", "content": "Paris"}
ANSWERS = {"role": "assistant", "content": "Paris is."}


@pytest.fixture
def tokenizer(with_template: Callable[[str], ChatTokenizer]) -> ChatTokenizer:
    return with_template(WITH_TOOLS)


def document(item: dict[str, Any], tokenizer: ChatTokenizer, number: int = 0) -> tuple[str, str]:
    """Its text without special tokens, and what of it is learnt."""
    here = item["document_ids"] == number
    return (
        tokenizer.decode(item["tokens"][here].tolist()),
        tokenizer.decode(item["labels"][here & (item["loss_mask"] == 1)].tolist()),
    )


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_conversations_with_tools(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, tools: object) -> None:
    without = {name: field for name, field in CALLS.items() if name != "content"}
    for calls in (CALLS, without):
        source = write_jsonl({"messages": [ASKED, calls, GIVEN, ANSWERS], "tools": tools})
        dataset = build_chat_dataset(source, tokenizer, seq_length=256, packing=False, cache_dir=None)
        text, learnt = document(dataset[0], tokenizer)
        assert text.startswith(json.dumps(TOOL) + ";user\nWhat is it?")
        assert learnt == "(capital)\nParis is.\n"


def test_pairs_with_tools_and_variables(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": [ASKED], "chosen": [CALLS], "rejected": [ANSWERS]}
    row |= {"tools": [TOOL], "chat_template_kwargs": {"brief": True, "other": None}}
    dataset = build_preference_dataset(write_jsonl(row), tokenizer, seq_length=512, packing=False, cache_dir=None)
    for number, answer in enumerate(("(capital)", "Paris is.")):
        text, learnt = document(dataset[0], tokenizer, number)
        assert text.startswith(json.dumps(TOOL) + ";[brief]user\nWhat is it?")
        assert learnt.strip() == answer


def test_prompts_with_tools(write_jsonl: WriteJsonl, tokenizer: ChatTokenizer) -> None:
    (prompt,) = read_prompts(write_jsonl({"prompt": "What is it?", "tools": [TOOL]}))
    assert tokenizer.decode(tokenizer.encode_prompt(prompt.messages, prompt.extras)).startswith(json.dumps(TOOL))


def test_no_tools_are_no_tools() -> None:
    """Some templates announce an empty list at length, and columnar files have nulls in every row without tools."""
    for row in ({}, {"tools": None}, {"tools": []}, {"tools": "[]"}, {"tools": "null", "chat_template_kwargs": None}):
        assert extras_from_row(row, "f:1") == {}


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ({"tools": "[{]"}, "'tools' is text that is not JSON (Expecting property name"),
        ({"tools": "[" * 100_000}, "'tools' is text that is not JSON"),
        ({"tools": TOOL}, "'tools' must be a list of JSON schemas, not an object"),
        ({"tools": [TOOL, "capital"]}, "'tools'[1] must be an object, a tool's JSON schema, not text"),
        (
            {"chat_template_kwargs": [1]},
            "'chat_template_kwargs' must be an object of the template's variables, not a list",
        ),
        ({"chat_template_kwargs": {"a": [1]}}, "'a' must be text, a number or a boolean, not a list"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "'a' holds \\ud800, half of a surrogate pair"),
        ({"chat_template_kwargs": {"messages": "x"}}, "'messages' is no variable for a row to set; remove it"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "'bos_token' is no variable for a row to set; remove it"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            "'chat_template' is no variable for a row to set; remove it",
        ),
    ],
)
def test_unfit_extras_are_told_in_one_line(
    write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, field: dict[str, Any], fault: str
) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for build, row in ((build_chat_dataset, chat("a", "b")), (build_preference_dataset, pair)):
        path = Path(write_jsonl({}))
        path.write_text(json.dumps(row | field) + "\n", encoding="utf-8")
        with pytest.raises(UserError) as caught:
            build(str(path), tokenizer, seq_length=64, packing=False, cache_dir=None)  # type: ignore[operator]
        assert str(caught.value).startswith(f"{path}:1: ")
        assert fault in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("turn", [{"content": None}, {"content": None, "tool_calls": []}, {"tool_calls": None}])
def test_a_turn_that_neither_speaks_nor_calls_is_refused(
    write_jsonl: WriteJsonl, tokenizer: ChatTokenizer, turn: dict[str, Any]
) -> None:
    source = write_jsonl({"messages": [ASKED, {"role": "assistant"} | turn]})
    with pytest.raises(UserError, match=r"'messages'\[1\]: field 'content' is (null|missing)"):
        build_chat_dataset(source, tokenizer, seq_length=64, packing=False, cache_dir=None)
