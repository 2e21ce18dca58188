"""UltraFeedback in its binarized form: a prompt and two conversations, the better and a worse one, with their scores.

Fields and splits are those of https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized.
"""

from __future__ import annotations

from megatron_ogpsa.data.messages import Message, message_list, required_field, type_name
from megatron_ogpsa.data.recipes.selection import Drop, Recipe, Row
from megatron_ogpsa.errors import UserError

SOURCE = "HuggingFaceH4/ultrafeedback_binarized"
LICENCE = "see https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized"


def to_conversation(row: Row, where: str) -> Row | Drop:
    """The better conversation."""
    chosen = _conversation(row, "chosen", where)
    if not _is_answered(chosen):
        return Drop("no answer at the end")
    return {"messages": chosen}


def to_pair(row: Row, where: str) -> Row | Drop:
    """The last answers of both conversations, to the same prompt; equal scores prefer nothing."""
    chosen, rejected = (_conversation(row, name, where) for name in ("chosen", "rejected"))
    scores = [_score(row, f"score_{name}", where) for name in ("chosen", "rejected")]
    if not (_is_answered(chosen) and _is_answered(rejected)):
        return Drop("no answer at the end")
    if chosen[:-1] != rejected[:-1]:
        return Drop("the prompts differ")
    if chosen[-1]["content"] == rejected[-1]["content"]:
        return Drop("the answers are the same")
    if scores[0] <= scores[1]:
        return Drop("the chosen answer has no higher score")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _conversation(row: Row, name: str, where: str) -> list[Message]:
    messages = message_list(required_field(row, name, where), f"{where}: {name!r}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _score(row: Row, name: str, where: str) -> float:
    value = required_field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name!r} must be a number, not {type_name(value)}")
    return float(value)


def _is_answered(messages: list[Message]) -> bool:
    return len(messages) > 1 and messages[-1]["role"] == "assistant" and bool(messages[-1]["content"].strip())


ULTRAFEEDBACK_SFT = Recipe(
    name="ultrafeedback_sft",
    source=f"{SOURCE}:train_sft",
    licence=LICENCE,
    num_rows=200,
    summary="general conversations, as a reference of SFT (UltraFeedback)",
    convert=to_conversation,
)
ULTRAFEEDBACK_DPO = Recipe(
    name="ultrafeedback_dpo",
    source=f"{SOURCE}:train_prefs",
    licence=LICENCE,
    num_rows=200,
    summary="general pairs, as a reference of DPO (UltraFeedback)",
    convert=to_pair,
)
