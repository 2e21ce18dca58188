"""The environment is installed once, completely or not at all, and by one script at a time."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.launch.sandbox import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    sandbox = Sandbox(tmp_path)
    sandbox.add_python(sandbox.tools / "python3.12")
    return sandbox


def test_demo_installs_then_passes_its_arguments_on(sandbox: Sandbox) -> None:
    result = sandbox.run(sandbox.script("demo.sh"), "--processes", "a b")
    assert result.stdout == "ran megatron-ogpsa <demo> <--processes> <a b>"
    assert result.returncode == 0
    assert sandbox.installations() == [str(sandbox.project)]
    assert "about 4 minutes and 6 GB" in result.stderr
    assert "Downloading torch-2.15.0" in result.stderr
    assert "Collecting" not in result.stderr


def test_second_run_installs_nothing_says_nothing_and_is_quick(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    started = time.monotonic()
    result = sandbox.run(sandbox.script("demo.sh"))
    assert time.monotonic() - started < 10
    assert result.stderr == ""
    assert len(sandbox.installations()) == 1


def test_installation_for_the_tests_serves_the_demo(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("test.sh"))
    sandbox.run(sandbox.script("demo.sh"))
    assert sandbox.installations() == [f"{sandbox.project}[test]"]


def test_installation_for_the_demo_lacks_what_the_tests_need(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    sandbox.run(sandbox.script("test.sh"))
    assert sandbox.installations() == [str(sandbox.project), f"{sandbox.project}[test]"]


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml"])
def test_changed_requirements_install_again(sandbox: Sandbox, name: str) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    with (sandbox.project / name).open("a") as file:
        file.write("# changed\n")
    sandbox.run(sandbox.script("demo.sh"))
    assert len(sandbox.installations()) == 2


def test_changed_python_installs_again(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    sandbox.add_python(sandbox.venv / "bin" / "python", version="3.13")
    sandbox.run(sandbox.script("demo.sh"))
    assert len(sandbox.installations()) == 2


def test_another_build_of_the_same_python_does_not(sandbox: Sandbox) -> None:
    """Nodes that share the environment may each have their own, and would install under each other."""
    sandbox.run(sandbox.script("demo.sh"))
    sandbox.add_python(sandbox.venv / "bin" / "python", build="'7 (another compiler)'")
    result = sandbox.run(sandbox.script("demo.sh"))
    assert result.stderr == ""
    assert len(sandbox.installations()) == 1


def test_moved_project_installs_again(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    moved = sandbox.project.with_name("moved here")
    shutil.move(sandbox.project, moved)
    sandbox.run(moved / "launch" / "demo.sh")
    assert sandbox.installations() == [str(sandbox.project), str(moved)]


def test_failed_installation_is_told_and_tried_again(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    (sandbox.project / "setup.cfg").write_text("changed")
    for _ in range(2):
        result = sandbox.run(sandbox.script("demo.sh"), FAKE_PIP_STATUS="1")
        assert result.returncode == 2
        assert "the last words of pip" in result.stderr
        assert str(sandbox.venv / "install.log") in result.stderr
        assert result.stdout == ""
    assert sandbox.run(sandbox.script("demo.sh")).returncode == 0
    assert len(sandbox.installations()) == 2


def test_going_back_after_a_failed_installation_installs_again(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    before = (sandbox.project / "setup.cfg").read_text()
    (sandbox.project / "setup.cfg").write_text("changed")
    sandbox.run(sandbox.script("demo.sh"), FAKE_PIP_STATUS="1")  # may have replaced half of the packages
    (sandbox.project / "setup.cfg").write_text(before)
    sandbox.run(sandbox.script("demo.sh"))
    assert len(sandbox.installations()) == 2


def test_interrupted_installation_is_not_taken_for_a_complete_one(sandbox: Sandbox) -> None:
    process = sandbox.start(sandbox.script("demo.sh"), FAKE_PIP_SECONDS="1")
    while not sandbox.pip_log.exists():
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=10)
    assert sandbox.run(sandbox.script("demo.sh")).returncode == 0
    assert sandbox.pip_log.read_text().count("started") == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock(1)")
def test_two_scripts_at_once_install_once(sandbox: Sandbox) -> None:
    processes = [sandbox.start(sandbox.script("demo.sh"), FAKE_PIP_SECONDS="4") for _ in range(2)]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(sandbox.installations()) == 1
    assert sum("waiting for another installation" in error for error in errors) == 1


def test_full_disk_is_told_before_anything_is_installed(sandbox: Sandbox) -> None:
    sandbox.add_command("df", "printf 'Filesystem 1024-blocks Used Available\\n/dev/x 9 9 3145728\\n'")
    result = sandbox.run(sandbox.script("demo.sh"))
    assert result.returncode == 2
    assert "needs 8 GB" in result.stderr
    assert "has 3 GB" in result.stderr
    assert not sandbox.venv.exists()


def test_update_needs_no_space_for_pytorch(sandbox: Sandbox) -> None:
    sandbox.run(sandbox.script("demo.sh"))
    torch = sandbox.venv / "lib" / "python3.12" / "site-packages" / "torch" / "version.py"
    torch.parent.mkdir(parents=True)
    torch.touch()
    sandbox.add_command("df", "exit 1")
    result = sandbox.run(sandbox.script("test.sh"))
    assert result.returncode == 0
    assert "updating" in result.stderr
    assert "4 minutes" not in result.stderr


def test_folder_of_the_users_is_not_turned_into_an_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").touch()
    result = sandbox.run(sandbox.script("demo.sh"), OGPSA_VENV=str(folder))
    assert result.returncode == 2
    assert "not a Python environment" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["chapter1.tex"]


def test_relative_environment_folder_is_taken_from_where_the_user_is(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.run(sandbox.script("demo.sh"), OGPSA_VENV="envs/mine").returncode == 0
    assert (tmp_path / "envs" / "mine" / "bin" / "python").exists()


def test_environment_with_an_old_python_is_refused(sandbox: Sandbox) -> None:
    sandbox.add_python(sandbox.venv / "bin" / "python", version="3.11")
    result = sandbox.run(sandbox.script("demo.sh"))
    assert result.returncode == 2
    assert "remove that folder" in result.stderr


@pytest.mark.parametrize("status", [0, 1, 5])
def test_ci_is_the_test_script_and_its_exit_code(sandbox: Sandbox, status: int) -> None:
    result = sandbox.run(sandbox.project / ".ci" / "run", FAKE_PYTEST_STATUS=str(status))
    assert result.returncode == status
    words = "-m pytest -q -n 2 --dist loadfile --durations=10".split()
    assert result.stdout == f"ran pytest in {sandbox.project} {' '.join(f'<{word}>' for word in words)}"


def test_test_script_passes_its_arguments_on(sandbox: Sandbox) -> None:
    result = sandbox.run(sandbox.script("test.sh"), "-k", "a or b")
    assert result.stdout.endswith(" <-k> <a or b>")
