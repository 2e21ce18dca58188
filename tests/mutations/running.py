"""Break a copy of the project in one place, run the tests that ought to notice, put it back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from tests.mutations.mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]

LIMIT_SECONDS = 600.0
"""For the tests of one mutation; jobs on ranks have shorter limits of their own."""

CRASHES = ("AttributeError", "ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "TypeError")
"""A mutation that ends like this is not code that someone could have shipped: any test at all would notice it."""

LONGEST_LINE = 140

ALL_PASSED, SOME_FAILED = 0, 1
"""Exit codes of pytest. All others mean that tests were not run as asked."""

Verdict = Literal["caught", "survived", "broken"]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
        verdict: ``caught`` by a test that fails; ``survived`` if all pass; ``broken`` if something else went wrong, such
            as an import, so that nothing is shown.
        test: the first test that failed, or what was run.
        evidence: the line with which it failed.
        seconds: of wall clock.
    """

    name: str
    verdict: Verdict
    test: str
    evidence: str
    seconds: float


@dataclass(frozen=True)
class Failure:
    """One test that did not pass; ``kind`` is JUnit's: failure, error (outside the test itself) or skipped."""

    test: str
    kind: str
    evidence: str


class CopyError(RuntimeError):
    """The copy cannot show anything: it is not what would be imported, or its tests fail before it is broken."""


@contextmanager
def copied_project() -> Iterator[Path]:
    """A folder with the files that git tracks, as they are in the working tree; removed at the end.

    Raises:
        CopyError: Python would import the project from somewhere else.
        CalledProcessError: this is not a git checkout.
    """
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory(prefix="ogpsa-mutations-") as temporary:
        copy = Path(temporary).resolve() / "project"
        for name in filter(None, listing.stdout.split("\0")):
            if (ROOT / name).is_file():  # not deleted since
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
        _check_what_is_imported(copy)
        yield copy


def _check_what_is_imported(copy: Path) -> None:
    """An editable installation points at another tree; ranks inherit this environment, and start in other folders."""
    program = "from importlib.util import find_spec as f; print(f('megatron_ogpsa').origin); print(f('tests').origin)"
    expected = [str(copy / package / "__init__.py") for package in ("megatron_ogpsa", "tests")]
    for folder in (copy, copy.parent):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=_environment(copy), capture_output=True, text=True
        )
        if done.stdout.splitlines() != expected:
            raise CopyError(f"{expected} would not be what is tested:\n{done.stdout}{done.stderr}")


def _environment(copy: Path) -> dict[str, str]:
    # Compiled modules are told apart by size and by time in seconds: not enough for files that change back and forth.
    given = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # of whoever runs this
    return given | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


def check_unbroken(copy: Path, mutations: Sequence[Mutation]) -> int:
    """Run all tests of ``mutations`` once on the copy as it is; return their number.

    Raises:
        CopyError: not all of them pass; a skipped test would catch nothing.
    """
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    # As many mutations' tests as there are, so as many limits.
    code, failures, output = _run_pytest(copy, tests, stop_early=False, limit=LIMIT_SECONDS * len(mutations))
    if code != ALL_PASSED or failures:
        listed = "\n".join(f"{failure.kind}: {failure.test}: {failure.evidence}" for failure in failures)
        raise CopyError(f"before anything is broken, pytest ends with {code}:\n{listed or output[-2000:]}")
    return len(tests)


def try_mutation(copy: Path, mutation: Mutation) -> Outcome:
    """Break the copy, run the mutation's tests up to the first that fails, and put the file back."""
    path = copy / mutation.path
    original = path.read_text(encoding="utf-8")
    started = time.monotonic()
    path.write_text(mutation.applied_to(original), encoding="utf-8")
    try:
        code, failures, output = _run_pytest(copy, mutation.tests, stop_early=True, limit=LIMIT_SECONDS)
    finally:
        path.write_text(original, encoding="utf-8")
    verdict, test, evidence = _judged(code, failures, output, mutation)
    return Outcome(mutation.name, verdict, test, evidence.replace(str(copy), "…"), time.monotonic() - started)


def _judged(code: int | None, failures: Sequence[Failure], output: str, mutation: Mutation) -> tuple[Verdict, str, str]:
    ran = " ".join(mutation.tests)
    if code == ALL_PASSED:
        return "survived", ran, "all passed"
    if code is None:
        return "broken", ran, f"still running after {LIMIT_SECONDS:.0f} s"
    first = next((failure for failure in failures if failure.kind != "skipped"), None)
    if code != SOME_FAILED or first is None:
        last = output.rstrip().splitlines()[-1:]
        return "broken", ran, f"pytest ends with {code}: {''.join(last)}"
    if first.kind == "error" or re.search(rf"\b({'|'.join(CRASHES)})\b", first.evidence):
        return "broken", first.test, first.evidence
    return "caught", first.test, first.evidence


def _run_pytest(
    copy: Path, tests: Sequence[str], *, stop_early: bool, limit: float
) -> tuple[int | None, list[Failure], str]:
    """pytest's exit code (None: killed at the limit), what did not pass, and the output."""
    results = copy.parent / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    process = subprocess.Popen(
        [*command, *(["-x"] if stop_early else []), *tests],
        cwd=copy,
        env=_environment(copy),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return None, [], ""
    finally:
        if process.poll() is None:  # at the limit, or on Ctrl-C; ranks end with their pytest
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, _failures(results) if results.exists() else [], output


def _failures(results: Path) -> list[Failure]:
    return [
        Failure(
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}",
            child.tag,
            telling_line(child.text or "", child.get("message", "")),
        )
        for case in ElementTree.parse(results).iter("testcase")
        for child in case
        if child.tag in ("failure", "error", "skipped")
    ]


def telling_line(report: str, message: str = "") -> str:
    """Of pytest's report of a failure the line that says what was wrong; of a failed job, what the rank raised.

    Args:
        report: the lines of the exception begin with E, the line of the test with >.
        message: stands in where the report has no such lines.
    """
    marked = [line[1:].strip() for line in report.splitlines() if line.startswith("E ")]
    lines = [line for line in marked or message.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("assert ")), lines[0] if lines else "")
    if lines and "JobFailed" in lines[0]:  # first of all: a rank's traceback may quote an assert that holds
        said = lines[0]
        ends = r"the process (was ended|exited)|(\w+\.)*\w*(Error|Exception)\b"
        raised = [line for line in lines[1:] if re.match(ends, line) and "Connection reset by peer" not in line]
        said = raised[-1] if raised else said
    elif said.endswith("assert False"):
        said = [line[1:].strip() for line in report.splitlines() if line.startswith("> ")][-1]
    return said if len(said) <= LONGEST_LINE else said[: LONGEST_LINE - 1] + "…"
