"""Prompts to be answered, from the same sources as conversations and preference pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ogpsa.data.extras import Extras, extras_from_row
from megatron_ogpsa.data.messages import Message, message_list, prompt_messages, type_name
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where the assistant is to answer.

    Attributes:
        where: ``file:line`` or its like.
        extras: what the chat template is told besides.
    """

    messages: list[Message]
    where: str
    extras: Extras = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Content of the last message."""
        return str(self.messages[-1]["content"])


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of all rows; see :func:`prompt_from_row`.

    Raises:
        UserError: the source or a row of it is unfit, with its line; or it holds no rows.
    """
    rows = open_source(source).rows()
    prompts = [Prompt(prompt_from_row(row, where), where, extras_from_row(row, where)) for where, row in rows]
    if not prompts:
        raise UserError(f"{source}: holds no rows; give a source with at least one")
    return prompts


def prompt_from_row(row: object, where: str) -> list[Message]:
    """The messages before the answer: ``prompt`` as text or messages, or ``messages`` without the assistant's last turns.

    Raises:
        UserError: there are none, or the last is the assistant's own; names ``where`` and the field.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with 'prompt' or 'messages', not {type_name(row)}")
    if row.get("prompt") is not None:
        messages = prompt_messages(row["prompt"], where)
    elif row.get("messages") is not None:
        messages = message_list(row["messages"], f"{where}: 'messages'")
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    else:
        found = ", ".join(repr(str(name)) for name in row) or "nothing"
        raise UserError(f"{where}: no field 'prompt' and no 'messages' (found {found}); rename the field")
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: nothing for the assistant to answer; end the prompt with a turn of the user")
    return messages
