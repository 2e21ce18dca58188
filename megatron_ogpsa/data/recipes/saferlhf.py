"""PKU-SafeRLHF: a prompt, two responses, whether each is safe, and which is safer and which is better.

Its fields are those of the data set's page, https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF. How the authors of
OGPSA cut their 10,000 rows of it is not published; what is taken here is written below.
"""

from __future__ import annotations

from megatron_ogpsa.data.messages import checked_text, required_field, type_name
from megatron_ogpsa.data.recipes.selection import Drop, Recipe, Row
from megatron_ogpsa.errors import UserError

SOURCE = "PKU-Alignment/PKU-SafeRLHF"
LICENCE = "CC-BY-NC-4.0: not for commercial use"


def to_conversation(row: Row, where: str) -> Row | Drop:
    """The response to learn: the safe one, or if both are safe the better one; rows without a safe one are dropped."""
    prompt, responses, is_safe = _checked(row, where)
    if not any(is_safe):
        return Drop("neither response is safe")
    chosen = _choice(row, "better_response_id", where) if all(is_safe) else is_safe.index(True)
    if not responses[chosen].strip():
        return Drop("the response is empty")
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": responses[chosen]}],
    }


def to_pair(row: Row, where: str) -> Row | Drop:
    """The safe response over the unsafe one; where both are safe, or neither, the pair says nothing about safety."""
    prompt, responses, is_safe = _checked(row, where)
    if all(is_safe):
        return Drop("both responses are safe")
    if not any(is_safe):
        return Drop("neither response is safe")
    chosen = is_safe.index(True)
    if _choice(row, "safer_response_id", where) != chosen:
        return Drop("the safer response is not the safe one")
    if not all(response.strip() for response in responses):
        return Drop("a response is empty")
    return {"prompt": prompt, "chosen": responses[chosen], "rejected": responses[1 - chosen]}


def _checked(row: Row, where: str) -> tuple[str, list[str], list[bool]]:
    prompt, *responses = (
        checked_text(required_field(row, name, where), f"{where}: {name!r}")
        for name in ("prompt", "response_0", "response_1")
    )
    return prompt, responses, [_flag(row, f"is_response_{index}_safe", where) for index in range(2)]


def _flag(row: Row, name: str, where: str) -> bool:
    value = required_field(row, name, where)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name!r} must be true or false, not {type_name(value)}")
    return value


def _choice(row: Row, name: str, where: str) -> int:
    value = required_field(row, name, where)
    if isinstance(value, bool) or value not in (0, 1):
        raise UserError(f"{where}: {name!r} must be 0 or 1, not {value!r}")
    return int(value)  # 1.0 too, of a copy through pandas


SAFERLHF_SFT = Recipe(
    name="saferlhf_sft",
    source=SOURCE,
    licence=LICENCE,
    num_rows=10_000,
    summary="safe responses to learn (PKU-SafeRLHF)",
    convert=to_conversation,
)
SAFERLHF_DPO = Recipe(
    name="saferlhf_dpo",
    source=SOURCE,
    licence=LICENCE,
    num_rows=10_000,
    summary="a safe response over an unsafe one (PKU-SafeRLHF)",
    convert=to_pair,
)
