"""The results of a run as data and as a page."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ogpsa.system.files import write_atomically, write_json
from tests.mutations.mutation import Mutation
from tests.mutations.running import Outcome

PAGE = """# Tests of the tests

Each line of the table is one mistake that someone could make in this project. A script makes the mistake in a copy of
the code, runs a few tests, and puts the code back. A mistake is *caught* if one of these tests fails. It *survives* if
all of them pass: then a test is missing. It is *broken* if the code did not even run, for that shows nothing.

```
python -m tests.mutations                     # all of them
python -m tests.mutations --list              # what they are
python -m tests.mutations --only NAME ...     # some of them
```

The mistakes are in `tests/mutations/table`. Before the first one the script runs all chosen tests on the code as
it is; they must pass. The exit code is 0 if every mistake is caught.

This page is written by `python -m tests.mutations --markdown docs/mutations.md --json docs/mutations.json`.

{summary} on {date}, {versions}.

| Mistake | What is wrong | Result | First test that fails | How it fails |
|---|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Report:
    """The outcomes of one run, in the order of its mutations; ``seconds`` is the whole run's wall clock."""

    mutations: Sequence[Mutation]
    outcomes: Sequence[Outcome]
    seconds: float

    @property
    def not_caught(self) -> list[Outcome]:
        """What makes the run fail."""
        return [outcome for outcome in self.outcomes if outcome.verdict != "caught"]

    @property
    def summary(self) -> str:
        """``N of M caught in S s``."""
        caught = len(self.outcomes) - len(self.not_caught)
        return f"{caught} of {len(self.outcomes)} caught in {self.seconds:.0f} s"


def _versions() -> dict[str, str]:
    return {"Python": platform.python_version()} | {name: version(name) for name in ("torch", "megatron-core")}


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def write_json_report(path: Path, report: Report) -> None:
    """Everything that the page says, as data."""
    outcomes: list[dict[str, Any]] = [
        asdict(outcome) | {"seconds": round(outcome.seconds, 1), "path": mutation.path, "why": mutation.why}
        for mutation, outcome in zip(report.mutations, report.outcomes, strict=True)
    ]
    write_json(
        path,
        {"date": _today(), "versions": _versions(), "seconds": round(report.seconds), "outcomes": outcomes},
    )


def write_markdown(path: Path, report: Report) -> None:
    """The page ``docs/mutations.md``."""
    rows = [
        f"| `{mutation.name}` ({mutation.path.removeprefix('megatron_ogpsa/')}) | {_cell(mutation.why)} | "
        f"{outcome.verdict} | {_code(outcome.test.removeprefix('tests/'))} | {_code(outcome.evidence)} |"
        for mutation, outcome in zip(report.mutations, report.outcomes, strict=True)
    ]
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    page = PAGE.format(summary=report.summary, date=_today(), versions=versions, rows="\n".join(rows))
    write_atomically(path, page.encode())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text.replace('`', ''))}`"
