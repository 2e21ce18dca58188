"""Cutting a chat to length without losing what is learnt from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cut(Enum):
    """What was cut off a document."""

    NOTHING = "nothing"
    END = "end"
    PROMPT = "prompt"


@dataclass(frozen=True)
class Document:
    """A tokenized chat: one flag per token, true where the token is the assistant's to produce."""

    token_ids: list[int]
    is_supervised: list[bool]

    @property
    def num_supervised(self) -> int:
        """Tokens that can be a label: all supervised ones but the first token, which nothing precedes."""
        return sum(self.is_supervised[1:])


def truncate(document: Document, limit: int) -> tuple[Document, Cut]:
    """Cut to ``limit`` tokens (sequence length + 1: the last token is a label only).

    The end is cut, as everywhere. Only where that would leave no supervised token, because the prompt fills the limit,
    the start of the prompt goes instead: the window then holds the start of the first answer, as much of it as fits in
    half of the limit (at least one token), after the tail of the prompt.

    Args:
        document: any length; without a supervised token its end is cut.
        limit: tokens to keep, at least 2.
    """
    length = len(document.token_ids)
    if length <= limit:
        return document, Cut.NOTHING
    first = next((i for i in range(1, length) if document.is_supervised[i]), 0)
    if first < limit:
        return _window(document, 0, limit), Cut.END
    most = first + limit // 2
    end = next((i for i in range(first, min(length, most)) if not document.is_supervised[i]), min(length, most))
    return _window(document, end - limit, end), Cut.PROMPT


def _window(document: Document, start: int, end: int) -> Document:
    return Document(document.token_ids[start:end], document.is_supervised[start:end])
