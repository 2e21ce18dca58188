"""From a raw row to a checked preference pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ogpsa.data.messages import (
    Message,
    checked_text,
    message_list,
    prompt_messages,
    required_field,
    type_name,
)
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two answers to it; each answer begins with a turn of the assistant."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def pair_from_row(row: object, where: str) -> PreferencePair:
    """The pair of one row, checked.

    A row has ``chosen`` and ``rejected``, and its prompt in one of the forms of TRL and the Hugging Face hub: ``prompt`` as
    text or messages, with answers as text, as messages, or as whole conversations that begin with the prompt; or no
    ``prompt``, and two conversations whose common beginning is the prompt. Of further fields see
    :mod:`megatron_ogpsa.data.extras`.

    Args:
        row: what the source holds, of any type.
        where: ``file:line`` or its like, for error messages.

    Raises:
        UserError: naming ``where``, the field and the remedy.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with 'chosen' and 'rejected', not {type_name(row)}")
    answers = {name: _answer(required_field(row, name, where), f"{where}: {name!r}") for name in ("chosen", "rejected")}
    if row.get("prompt") is not None:
        prompt = prompt_messages(row["prompt"], where)
        chosen, rejected = (_without_prompt(prompt, answer) for answer in answers.values())
    else:
        chosen, rejected = answers.values()
        if any(isinstance(row[name], str) for name in answers):
            raise UserError(f"{where}: answers as text need a field 'prompt'; add it, or give whole conversations")
        shared = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt and chosen != rejected:
            raise UserError(f"{where}: 'chosen' and 'rejected' do not begin alike, so there is no prompt; add 'prompt'")
    if chosen == rejected:
        raise UserError(f"{where}: 'chosen' and 'rejected' are the same, so nothing is preferred; remove the row")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise UserError(f"{where}: {name!r} must go on with a turn of the assistant after the prompt; add it")
        if not any(_says_something(message) for message in answer if message["role"] == "assistant"):
            raise UserError(f"{where}: {name!r} is an empty answer; give it words or remove the row")
    return PreferencePair(prompt, chosen, rejected)


def source_kind(source: str) -> Literal["chat", "preference"]:
    """Whether a source holds conversations or preference pairs, by the fields of its first row.

    Raises:
        UserError: it cannot be read, holds no rows, or its first row is neither.
    """
    for where, row in open_source(source).rows():
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object with named fields, not {type_name(row)}")
        # Columnar formats fill what a row lacks with nulls, so fields with a value decide before those without.
        for fields in ({name for name, value in row.items() if value is not None}, set(row)):
            if fields & {"chosen", "rejected"}:
                return "preference"
            if fields & {"messages", "response"}:
                return "chat"
        found = ", ".join(repr(str(name)) for name in row) or "nothing"
        raise UserError(
            f"{where}: neither a conversation ('messages', or 'prompt' and 'response') nor a preference pair ('chosen' and "
            f"'rejected'; found {found}); rename the fields"
        )
    raise UserError(f"{source}: holds no rows; give a source with at least one")


def _answer(value: object, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": checked_text(value, where)}]
    return message_list(value, where)


def _says_something(message: Message) -> bool:
    return bool(message.get("tool_calls")) or bool(message["content"].strip())


def _common_length(first: list[Message], second: list[Message]) -> int:
    """Messages that two conversations begin with, both of them going on after it."""
    most = min(len(first), len(second)) - 1
    return next((index for index in range(most) if first[index] != second[index]), max(most, 0))


def _without_prompt(prompt: list[Message], answer: list[Message]) -> list[Message]:
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
