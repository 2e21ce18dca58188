"""What tests on a GPU have told, from the JUnit XML that pytest writes: outcomes, and the figures that they recorded."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True, kw_only=True)
class TestRun:
    """One test.

    Attributes:
        name: of its function, without ``test_``, in words.
        parameters: in brackets behind it.
        outcome: one of :data:`PASSED`, :data:`FAILED` and :data:`SKIPPED`.
        figures: what it recorded (``record_property``), by name.
    """

    __test__ = False  # pytest collects classes of such names

    name: str
    parameters: Sequence[str]
    outcome: str
    figures: Mapping[str, float]


def read_tests(file: Path) -> list[TestRun]:
    """All tests of a run, in its order. Of those that an interrupt cut off pytest leaves cases without a name."""
    return [_test(case) for case in ElementTree.parse(file).getroot().iter("testcase") if "name" in case.attrib]


def is_cut(file: Path) -> bool:
    """Whether the run was interrupted before all its tests had ended."""
    return any("name" not in case.attrib for case in ElementTree.parse(file).getroot().iter("testcase"))


def _test(case: ElementTree.Element) -> TestRun:
    name, _, parameters = case.attrib["name"].partition("[")
    kinds = {child.tag for child in case}
    outcome = FAILED if kinds & {"failure", "error"} else SKIPPED if "skipped" in kinds else PASSED
    figures = {one.attrib["name"]: float(one.attrib["value"]) for one in case.iterfind("properties/property")}
    return TestRun(
        name=name.removeprefix("test_").replace("_", " "),
        parameters=[part for part in parameters.removesuffix("]").split("-") if part],
        outcome=outcome,
        figures=figures,
    )


def in_words(tests: Sequence[TestRun]) -> str:
    """``5 passed, 1 failed``."""
    counts = Counter(test.outcome for test in tests)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, FAILED, SKIPPED) if counts[outcome])


def by_recipe(tests: Sequence[TestRun], recipes: Sequence[str]) -> dict[str, list[TestRun]]:
    """Those that ran, by the FP8 recipe among their parameters."""
    return {
        recipe: ran
        for recipe in recipes
        if (ran := [test for test in tests if recipe in test.parameters and test.outcome != SKIPPED])
    }


def figure(tests: Sequence[TestRun], name: str, *parameters: str, lowest: bool = False) -> str:
    """What was recorded by that name, a regular expression: of tests with these parameters, or the lowest of all."""
    found = [
        value
        for test in tests
        if set(parameters) <= set(test.parameters)
        for recorded, value in test.figures.items()
        if re.fullmatch(name, recorded)
    ]
    if not found:
        return "–"
    return f"{min(found) if lowest else sum(found) / len(found):.3f}"


def fp8_rows(by_recipe: Mapping[str, Sequence[TestRun]]) -> list[list[str]]:
    """A line for each recipe: what was bitwise, and its figures beside those of bf16."""
    kinds = {
        "no trace": "refreshes leave no trace",
        "resume": "a run goes on bitwise",
        "bf16": "references without fp8",
    }
    rows = [["recipe", "no trace, bitwise", "resume, bitwise", "references in bf16, bitwise", "cosine: lowest", "mean"]]
    rows[0] += ["SFT loss, in bf16", "DPO loss, in bf16"]
    for recipe, tests in by_recipe.items():
        cells = [in_words([test for test in tests if test.name.startswith(kind)]) or "–" for kind in kinds.values()]
        cells += [figure(tests, ".*: lowest cosine", lowest=True), figure(tests, ".*: mean cosine")]
        for stage in ("sft", "dpo"):
            cells.append(f"{figure(tests, 'mean loss', stage)}, {figure(tests, 'mean loss in bf16', stage)}")
        rows.append([recipe, *cells])
    return rows


def failures(tests: Sequence[TestRun]) -> list[str]:
    """Names of those that failed."""
    return [f"{test.name} [{', '.join(test.parameters)}]" for test in tests if test.outcome == FAILED]
