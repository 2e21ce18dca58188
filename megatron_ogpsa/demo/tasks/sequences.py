"""Abilities on short sequences of letters: reversing, sorting and shifting."""

from __future__ import annotations

from random import Random

from megatron_ogpsa.demo.tasks.base import Example, Task

LETTERS = tuple("abcdefghijkl")


def _letters(rng: Random, fewest: int, most: int) -> list[str]:
    return [rng.choice(LETTERS) for _ in range(rng.randint(fewest, most))]


def draw_reverse(rng: Random) -> Example:
    """``reverse c a f`` gives ``f a c``."""
    letters = _letters(rng, 2, 4)
    return Example(f"reverse {' '.join(letters)}", " ".join(reversed(letters)))


def draw_sort(rng: Random) -> Example:
    """``sort c a f`` gives ``a c f``; letters may repeat."""
    letters = _letters(rng, 2, 4)
    return Example(f"sort {' '.join(letters)}", " ".join(sorted(letters)))


def draw_shift(rng: Random) -> Example:
    """``shift c a l`` gives ``d b a``: every letter becomes the next one, the last letter becomes the first."""
    letters = _letters(rng, 2, 4)
    following = [LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in letters]
    return Example(f"shift {' '.join(letters)}", " ".join(following))


REVERSE = Task("reverse", draw_reverse, frozenset(LETTERS) | {"reverse"})
SORT = Task("sort", draw_sort, frozenset(LETTERS) | {"sort"})
SHIFT = Task("shift", draw_shift, frozenset(LETTERS) | {"shift"})
