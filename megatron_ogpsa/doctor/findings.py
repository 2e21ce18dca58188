"""What a check has found, as data; the exit code, the table and the JSON that follow from it. Standard library alone."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_ogpsa.errors import UserError, one_line

Level = Literal["OK", "WARN", "FAIL"]

EXIT_CODES: dict[Level, int] = {"OK": 0, "WARN": 1, "FAIL": 2}
"""The worst level decides."""

_NAME_WIDTH = 20
_INDENT = " " * (2 + 4 + 2 + _NAME_WIDTH + 2)
_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        remedy: what to do about it; empty if there is nothing to do.
    """

    name: str
    level: Level
    value: str
    remedy: str = ""


def ok(name: str, value: str) -> Finding:
    """Nothing to do."""
    return Finding(name=name, level="OK", value=value)


def warn(name: str, value: str, remedy: str) -> Finding:
    """A run is possible, and may not be what was meant."""
    return Finding(name=name, level="WARN", value=value, remedy=remedy)


def fail(name: str, value: str, remedy: str) -> Finding:
    """A run would fail, or would be wrong."""
    return Finding(name=name, level="FAIL", value=value, remedy=remedy)


def not_made(name: str, *causes: str) -> Finding:
    """A check that makes no sense as long as others fail."""
    return warn(name, f"not examined for want of: {', '.join(causes)}", f"mend first: {', '.join(causes)}")


Check = Callable[[], Finding | Iterable[Finding]]


class Report:
    """Findings by section, in the order in which they are made. A failing check hides no other one.

    A check that cannot be made because another one has failed is a warning, with the other one's name: the exit code is
    the failure's in any case.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        """``say`` is given each line of the table as soon as it is known."""
        self._say = say
        self._sections: dict[str, list[Finding]] = {}
        self._section = ""
        self._unsound: dict[tuple[str, str], tuple[str, ...]] = {}

    def begin(self, section: str) -> None:
        """Open a section; what is examined from now on belongs to it."""
        self._say(f"{section}" if not self._sections else f"\n{section}")
        self._section = section
        self._sections[section] = []

    def examine(self, name: str, check: Check, *, needs: Iterable[str] = ()) -> None:
        """Make a check and add what it finds, its failure included.

        What it prints and what libraries print in it is not shown.

        Args:
            name: of the check, and of the finding if the check cannot tell.
            needs: checks of this section, or of the first one, without which it makes no sense.
        """
        causes = dict.fromkeys(cause for need in needs for cause in self._causes(need))
        if causes:
            self._unsound[self._section, name] = tuple(causes)
            self.add(not_made(name, *causes))
            return
        found = made(name, check)
        self._unsound[self._section, name] = (name,) if any(finding.level == "FAIL" for finding in found) else ()
        for finding in found:
            self.add(finding)

    def is_sound(self, name: str) -> bool:
        """Whether a check of this section, or of the first one, was made and has not failed."""
        return not self._causes(name)

    def _causes(self, name: str) -> tuple[str, ...]:
        """The failed checks for which ``name`` is not sound; itself, if it was never asked for."""
        first = next(iter(self._sections))
        return self._unsound.get((self._section, name), self._unsound.get((first, name), (name,)))

    def add(self, finding: Finding) -> None:
        """Add a finding to the current section."""
        self._sections[self._section].append(finding)
        for line in as_lines(finding):
            self._say(line)

    @property
    def findings(self) -> list[Finding]:
        """Of all sections."""
        return [finding for section in self._sections.values() for finding in section]

    @property
    def exit_code(self) -> int:
        """0: all OK; 1: there are warnings; 2: there are failures."""
        return max((EXIT_CODES[finding.level] for finding in self.findings), default=0)

    def summary(self) -> str:
        """How many of each level."""
        counts = {level: sum(finding.level == level for finding in self.findings) for level in EXIT_CODES}
        return ", ".join(f"{count} {level}" for level, count in counts.items() if count)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the exit code."""
        found = [
            {"section": section, **asdict(finding)}
            for section, findings in self._sections.items()
            for finding in findings
        ]
        return {"exit_code": self.exit_code, "findings": found}


def made(name: str, check: Check) -> list[Finding]:
    """What ``check`` finds; a mistake of the user's that it raises, or a defect, becomes a failure."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = check()
            return [found] if isinstance(found, Finding) else list(found)
    except UserError as error:
        return [fail(name, *in_two(str(error)))]
    except Exception as error:  # one check must not hide the others, whatever a broken environment raises
        remedy = "mend what the message names; if it names nothing of yours, please report it with this line"
        return [fail(name, f"the check itself failed: {described(error)}", remedy)]


def described(error: BaseException) -> str:
    """An exception in one line: its type, its message and where it was raised."""
    return f"{type(error).__name__}: {one_line(error)}"


def in_two(message: str) -> tuple[str, str]:
    """The message of a user error as value and remedy: it says what is wrong, where, and then what to do.

    The remedy follows a semicolon, or the first colon after a phrase (what stands before the first colon may be a place,
    such as ``train.jsonl:17``); neither counts within parentheses. A message that is all in one says its remedy itself.
    """
    outside = _without_parentheses(message)
    if (cut := outside.rfind("; ")) > 0:
        return message[:cut], message[cut + 2 :]
    cut = outside.find(": ")
    while cut > 0:
        if " " in message[:cut].strip():
            return message[:cut], message[cut + 2 :]
        cut = outside.find(": ", cut + 1)
    return message, "change it as the line says"


def _without_parentheses(message: str) -> str:
    """Blanks in place of everything in parentheses, so that positions stay what they are."""
    depth, kept = 0, []
    for character in message:
        depth += character == "("
        kept.append(" " if depth else character)
        depth -= character == ")" and depth > 0
    return "".join(kept)


def as_lines(finding: Finding) -> list[str]:
    """A finding as the table shows it: level, name and value, and the remedy below; both go on below themselves."""
    head = f"  {finding.level:<4}  {finding.name:<{_NAME_WIDTH}}  "
    lines = _wrapped(finding.value, head, " " * len(head))
    return lines + (_wrapped(finding.remedy, f"{_INDENT}-> ", f"{_INDENT}   ") if finding.remedy else [])


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def size_in_words(number: float) -> str:
    """Bytes as decimal gigabytes, or as megabytes where they are few."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"
