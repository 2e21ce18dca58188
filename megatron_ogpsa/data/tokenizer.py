"""What every tokenizer of chats does: token ids, and which of them are the assistant's to produce."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property

from megatron_ogpsa.data.extras import Extras
from megatron_ogpsa.data.messages import Message
from megatron_ogpsa.data.template import ChatTemplate, Span

ENDLESS_TURN = (
    "the assistant's turn, as it is learnt, ends in no token that ends answers: the model may not learn to end"
)
ENDLESS_TURN_REMEDY = "give a --chat-template that writes eos_token after an answer, in {% generation %} if it has that"


class ChatTokenizer(ABC):
    """Turns conversations into token ids.

    The chat template alone decides which special tokens a conversation has: tokenizers are never asked to add their
    own, so a template that writes the beginning-of-sequence token does not get a second one.
    """

    template: ChatTemplate
    vocab_size: int
    """Number of token ids, before any padding of the embedding."""
    pad_id: int
    """The padding token, or the end-of-sequence token where there is none. Padding is never learnt."""

    @abstractmethod
    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of a text, and the characters each stands for, ``[begin, end)``."""

    @abstractmethod
    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, without special tokens."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The tokenizer's beginning-of-sequence token."""

    @property
    @abstractmethod
    def eos_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of tokenizer and chat template."""

    def encode_chat(
        self, messages: list[Message], *, answer_from: int = 0, extras: Extras | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether it is the assistant's to produce.

        Turns before message ``answer_from`` are prompt, the assistant's among them too.

        A token that straddles the border of a turn belongs to whoever writes its last character: that is where a model
        that generates token by token commits itself to it.

        Raises:
            UserError: see :meth:`ChatTemplate.render_with_spans`.
        """
        text, spans = self.template.render_with_spans(messages, answer_from=answer_from, extras=extras)
        is_assistant = bytearray(len(text) + 1)
        for begin, end in spans:
            is_assistant[begin:end] = b"\1" * (end - begin)
        token_ids, offsets = self.encode(text)
        return token_ids, [bool(is_assistant[position]) for position in last_characters(offsets)]

    def encode_prompt(self, messages: list[Message], extras: Extras | None = None) -> list[int]:
        """Token ids of a conversation up to where the assistant is to answer."""
        return self.encode(self.template.render(messages, add_generation_prompt=True, extras=extras))[0]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's end-of-sequence token and the template's end-of-turn token.

        They differ in many chat models. The template's is found by example: what follows the content of an assistant's
        turn, if that is one token (white space aside).
        """
        found = [] if self.eos_id is None else [self.eos_id]
        if len(self._example_ending) == 1:
            found += self._example_ending
        return tuple(dict.fromkeys(found))

    @property
    def turn_end_id(self) -> int | None:
        """The token, one of :attr:`eos_ids`, in which what is learnt of the assistant's turn ends.

        Without one a model that is trained on it does not learn to end.

        Raises:
            UserError: the template refuses a question and an answer.
        """
        last = self._example_ending[-1] if self._example_ending else None
        return last if last in self.eos_ids else None

    @cached_property
    def _example_ending(self) -> list[int]:
        """Tokens of the assistant's that follow the content of an example turn, without white space."""
        answer = "Yes."
        text, spans = self.template.render_with_spans(
            [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
        )
        content = next((at for begin, end in spans if (at := text.find(answer, begin, end)) >= 0), None)
        if content is None:
            return []
        after = content + len(answer)
        token_ids, offsets = self.encode(text)
        return [
            token_id
            for token_id, (first, last) in zip(token_ids, offsets, strict=True)
            if after <= first
            and text[first:last].strip()
            and any(begin <= first and last <= end for begin, end in spans)
        ]


def last_characters(offsets: list[Span]) -> list[int]:
    """For each token the character of the text that completes it.

    Tokens without characters of their own are of two kinds. Byte-level tokenizers trim spaces off the offsets, so a
    token of spaces leaves a gap before it and stands for that gap. Others (a marker for the start of a word, the first
    bytes of a character that is spelt in bytes) leave no gap and come before the next character.
    """
    characters, covered = [], 0
    for begin, end in offsets:
        if end > begin:
            characters.append(end - 1)
        else:
            characters.append(begin - 1 if begin > covered else begin)
        covered = max(covered, end)
    return characters


def sha256_of(vocabulary: bytes, template: ChatTemplate, pad_id: int) -> str:
    """SHA-256 (hexadecimal) of whatever decides the tokens of a conversation."""
    rest = json.dumps([template.source, template.variables, pad_id], sort_keys=True)
    return hashlib.sha256(vocabulary + b"\0" + rest.encode()).hexdigest()
