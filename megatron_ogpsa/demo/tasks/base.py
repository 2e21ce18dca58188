"""What a task of the small world is: a name and a way to draw examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Example:
    """One turn of conversation, as words separated by single spaces."""

    request: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The example as a chat, the form in which every data file stores it."""
        return [{"role": "user", "content": self.request}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True, slots=True)
class Task:
    """A general ability.

    ``draw`` returns one example and takes all its randomness from the generator it is given. ``words`` is every word that
    a request or an answer can contain: the vocabulary is made of them. ``has_one_answer`` is False where many answers are
    right (language), so that only the loss can score it.
    """

    name: str
    draw: Callable[[Random], Example]
    words: frozenset[str]
    has_one_answer: bool = True
