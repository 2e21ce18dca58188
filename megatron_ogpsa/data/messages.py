"""From a raw row to checked chat messages."""

from __future__ import annotations

from typing import Any

from megatron_ogpsa.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


def messages_from_row(row: object, where: str) -> list[Message]:
    """The messages of one row, checked.

    A row has either ``messages``, a list of ``{"role", "content"}``, or ``prompt`` (text, or a list of messages) and
    ``response`` (text). A null field counts as absent when the other form is there, because columnar formats fill what
    a row lacks with nulls. Further fields of a message (``name``, ``tool_calls``) are handed to the chat template as
    they are; of further fields of a row see :mod:`megatron_ogpsa.data.extras`.

    Args:
        row: what the source holds, of any type.
        where: ``file:line`` or its like, for error messages.

    Raises:
        UserError: naming ``where``, the field and the remedy.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a row must be an object with 'messages' or 'prompt' and 'response', not {type_name(row)}"
        )
    if row.get("messages") is not None:
        messages = message_list(row["messages"], f"{where}: 'messages'")
    elif row.get("response") is None and {"chosen", "rejected"} <= row.keys():
        raise UserError(
            f"{where}: a preference pair, where conversations are wanted: train with --ogpsa-stage dpo, or give "
            "'messages', or 'prompt' and 'response'"
        )
    elif "prompt" in row or "response" in row:
        prompt, response = required_field(row, "prompt", where), required_field(row, "response", where)
        messages = prompt_messages(prompt, where)
        messages.append({"role": "assistant", "content": checked_text(response, f"{where}: 'response'")})
    elif "messages" in row:
        raise UserError(f"{where}: field 'messages' is null; give it a list of messages or remove the row")
    else:
        found = ", ".join(repr(str(name)) for name in row) or "nothing"
        raise UserError(f"{where}: no field 'messages', nor 'prompt' and 'response' (found {found}); rename the fields")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant turn, so nothing to learn; add one or remove the row")
    return messages


def prompt_messages(prompt: object, where: str) -> list[Message]:
    """A prompt as messages: text is one turn of the user. Raises UserError."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": checked_text(prompt, f"{where}: 'prompt'")}]
    if isinstance(prompt, list):
        return message_list(prompt, f"{where}: 'prompt'")
    raise UserError(f"{where}: 'prompt' must be text or a list of messages, not {type_name(prompt)}")


def message_list(value: object, where: str) -> list[Message]:
    """A checked, non-empty list of messages. Raises UserError."""
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of messages, not {type_name(value)}")
    if not value:
        raise UserError(f"{where} is an empty list; add messages or remove the row")
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with 'role' and 'content', not {type_name(value)}")
    role = required_field(value, "role", where)
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    message = {name: field for name, field in value.items() if field is not None}
    if role == "assistant" and message.get("tool_calls") and "content" not in message:
        return message | {"content": None}  # what templates look for where the assistant calls tools without a word
    checked_text(required_field(value, "content", where), f"{where}: 'content'")
    return message


def required_field(holder: dict[str, Any], name: str, where: str) -> object:
    """A field that must be there and not null. Raises UserError."""
    if name not in holder:
        raise UserError(f"{where}: field {name!r} is missing; add it or remove the row")
    if holder[name] is None:
        raise UserError(f"{where}: field {name!r} is null; give it a value or remove the row")
    return holder[name]


def checked_text(value: object, where: str) -> str:
    """Text that can be written as UTF-8. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, not {type_name(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character; tokenizers fail on it far from here.
        broken = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{where} holds {broken}, half of a surrogate pair; write the whole character") from error
    return value


def type_name(value: object) -> str:
    """What JSON calls the type of ``value``."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
