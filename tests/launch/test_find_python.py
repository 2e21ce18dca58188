"""Which interpreter the scripts choose, and what they say when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.sandbox import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_newest_is_not_preferred_to_the_most_tested(sandbox: Sandbox) -> None:
    expected = sandbox.add_python(sandbox.tools / "python3.12")
    sandbox.add_python(sandbox.tools / "python3.13", version="3.13")
    assert sandbox.find_python().stdout.strip() == str(expected)


def test_plain_python3_serves(sandbox: Sandbox) -> None:
    expected = sandbox.add_python(sandbox.tools / "python3", version="3.14")
    assert sandbox.find_python().stdout.strip() == str(expected)


@pytest.mark.parametrize("version", ["2.7", "3.11", "3.15"])
def test_other_versions_do_not_serve(sandbox: Sandbox, version: str) -> None:
    sandbox.add_python(sandbox.tools / "python3", version=version)
    assert sandbox.find_python().returncode == 2


def test_failing_shim_does_not_hide_the_python_behind_it(sandbox: Sandbox) -> None:
    sandbox.add_command("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    behind = sandbox.add_python(sandbox.tools.parent / "other bin" / "python3.12")
    result = sandbox.find_python(PATH=f"{sandbox.tools}:{behind.parent}")
    assert result.stdout.strip() == str(behind)
    assert result.stderr == ""


def test_pyenv_version_that_is_not_active(sandbox: Sandbox) -> None:
    sandbox.add_command("python3.12", "exit 127")
    sandbox.add_python(sandbox.pyenv / "versions" / "3.11.7" / "bin" / "python", version="3.11")
    expected = sandbox.add_python(sandbox.pyenv / "versions" / "3.12.1" / "bin" / "python")
    assert sandbox.find_python().stdout.strip() == str(expected)


def test_named_python_wins(sandbox: Sandbox) -> None:
    sandbox.add_python(sandbox.tools / "python3.12")
    named = sandbox.add_python(sandbox.tools.parent / "my python", version="3.13")
    assert sandbox.find_python(OGPSA_PYTHON=str(named)).stdout.strip() == str(named)


def test_named_python_is_never_replaced_silently(sandbox: Sandbox) -> None:
    sandbox.add_python(sandbox.tools / "python3.12")
    named = sandbox.add_python(sandbox.tools.parent / "old", version="3.9")
    result = sandbox.find_python(OGPSA_PYTHON=str(named))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"megatron-ogpsa: OGPSA_PYTHON={named} is Python 3.9.0, not 3.12 to 3.14\n"


def test_none_found_says_what_to_install_in_one_line(sandbox: Sandbox) -> None:
    result = sandbox.run(sandbox.script("demo.sh"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for remedy in ("apt-get install python3.12", "brew install", "pyenv install", "OGPSA_PYTHON="):
        assert remedy in result.stderr


def test_right_version_without_venv_names_the_package(sandbox: Sandbox) -> None:
    sandbox.add_python(sandbox.tools / "python3", without_venv="1")
    result = sandbox.find_python()
    assert result.returncode == 2
    assert "apt-get install python3-venv" in result.stderr
