"""The table of mutations fits the code, and the machinery tells caught, survived and broken apart."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.__main__ import main
from tests.mutations.mutation import Mutation
from tests.mutations.running import ROOT, telling_line
from tests.mutations.table import MUTATIONS
from tests.mutations.table.tests_named import MATHEMATICS

FEWEST = 12


def test_names_are_unique_and_there_are_enough() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names)) >= FEWEST


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_passage_and_its_tests_exist(mutation: Mutation) -> None:
    source = (ROOT / mutation.path).read_text(encoding="utf-8")
    mutated = mutation.applied_to(source)  # raises unless the passage is there exactly once
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    assert mutation.why
    assert mutation.tests
    for test in mutation.tests:
        path, _, function = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {re.escape(function.partition('[')[0])}", text, re.MULTILINE), test


def test_the_cases_that_mutations_name_are_collected(request: pytest.FixtureRequest) -> None:
    """A case whose name has changed would be found when the table is run, half an hour later.

    Where all tests are run they have been collected already, which takes half a minute.
    """
    named = {test for mutation in MUTATIONS for test in mutation.tests}
    collected = {item.nodeid for item in request.session.items}
    if missing := named - collected - _containing(collected):
        files = sorted({test.partition("::")[0] for test in missing})
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        collected |= {line for line in told.splitlines() if "::" in line}
    assert named <= collected | _containing(collected), named - collected - _containing(collected)


def _containing(cases: set[str]) -> set[str]:
    """The functions and files of ``cases``, which stand for all of theirs."""
    return {part for case in cases for part in (case.partition("[")[0], case.partition("::")[0])}


def test_caught_survived_and_broken_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real, on mathematics that needs no ranks; a harmless change must be named and fail the run."""
    path, old = "megatron_ogpsa/projection/removal.py", "    return coefficients_BK\n"
    tests = (f"{MATHEMATICS}::test_a_gradient_in_the_protected_subspace_vanishes",)
    mutations = [
        Mutation("half-removed", path, old, "    return coefficients_BK / 2\n", tests, "half is removed"),
        Mutation("harmless", path, old, "    # A remark.\n    return coefficients_BK\n", tests, "nothing"),
        Mutation("crash", path, old, "    return coefficients\n", tests, "a name that is not there"),
        Mutation("no-import", path, "from torch import Tensor\n", "from torch import Tensors\n", tests, "no such name"),
    ]
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    assert main(["--json", str(results), "--markdown", str(page)], mutations) == 1
    outcomes = json.loads(results.read_text(encoding="utf-8"))["outcomes"]
    assert {outcome["name"]: outcome["verdict"] for outcome in outcomes} == {
        "half-removed": "caught",
        "harmless": "survived",
        "crash": "broken",
        "no-import": "broken",
    }
    assert outcomes[0]["test"] == tests[0]
    assert outcomes[0]["evidence"].startswith("assert ")
    assert "| `harmless` (projection/removal.py) | nothing | survived |" in page.read_text(encoding="utf-8")
    last = capsys.readouterr().out.splitlines()[-4:]
    assert last[0].startswith("survived: harmless: ")
    assert re.fullmatch(r"1 of 4 caught in \d+ s", last[3])


def test_tests_that_fail_before_anything_is_broken_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    path, old = "megatron_ogpsa/projection/removal.py", "    return coefficients_BK\n"
    missing = (f"{MATHEMATICS}::test_that_is_not_there",)
    assert main([], [Mutation("any", path, old, "    return -coefficients_BK\n", missing, "any")]) == 1
    assert "before anything is broken, pytest ends with 4" in capsys.readouterr().err


JOB_FAILED = """>       assert all(distributed(2).run(job))
E       tests.harness.group.JobFailed: tests.core.cases:job({}) failed
E
E       rank 1 failed:
E           Traceback (most recent call last):
E               assert equal, f"copies of {name} differ"
E           AssertionError: copies of model.norm.weight differ
E
E       rank 0 failed:
E           RuntimeError: Connection reset by peer"""


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (">       assert x < y\nE       AssertionError: tensor\nE       assert 0.5 < 1e-06", "assert 0.5 < 1e-06"),
        (">           assert result['kept']\nE           assert False", "assert result['kept']"),
        (JOB_FAILED, "AssertionError: copies of model.norm.weight differ"),
        (JOB_FAILED.split("E\n")[0], "tests.harness.group.JobFailed: tests.core.cases:job({}) failed"),
        ("", "said elsewhere"),
    ],
)
def test_the_line_that_tells(report: str, expected: str) -> None:
    assert telling_line(report, "said elsewhere") == expected
