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


def truncate(document: Document, limit: int, bos_id: int | None = None) -> tuple[Document, Cut]:
    """Cut to ``limit`` tokens (sequence length + 1: the last token is a label only).

    The end is cut, as everywhere. Only where that would leave no supervised token, because the prompt fills the limit,
    the start of the prompt goes instead: the window then holds the start of the first answer, as much of it as fits in
    half of the limit (at least one token), after the tail of the prompt. A beginning-of-sequence token stays at its place:
    a model that has always seen one attends to it.

    Args:
        document: any length; without a supervised token its end is cut.
        limit: tokens to keep, at least 2.
        bos_id: the beginning-of-sequence token, where the tokenizer has one.
    """
    length = len(document.token_ids)
    if length <= limit:
        return document, Cut.NOTHING
    first = next((i for i in range(1, length) if document.is_supervised[i]), 0)
    if first < limit:
        return _window(document, 0, limit), Cut.END
    most = first + limit // 2
    end = next((i for i in range(first, min(length, most)) if not document.is_supervised[i]), min(length, most))
    if document.token_ids[0] == bos_id:
        return _joined(_window(document, 0, 1), _window(document, end - limit + 1, end)), Cut.PROMPT
    return _window(document, end - limit, end), Cut.PROMPT


def truncate_pair(
    chosen: Document, rejected: Document, limit: int, bos_id: int | None = None
) -> tuple[Document, Document, Cut]:
    """Cut two answers to the same prompt to ``limit`` tokens each, keeping the answers.

    The start of the prompt goes first, as much of it as the longer answer needs. A quarter of the limit stays the prompt's
    (or the whole prompt, if it is shorter); only answers that do not fit into the rest lose their ends. Either way each
    document keeps a token of the prompt and at least one of its answer. As in :func:`truncate` a beginning-of-sequence token
    stays, if more of the prompt follows it.

    Both documents lose the same tokens at the start, so that their prompts begin alike. The prompts may differ in number of
    tokens, where a token straddles their border with the answer. Only where they differ by nearly the whole limit is the
    number of lost tokens another in each.

    Args:
        chosen, rejected: supervised from the first token of the answer on; each has one, and a prompt before it.
        limit: tokens to keep of each, at least 2.
        bos_id: as in :func:`truncate`.
    """
    if limit > 2 and all(d.token_ids[0] == bos_id and not d.is_supervised[1] for d in (chosen, rejected)):
        head, tails = _window(chosen, 0, 1), [_window(d, 1, len(d.token_ids)) for d in (chosen, rejected)]
        first, second, cut = truncate_pair(tails[0], tails[1], limit - 1)
        return _joined(head, first), _joined(head, second), cut
    prompts = [document.is_supervised.index(True) for document in (chosen, rejected)]
    longest = max(len(d.token_ids) - prompt for d, prompt in zip((chosen, rejected), prompts, strict=True))
    kept = max(limit - longest, min(max(prompts), max(limit // 4, 1)))
    start = max(min(max(prompts) - kept, min(prompts) - 1), 0)
    # A longer prompt than that leaves its answer no token.
    starts = [max(start, prompt - (limit - 1)) for prompt in prompts]
    cuts = [_window(d, start, start + limit) for d, start in zip((chosen, rejected), starts, strict=True)]
    if any(starts):
        return cuts[0], cuts[1], Cut.PROMPT
    is_shorter = len(cuts[0].token_ids) < len(chosen.token_ids) or len(cuts[1].token_ids) < len(rejected.token_ids)
    return cuts[0], cuts[1], Cut.END if is_shorter else Cut.NOTHING


def _window(document: Document, start: int, end: int) -> Document:
    return Document(document.token_ids[start:end], document.is_supervised[start:end])


def _joined(head: Document, tail: Document) -> Document:
    return Document(head.token_ids + tail.token_ids, head.is_supervised + tail.is_supervised)
