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
    they are; further fields of a row are ignored.

    Args:
        row: what the source holds, of any type.
        where: ``file:line`` or its like, for error messages.

    Raises:
        UserError: naming ``where``, the field and the remedy.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a row must be an object with 'messages' or 'prompt' and 'response', not {_type(row)}"
        )
    if row.get("messages") is not None:
        messages = _message_list(row["messages"], f"{where}: 'messages'")
    elif "prompt" in row or "response" in row:
        prompt, response = _field(row, "prompt", where), _field(row, "response", where)
        messages = _prompt_messages(prompt, where)
        messages.append({"role": "assistant", "content": _text(response, f"{where}: 'response'")})
    elif "messages" in row:
        raise UserError(f"{where}: field 'messages' is null; give it a list of messages or remove the row")
    else:
        found = ", ".join(repr(str(name)) for name in row) or "nothing"
        raise UserError(f"{where}: no field 'messages', nor 'prompt' and 'response' (found {found}); rename the fields")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant turn, so nothing to learn; add one or remove the row")
    return messages


def _prompt_messages(prompt: object, where: str) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": _text(prompt, f"{where}: 'prompt'")}]
    if isinstance(prompt, list):
        return _message_list(prompt, f"{where}: 'prompt'")
    raise UserError(f"{where}: 'prompt' must be text or a list of messages, not {_type(prompt)}")


def _message_list(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of messages, not {_type(value)}")
    if not value:
        raise UserError(f"{where} is an empty list; add messages or remove the row")
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with 'role' and 'content', not {_type(value)}")
    role = _field(value, "role", where)
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    _text(_field(value, "content", where), f"{where}: 'content'")
    return {name: field for name, field in value.items() if field is not None}


def _field(holder: dict[str, Any], name: str, where: str) -> object:
    if name not in holder:
        raise UserError(f"{where}: field {name!r} is missing; add it or remove the row")
    if holder[name] is None:
        raise UserError(f"{where}: field {name!r} is null; give it a value or remove the row")
    return holder[name]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, not {_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character; tokenizers fail on it far from here.
        broken = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{where} holds {broken}, half of a surrogate pair; write the whole character") from error
    return value


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
