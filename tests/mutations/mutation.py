"""One mistake that someone could make in this project, and the tests that ought to notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake: a replacement of one passage of one file.

    It still imports and runs: what only crashes shows nothing. Its tests are few and on few ranks, so that all mutations
    together take some minutes.

    Attributes:
        path: the file, as seen from the project's folder.
        old: a passage that stands exactly once in it.
        new: what the mistake makes of it.
        tests: arguments of pytest; node ids, without options.
        why: what a person could have got wrong, in one line.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def applied_to(self, source: str) -> str:
        """``source`` with the mistake.

        Raises:
            ValueError: the passage is not there exactly once, so that the table must follow the code.
        """
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: its passage stands {source.count(self.old)} times in {self.path}")
        return source.replace(self.old, self.new)
