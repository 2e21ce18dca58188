"""A value as it was written, and where, so that what is wrong with it can be told by that name."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ogpsa.errors import UserError


@dataclass(frozen=True)
class Value:
    """The text of a flag, a key of the configuration or a variable of the environment.

    Attributes:
        place: its name, such as ``--nnodes``, ``launch.nnodes`` or ``NNODES``.
    """

    text: str
    place: str

    def whole(self, *, at_least: int, others: str = "") -> int:
        """As a whole number.

        Raises:
            UserError: it is none, or too small; ``others`` names what else it may be.
        """
        try:
            number = int(self.text)
        except ValueError:
            number = at_least - 1
        if number < at_least:
            raise self.error(f"use {at_least} or more{others}")
        return number

    def seconds(self) -> float:
        """As a time above zero.

        Raises:
            UserError: it is none.
        """
        try:
            number = float(self.text)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise self.error("write seconds, more than 0")
        return number

    def error(self, remedy: str) -> UserError:
        """The error that names this value."""
        return UserError(f"{self.place} {self.text}: {remedy}")
