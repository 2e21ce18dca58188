"""Abilities on digits: adding pairs of them, and finding the largest."""

from __future__ import annotations

from random import Random

from megatron_ogpsa.demo.tasks.base import Example, Task

DIGITS = tuple("0123456789")


def draw_addition(rng: Random) -> Example:
    """``add 2 plus 3 and 4 plus 1`` gives ``5 5``: two sums of digits up to four.

    A small model learns the 25 sums within a minute; unseen requests still need both of theirs to be right.
    """
    a, b, c, d = (rng.randrange(5) for _ in range(4))
    return Example(f"add {a} plus {b} and {c} plus {d}", f"{a + b} {c + d}")


def draw_maximum(rng: Random) -> Example:
    """``largest of 3 8 5 2`` gives ``8``."""
    digits = [rng.randrange(10) for _ in range(4)]
    return Example(f"largest of {' '.join(map(str, digits))}", str(max(digits)))


ADDITION = Task("addition", draw_addition, frozenset(DIGITS) | {"add", "plus", "and"})
MAXIMUM = Task("maximum", draw_maximum, frozenset(DIGITS) | {"largest", "of"})
