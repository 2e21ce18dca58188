"""Which tokens of a preference pair are learnt: the answer, never the assistant's earlier turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ogpsa.data import ChatTokenizer, build_chat_dataset, build_preference_dataset
from megatron_ogpsa.data.messages import Message
from megatron_ogpsa.errors import UserError
from tests.data.conftest import CHATML, INSTRUCT, chat

LoadTemplate = Callable[[str], ChatTokenizer]

CONVERSATION = chat("Say hello", "hello", "Again", "good bye")["messages"]
ANSWER_FROM = 3

_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}BODY\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BLOCK = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
# How often a template marks a turn is its own affair.
TEMPLATES = {
    "unmarked": CHATML,
    "marked": _MARKED.replace("BODY", _BLOCK),
    "marked twice": _MARKED.replace("BODY", "{% generation %}{% endgeneration %}" + _BLOCK),
    "last turn marked": _MARKED.replace(
        "BODY", "{% if loop.last %}" + _BLOCK + "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    ),
}


def answer_of(tokenizer: ChatTokenizer, messages: list[Message], answer_from: int = ANSWER_FROM) -> str:
    token_ids, flags = tokenizer.encode_chat(messages, answer_from=answer_from)
    return tokenizer.decode([t for t, flag in zip(token_ids, flags, strict=True) if flag]).strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_earlier_turns_of_the_assistant_are_prompt(name: str, with_template: LoadTemplate) -> None:
    assert answer_of(with_template(TEMPLATES[name]), CONVERSATION) == "good bye"


def test_all_assistant_turns_of_an_answer_are_learnt(tokenizer: ChatTokenizer) -> None:
    assert answer_of(tokenizer, CONVERSATION, answer_from=1).split() == ["hello", "good", "bye"]


def test_marked_template_that_rewrites_the_prompt_is_refused(with_template: LoadTemplate) -> None:
    counting = with_template("{{ messages|length }}" + TEMPLATES["marked"])
    with pytest.raises(UserError, match=r"writes the prompt differently when an answer follows"):
        answer_of(counting, CONVERSATION)
    assert answer_of(counting, CONVERSATION[2:], answer_from=1) == "good bye"  # nothing earlier to tell it from


def test_earlier_turns_may_be_rewritten_where_they_are_prompt(with_template: LoadTemplate) -> None:
    """Reasoning models drop earlier thoughts. Fine-tuning refuses that; a prompt is written as the model will see it."""
    forgetful = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(UserError, match="differently when others follow"):
        forgetful.encode_chat(CONVERSATION)
    assert answer_of(forgetful, CONVERSATION) == "good bye"


@pytest.mark.parametrize("name", TEMPLATES)
def test_earlier_turns_of_the_assistant_are_prompt_in_rows_too(
    name: str, write_jsonl: Callable[..., str], with_template: LoadTemplate
) -> None:
    by = with_template(TEMPLATES[name])
    whole = {"chosen": CONVERSATION, "rejected": [*CONVERSATION[:-1], {"role": "assistant", "content": "hello to you"}]}
    item = build_preference_dataset(write_jsonl(whole), by, seq_length=256, packing=False, cache_dir=None)[0]
    for number, answer in enumerate(("good bye", "hello to you")):
        learnt = (item["document_ids"] == number) & (item["loss_mask"] == 1)
        assert by.decode(item["labels"][learnt].tolist()).strip() == answer


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece_tokenizer"])
def test_each_document_is_what_fine_tuning_on_it_sees(
    kind: str, request: pytest.FixtureRequest, write_jsonl: Callable[..., str]
) -> None:
    by: ChatTokenizer = request.getfixturevalue(kind)
    settings: dict[str, Any] = {"seq_length": 256, "packing": False, "cache_dir": None}
    answers = ("Paris is the capital.", "I cannot help.")
    question = chat("naïve café?")["messages"]
    row = {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
    item = build_preference_dataset(write_jsonl(row), by, **settings)[0]
    for number, answer in enumerate(answers):
        both = write_jsonl({"messages": [*question, {"role": "assistant", "content": answer}]}, name="chat.jsonl")
        alone = build_chat_dataset(both, by, **settings)[0]
        mine, its = item["document_ids"] == number, alone["document_ids"] == 0
        for field in ("tokens", "loss_mask", "position_ids"):
            assert torch.equal(item[field][mine], alone[field][its]), field


def test_prompts_may_differ_where_a_token_straddles_the_border(
    write_jsonl: Callable[..., str], with_template: LoadTemplate
) -> None:
    """The space before " hello" is part of its token; before "Zzz" it is a token of its own, and the prompt's."""
    by = with_template(INSTRUCT.replace("' %} {{", "' %}{{").replace("[/INST]", "[/INST] "))
    row = {"prompt": "Say", "chosen": "hello", "rejected": "Zzz"}
    item = build_preference_dataset(write_jsonl(row), by, seq_length=96, packing=False, cache_dir=None)[0]
    prompts, answers = [], []
    for number in (0, 1):
        here, is_answer = item["document_ids"] == number, item["loss_mask"] == 1
        prompts.append(int((here & ~is_answer).sum()))
        answers.append(by.decode(item["labels"][here & is_answer].tolist()))
    assert answers[0].strip() == "hello"
    assert answers[1] == "Zzz"
    assert prompts[1] == prompts[0] + 1
