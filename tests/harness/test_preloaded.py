"""Commands forked from a preloaded process: they and the processes that they start are like new ones, but for imports."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tests.harness.children import HANDED_IN
from tests.harness.preloaded import PreloadedCommand

CHILDREN = "tests.harness.children"


def test_processes_of_a_command_are_forked_and_behave_as_new_ones(preloaded: PreloadedCommand, tmp_path: Path) -> None:
    finished = preloaded.run(CHILDREN, [], folder=tmp_path, timeout=60, agent=True)
    assert finished.exit_code == 0, finished.output
    results = json.loads(finished.output.splitlines()[-1])
    told = results.pop("tells")
    assert Path(told.pop("folder")).is_absolute()
    assert told == {
        "torch": True,
        "variable": "one",
        "leads": True,
        "ends by SIGTERM": True,
        "input": HANDED_IN,
        "arguments": ["tells", "-m"],
        "is there": True,
    }
    assert results == {
        "folder is left": True,
        "raises": [1, "ValueError: a message of its own"],
        "exits": 7,
        "first line": "ready\n",
        "poll": None,
        "ended by": -signal.SIGTERM,
        "another program": "-m x\n",
    }


def test_commands_run_beside_each_other(preloaded: PreloadedCommand, tmp_path: Path) -> None:
    waiting = [
        preloaded.start(CHILDREN, ["waits"], folder=tmp_path, output=tmp_path / f"{number}.log") for number in range(2)
    ]
    assert preloaded.run(CHILDREN, ["exits"], folder=tmp_path, timeout=60).exit_code == 7
    deadline = time.monotonic() + 60
    while any(command.output != "ready\n" for command in waiting):
        assert time.monotonic() < deadline, [command.output for command in waiting]
        time.sleep(0.02)
    assert [command.wait(0) for command in waiting] == [None, None]
    for command in waiting:
        command.kill()
    assert [command.wait(0) for command in waiting] == [-signal.SIGKILL] * 2


def test_a_command_that_runs_too_long_is_killed(preloaded: PreloadedCommand, tmp_path: Path) -> None:
    finished = preloaded.run(CHILDREN, ["waits"], folder=tmp_path, timeout=0.5)
    assert finished.exit_code is None


def test_a_process_id_that_comes_again_is_a_new_command(preloaded: PreloadedCommand, tmp_path: Path) -> None:
    """The tests start more processes than the kernel has numbers."""
    first_id = again_id = 0
    while (
        not first_id < again_id < first_id + 2000
    ):  # once, but for where the kernel begins with the first number again
        first = preloaded.start(CHILDREN, ["exits"], folder=tmp_path, output=tmp_path / "first")
        first_id = first.pid
        assert first.wait(60) == 7
        seen_before = range(first_id + 1, first_id + 2000)
        preloaded._exit_codes |= dict.fromkeys(seen_before, 77)
        again = preloaded.start(CHILDREN, ["exits"], folder=tmp_path, output=tmp_path / "again")
        again_id = again.pid
        assert again.wait(60) == 7
        for number in seen_before:
            preloaded._exit_codes.pop(number, None)
