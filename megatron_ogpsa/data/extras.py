"""What a row gives its chat template besides messages: tools that may be called, and variables of the template's own."""

from __future__ import annotations

import json
from typing import Any

from megatron_ogpsa.data.messages import checked_text, type_name
from megatron_ogpsa.errors import UserError

Extras = dict[str, Any]
"""Variables of a chat template, by name; ``tools`` among them."""

_TAKEN = frozenset(
    {
        *("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "return_assistant_tokens_mask", "date_string"),
    }
)


def extras_from_row(row: object, where: str) -> Extras:
    """The fields ``tools`` and ``chat_template_kwargs`` of one row, as TRL's trainers take them, checked.

    ``tools`` is a list of JSON schemas, or JSON text of one: columnar formats give each tool the fields of all others.
    An empty list counts as absent, since some templates announce no tools at length.

    Args:
        row: what the source holds; one that is no object has been refused by whoever reads its messages.
        where: ``file:line`` or its like, for error messages.

    Raises:
        UserError: naming ``where``, the field and the remedy.
    """
    if not isinstance(row, dict):
        return {}
    extras = _variables(row.get("chat_template_kwargs"), f"{where}: 'chat_template_kwargs'")
    if tools := _tools(row.get("tools"), f"{where}: 'tools'"):
        extras["tools"] = tools
    return extras


def _tools(value: object, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is text that is not JSON ({error}); write a list of JSON schemas") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of JSON schemas, not {type_name(value)}")
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise UserError(f"{where}[{index}] must be an object, a tool's JSON schema, not {type_name(tool)}")
    return value


def _variables(value: object, where: str) -> Extras:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object of the template's variables, not {type_name(value)}")
    for name, given in value.items():
        if name in _TAKEN or not name.isidentifier() or name.endswith("_token"):
            raise UserError(f"{where}: {name!r} is no variable for a row to set; remove it")
        if isinstance(given, str):
            checked_text(given, f"{where}: {name!r}")
        elif not isinstance(given, bool | int | float | None):
            raise UserError(f"{where}: {name!r} must be text, a number or a boolean, not {type_name(given)}")
    # Columnar formats fill what a row lacks with nulls.
    return {name: given for name, given in value.items() if given is not None}
