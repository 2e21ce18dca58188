"""HaluEval, its questions: knowledge, a question, and the right answer (the hallucinated one is not used).

Fields are those of the configuration ``qa`` of https://huggingface.co/datasets/pminervini/HaluEval. How the authors of OGPSA
put them into a conversation is not published; here the knowledge comes first, as it does in HaluEval's own prompts.
"""

from __future__ import annotations

from megatron_ogpsa.data.messages import checked_text, required_field
from megatron_ogpsa.data.recipes.selection import Drop, Recipe, Row


def to_conversation(row: Row, where: str) -> Row | Drop:
    """Knowledge and question, and the right answer."""
    knowledge, question, answer = (
        checked_text(required_field(row, name, where), f"{where}: {name!r}").strip()
        for name in ("knowledge", "question", "right_answer")
    )
    if not (question and answer):
        return Drop("no question or no answer")
    return {
        "messages": [
            {"role": "user", "content": f"{knowledge}\n\n{question}" if knowledge else question},
            {"role": "assistant", "content": answer},
        ]
    }


HALUEVAL_SFT = Recipe(
    name="halueval_sft",
    source="pminervini/HaluEval:qa:data",
    licence="see https://huggingface.co/datasets/pminervini/HaluEval",
    num_rows=200,
    summary="questions answered from knowledge, as a reference of SFT (HaluEval)",
    convert=to_conversation,
)
